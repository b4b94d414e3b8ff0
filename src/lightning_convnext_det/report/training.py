"""What a training shows at its end: its metrics, its curves, its files, and the report if it is asked for."""

import math
import os
from pathlib import Path

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.report.create import create_report
from lightning_convnext_det.report.curves import read_learning_curves, write_learning_curves
from lightning_convnext_det.report.evaluation import evaluate_checkpoint
from lightning_convnext_det.report.plots import check_matplotlib


def check_report(data: LightningDataModule) -> None:
    """Refuse before the training what would fail after it.

    Raises:
        ArgumentError: if matplotlib is missing, or the data are not a detection dataset in a folder that validates.
    """
    check_matplotlib()
    if not isinstance(data, DetectionDataModule) or data.owns_datasets:
        raise ArgumentError("--report needs a DetectionDataModule with data.root, not datasets of your own")
    if not data.validates:
        raise ArgumentError("--report needs a validation split; set data.val or data.val_fraction")


def report_training(trainer: Trainer, data: DetectionDataModule) -> Path | None:
    """Write the report of the best checkpoint beside the logs; None where there is no checkpoint.

    On several ranks the report is left to the command, which runs on one.
    """
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not best:
        return None
    if trainer.world_size > 1:
        rank_zero_info(f"--report works on one device; now run: convnext-det report {best} --data.root DIR")
        return None
    device = str(trainer.strategy.root_device)
    output = Path(trainer.log_dir or trainer.default_root_dir) / "report.html"
    written = create_report(evaluate_checkpoint(best, data, "val", device), data, "val", output)
    rank_zero_info(f"the report is '{written.page}'")
    return written.page


@rank_zero_only
def show_results(trainer: Trainer) -> None:
    """Print the metrics of the best and of the last validation and where everything lies; draw ``metrics.csv``.

    ``learning_curves.png`` is written beside it where matplotlib is installed.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    log = folder / "metrics.csv"
    lines: list[str] = []
    if log.is_file():
        write_learning_curves(log, folder / "learning_curves.png")
        lines += metric_table(log, getattr(trainer.checkpoint_callback, "monitor", None))
    checkpoints = {
        "best checkpoint": getattr(trainer.checkpoint_callback, "best_model_path", ""),
        "last checkpoint": getattr(trainer.checkpoint_callback, "last_model_path", ""),
    }
    places = {name: path for name, path in checkpoints.items() if path}
    places |= {name: str(folder / file) for name, file in _FILES.items() if (folder / file).is_file()}
    lines += [f"{name:<20} {os.path.relpath(path)}" for name, path in places.items()]
    rank_zero_info("\n".join(lines))


_FILES = {
    "metrics": "metrics.csv",
    "learning curves": "learning_curves.png",
    "AP of each class": "val_per_class.csv",
    "training images": "training_images.jpg",
    "validation images": "validation_images.jpg",
    "configuration": "config.yaml",
}


def metric_table(log: Path, monitor: str | None) -> list[str]:
    """The validation metrics of a ``metrics.csv``: those of the epoch with the highest monitored one, and the last."""
    curves = {name: curve for name, curve in read_learning_curves(log).items() if name.startswith("val/")}
    if not curves:
        return []
    judged = curves.get(monitor or "", next(iter(curves.values())))
    finite = [(value, -epoch) for epoch, value in zip(*judged, strict=True) if not math.isnan(value)]
    best = -max(finite)[1] if finite else judged[0][-1]
    lines = [f"{'':<20} {'best':>8} {'last':>8}", f"{'epoch':<20} {best:>8.0f} {judged[0][-1]:>8.0f}"]
    for name, (epochs, values) in curves.items():
        at_best = dict(zip(epochs, values, strict=True)).get(best, math.nan)
        lines.append(f"{name:<20} {at_best:>8.3f} {values[-1]:>8.3f}")
    return lines
