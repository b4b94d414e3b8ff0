"""The report at the end of a training, on its validation split, and its curves."""

from pathlib import Path

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.report.create import create_report
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
