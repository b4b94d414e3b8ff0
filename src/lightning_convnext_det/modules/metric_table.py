"""A table of each class's AP in the folder of a run."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl


def write_per_class(module: pl.LightningModule, stage: str, values: Mapping[str, float]) -> None:
    """Append the AP of each class to ``<stage>_per_class.csv`` in the folder of the run; collective.

    The folder is that of the logs, else the trainer's ``default_root_dir``, if one was given; ``fast_dev_run`` and
    remote folders have none.

    Args:
        module: attached to a trainer.
        stage: ``val`` or ``test``.
        values: AP by class name.
    """
    trainer = module.trainer
    folder = trainer.log_dir  # asked on all ranks, which agree on it
    if not trainer.loggers and os.path.realpath(trainer.default_root_dir) == os.path.realpath(os.getcwd()):
        folder = None  # Lightning's default
    if folder is None or "://" in folder or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return
    path = Path(folder, f"{stage}_per_class.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    begins = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerows([("epoch", "step", "class", "map")] * begins)
        table.writerows((module.current_epoch, module.global_step, *row) for row in values.items())
