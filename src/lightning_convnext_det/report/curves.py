"""Learning curves of a run from the ``metrics.csv`` of Lightning's CSVLogger."""

import csv
import re
from importlib.util import find_spec
from pathlib import Path

from lightning_convnext_det.report import plots

_SCORES = ("val/map", "val/map_50", "val/map_75", "val/top1", "val/top5")


def read_learning_curves(log: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Epochs and values of each column of a ``metrics.csv``; steps of one epoch are averaged."""
    sums: dict[str, dict[float, list[float]]] = {}
    with log.open(newline="") as file:
        for row in csv.DictReader(file):
            if not row.get("epoch"):
                continue
            for name, value in row.items():
                if value and name not in ("epoch", "step") and name.startswith(("train/", "val/")):
                    sums.setdefault(name, {}).setdefault(float(row["epoch"]), []).append(float(value))
    return {name: (list(epochs), [sum(v) / len(v) for v in epochs.values()]) for name, epochs in sorted(sums.items())}


def draw_learning_curves(log: Path) -> dict[str, plots.Plot]:
    """Losses and validation metrics, by title; nothing for a log without them."""
    losses, scores = _groups(log)
    drawn = {}
    if losses:
        drawn["Losses"] = plots.plot_learning(losses, "loss")
    if scores:
        drawn["mAP on validation"] = plots.plot_learning(scores, "mAP")
    return drawn


def write_learning_curves(log: Path, destination: Path) -> bool:
    """Draw losses and validation metrics into a PNG file; False without matplotlib or without anything to draw."""
    losses, scores = _groups(log)
    groups = {label: curves for label, curves in (("loss", losses), ("validation", scores)) if curves}
    if not groups or find_spec("matplotlib") is None:
        return False
    plots.save_learning(groups, destination)
    return True


def _groups(log: Path) -> tuple[dict[str, tuple[list[float], list[float]]], dict[str, tuple[list[float], list[float]]]]:
    curves = read_learning_curves(log)
    # of the decoder layers of DETR the last one: the others, up to thirty more, have the same losses
    losses = {name: curve for name, curve in curves.items() if "loss" in name and not re.search(r"_aux\d+$", name)}
    return losses, {name: curve for name, curve in curves.items() if name in _SCORES}
