"""Write the report of a detector on a split: an HTML page, report.json and the plots as SVG and PNG."""

import json
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_convnext_det import __version__
from lightning_convnext_det.data.annotations import DetectionAnnotations
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.fingerprint import take_fingerprint
from lightning_convnext_det.metrics.error_breakdown import KINDS
from lightning_convnext_det.report import page as html
from lightning_convnext_det.report import plots
from lightning_convnext_det.report.analysis import Analysis, analyse
from lightning_convnext_det.report.curves import draw_learning_curves
from lightning_convnext_det.report.dataset import (
    SharedImage,
    dataset_hash,
    find_shared_images,
    read_splits,
    training_images,
)
from lightning_convnext_det.report.drawings import (
    ErrorCrop,
    crop_label_errors,
    draw_training_images,
    draw_worst_images,
)
from lightning_convnext_det.report.evaluation import Evaluation
from lightning_convnext_det.report.plots import Plot

_WORST = 12
_CROPS = 48
_LISTED = 500
_METRICS = {
    "map": "mAP", "map_50": "mAP at IoU 0.5", "map_75": "mAP at IoU 0.75", "map_small": "mAP small",
    "map_medium": "mAP medium", "map_large": "mAP large", "mar_100": "recall (mAR 100)",
}  # fmt: skip
_CURVES = "At IoU 0.5, the classes with most objects; a dot marks the score threshold that is chosen for the class."
_GROUPS = "mAP of groups of objects, and how many there are. Sizes are square roots of areas, in pixels."
_WORST_IMAGES = "The images that cost most mAP. Detections are drawn from the score threshold of their class on."
_LABELS = (
    "Where the detector is confident and the annotation differs, the surest first. Dashed blue: annotation; orange: "
    "detection. A wrong detector lists right annotations, too: look before you change them."
)


class Written(NamedTuple):
    """Where a report lies, and what it found."""

    page: Path
    numbers: Path
    plots: Path
    analysis: Analysis
    label_errors: list[ErrorCrop]


def create_report(evaluation: Evaluation, data: DetectionDataModule, split: str, output: str | Path) -> Written:
    """Analyse an evaluation and write its report.

    Args:
        evaluation: of a split.
        data: of the same dataset; the report describes its other splits, too.
        split: the name of the split.
        output: the HTML file; ``report.json`` and the folder ``report_plots`` get its name.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    plots.check_matplotlib()
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    analysis = analyse(evaluation)
    splits = read_splits(data)
    shared = find_shared_images(splits)
    errors = crop_label_errors(evaluation, analysis, _CROPS)
    drawn = _draw_plots(evaluation, analysis, splits)
    worst = draw_worst_images(evaluation, analysis, _WORST)
    sections = [
        _summary(evaluation, analysis, split),
        _classes(evaluation, analysis),
        html.Section("curves", "Curves", _CURVES, html.plots(drawn["curves"])),
        _errors(analysis, drawn["errors"]),
        html.Section("groups", "Size, shape, crowding", _GROUPS, html.plots(drawn["groups"])),
        html.Section("worst", "Worst images", _WORST_IMAGES, html.worst_images(worst)),
        html.Section("labels", f"Likely label errors ({len(errors)})", _LABELS, html.label_errors(errors, _LISTED)),
        _dataset(data, splits, shared, drawn["dataset"]),
        *_training(evaluation, drawn["training"]),
        _provenance(evaluation),
    ]
    title = f"{Path(evaluation.source).name} on {split}"
    subtitle = f"{len(evaluation.annotations)} images of {evaluation.annotations.image_root}"
    output.write_text(html.page(title, subtitle, sections))
    numbers = output.with_suffix(".json")
    content = _numbers(evaluation, analysis, split, errors, splits, shared)
    numbers.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")
    folder = output.with_name(f"{output.stem}_plots")
    folder.mkdir(exist_ok=True)
    for name, plot in (item for group in drawn.values() for item in group.items()):
        (folder / f"{_file_stem(name)}.svg").write_text(plot.svg)
        (folder / f"{_file_stem(name)}.png").write_bytes(plot.png)
    return Written(output, numbers, folder, analysis, errors)


def _draw_plots(
    evaluation: Evaluation, analysis: Analysis, splits: dict[str, DetectionAnnotations]
) -> dict[str, dict[str, Plot]]:
    """All plots, by section and title."""
    names = evaluation.annotations.class_names
    counts = {
        name: np.bincount(table.labels[~table.crowd], minlength=len(names)).astype(np.int64)
        for name, table in splits.items()
    }
    sides = {name: np.sqrt((t.boxes[:, 2:] - t.boxes[:, :2]).prod(1).astype(np.float64)) for name, t in splits.items()}
    return {
        "curves": {
            "Precision and recall": plots.plot_precision_recall(analysis.curves, names),
            "F1": plots.plot_f1(analysis.curves, analysis.thresholds, names),
        },
        "errors": {
            "What the errors cost (TIDE)": plots.plot_errors(analysis.breakdown),
            "Confusion matrix": plots.plot_confusion(analysis.confusion, names),
            "Calibration": plots.plot_reliability(analysis.reliability),
        },
        "groups": {title: plots.plot_groups(groups) for title, groups in analysis.groups.items()},
        "dataset": {
            "Objects of each class": plots.plot_counts(counts, names),
            "Sizes of the boxes": plots.plot_sizes(sides),
        },
        "training": _learning_plots(evaluation),
    }


def _summary(evaluation: Evaluation, analysis: Analysis, split: str) -> html.Section:
    tiles = [
        html.Tile(text, html.percent(analysis.metrics[name]), _interval_text(analysis, name))
        for name, text in _METRICS.items()
    ]
    kept = np.mean([t.f1 for t in analysis.thresholds if t.num_objects] or [math.nan])
    tiles.append(html.Tile("F1, mean of classes", html.percent(float(kept)), "at the thresholds below"))
    tiles.append(html.Tile("calibration error", html.percent(analysis.ece), "D-ECE, points"))
    worst = max(KINDS, key=lambda kind: analysis.breakdown.loss[kind])
    tiles.append(
        html.Tile("costliest error", worst, f"{100 * analysis.breakdown.loss[worst]:.1f} points of mAP at IoU 0.5")
    )
    if evaluation.speed is not None:
        speed = evaluation.speed
        tiles.append(
            html.Tile("time per image", f"{1000 * speed.seconds_per_image:.0f} ms", f"{speed.device}, with reading")
        )
        tiles.append(html.Tile("peak memory", f"{speed.peak_memory / 2**20:.0f} MB", speed.device))
    intro = (
        f"Points from 0 to 100 on the split {split}. 95 % intervals by {analysis.num_samples:,} bootstrap samples of "
        "the images: how much the number depends on which images were chosen."
    )
    return html.Section("summary", "Summary", intro, html.tiles(tiles))


def _interval_text(analysis: Analysis, name: str) -> str:
    return html.bounds(analysis.intervals[name]) if name in analysis.intervals else ""


def _classes(evaluation: Evaluation, analysis: Analysis) -> html.Section:
    rows = []
    for label, name in enumerate(evaluation.annotations.class_names):
        chosen, lrp = analysis.thresholds[label], analysis.lrp[label]
        threshold = math.nan if chosen.threshold is None else chosen.threshold
        rows.append((
            name, chosen.num_objects, analysis.metrics[f"map/{name}"],
            html.share_bounds(analysis.intervals[f"map/{name}"]), threshold, chosen.precision, chosen.recall,
            chosen.f1, lrp["error"], float(analysis.class_laece[label]),
        ))  # fmt: skip
    head = ("class", "objects", "AP", "95 %", "threshold", "precision", "recall", "F1", "oLRP", "LaECE")
    intro = (
        "AP from 0 to 1 is the mean over IoU 0.5 to 0.95; precision, recall and F1 are those at the score threshold of "
        "highest F1 (IoU 0.5). oLRP and LaECE are errors: lower is better. Click a heading to sort."
    )
    return html.Section("classes", "Classes", intro, html.table(head, rows))


def _errors(analysis: Analysis, drawn: dict[str, Plot]) -> html.Section:
    loss = analysis.breakdown.loss
    intro = (
        f"AP50 won if all errors of a kind were mended; without any false positive it would be {100 * loss['FP']:.1f} "
        f"points higher, with every object found {100 * loss['FN']:.1f}. In the confusion matrix, a row is what is "
        f"annotated. Calibration: D-ECE {100 * analysis.ece:.1f}, LaECE {100 * analysis.laece:.1f} points; the numbers "
        "above the bars count detections."
    )
    return html.Section("errors", "Errors and calibration", intro, html.plots(drawn))


def _dataset(
    data: DetectionDataModule,
    splits: dict[str, DetectionAnnotations],
    shared: list[SharedImage],
    drawn: dict[str, Plot],
) -> html.Section:
    rows = []
    for name, annotations in splits.items():
        taken = take_fingerprint(annotations)
        rows.append((
            name, taken.images, taken.images_without_objects, taken.objects, taken.crowds, str(taken.box_side),
            str(taken.objects_per_image), dataset_hash(annotations)[:12],
        ))  # fmt: skip
    head = ("split", "images", "without objects", "objects", "ignored", "box side, px", "objects per image", "hash")
    body = html.table(head, rows, sortable=False) + "<br>" + html.plots(drawn)
    if shared:
        found = [(one.file_name, one.split, one.other_file_name, one.other_split) for one in shared[:100]]
        body += f"<h3>{len(shared)} images look the same in two splits</h3>" + html.table(
            ("file", "split", "file", "split"), found, sortable=False, text=(0, 1, 2, 3)
        )
    else:
        body += "<p>No image looks the same in two splits.</p>"
    samples = training_images(data)
    if samples:
        images = draw_training_images(samples, data.class_names)
        body += "<h3>Training images as the network gets them</h3>" + html.image_grid(images, "training image")
    return html.Section("dataset", "Dataset", "Medians, with the 10th and 90th percentile.", body)


def _training(evaluation: Evaluation, drawn: dict[str, Plot]) -> list[html.Section]:
    if not drawn:
        return []
    return [html.Section("training", "Training", f"From {_log_of(evaluation.source)}.", html.plots(drawn))]


def _provenance(evaluation: Evaluation) -> html.Section:
    body = html.table(("", ""), list(_origin(evaluation).items()), sortable=False, text=(0, 1))
    return html.Section("origin", "Origin", "What this report was made from.", body)


def _origin(evaluation: Evaluation) -> dict[str, str]:
    versions = f"lightning-convnext-det {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return {
        "command": " ".join(["convnext-det", *sys.argv[1:]]),
        "results of": evaluation.source,
        "dataset": str(evaluation.annotations.image_root),
        "hash of the annotations": dataset_hash(evaluation.annotations),
        "versions": versions,
    }


def _learning_plots(evaluation: Evaluation) -> dict[str, Plot]:
    """Losses and mAP of the run that wrote the checkpoint, where its log lies beside it."""
    log = _log_of(evaluation.source)
    return {} if log is None else draw_learning_curves(log)


def _log_of(source: str) -> Path | None:
    """The metrics.csv of the run that a checkpoint belongs to."""
    for folder in list(Path(source).resolve().parents)[:2]:
        if (folder / "metrics.csv").is_file():
            return folder / "metrics.csv"
    return None


def _numbers(
    evaluation: Evaluation, analysis: Analysis, split: str, errors: Sequence[ErrorCrop],
    splits: dict[str, DetectionAnnotations], shared: Sequence[SharedImage],
) -> dict[str, Any]:  # fmt: skip
    """Everything that the page shows, for programs."""
    annotations, breakdown = evaluation.annotations, analysis.breakdown
    names = annotations.class_names
    order = np.argsort(-analysis.losses, kind="stable").tolist()
    bins = {name: values.tolist() for name, values in analysis.reliability._asdict().items()}
    return {
        "split": split,
        "origin": _origin(evaluation),
        "metrics": analysis.metrics,
        "intervals": {"confidence": 0.95, "samples": analysis.num_samples, **analysis.intervals},
        "classes": {
            name: {**analysis.thresholds[i]._asdict(), "lrp": analysis.lrp[i], "laece": analysis.class_laece[i]}
            for i, name in enumerate(names)
        },
        "confusion": {"classes": [*names, "background"], "matrix": analysis.confusion.tolist()},
        "errors": {"ap_50": breakdown.ap, "loss": breakdown.loss, "count": breakdown.num_errors},
        "calibration": {"d_ece": analysis.ece, "laece": analysis.laece, "bins": bins},
        "groups": {title: [group._asdict() for group in groups] for title, groups in analysis.groups.items()},
        "worst_images": [
            {
                "file_name": annotations.file_names[i].decode(), "image_id": int(annotations.image_ids[i]),
                "map_lost": float(analysis.losses[i]),
            }
            for i in order[:100]
        ],
        "label_errors": [_as_dict(analysis, one) for one in errors],
        "dataset": {name: take_fingerprint(table).as_dict() for name, table in splits.items()},
        "shared_images": [one._asdict() for one in shared],
        "speed": None if evaluation.speed is None else evaluation.speed._asdict(),
    }  # fmt: skip


def _as_dict(analysis: Analysis, crop: ErrorCrop) -> dict[str, Any]:
    """A likely label error; its box is the one that the detector holds for right, else the annotated one."""
    error = crop.error
    box = analysis.boxes[error.detection] if error.detection >= 0 else analysis.objects.box[error.object]
    return {
        "kind": error.kind,
        "file_name": crop.file_name,
        "image_id": crop.image_id,
        "annotation_id": crop.annotation_id,
        "suspicion": error.suspicion,
        "what": crop.text,
        "box": [round(float(value), 2) for value in box],
    }


def _plain(value: Any) -> Any:
    """The value for JSON: nan becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _file_stem(title: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in title.lower()).strip("_")
