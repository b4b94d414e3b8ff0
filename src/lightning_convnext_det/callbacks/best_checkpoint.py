"""Callback that keeps the best and the last checkpoint of a training."""

import difflib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_convnext_det.errors import ArgumentError

_logger = logging.getLogger(__name__)
_KNOWN = ("lightning", __name__.partition(".")[0])  # packages whose modules and callbacks log nothing of their own


class BestCheckpoint(ModelCheckpoint):
    """Keep the best and the last checkpoint: ModelCheckpoint that survives interruptions and undefined metrics.

    Takes ModelCheckpoint's arguments.

    >>> from tempfile import mkdtemp
    >>> best = BestCheckpoint(mkdtemp(), filename="best", monitor="val/map", mode="max", save_last=True)
    >>> trainer = pl.Trainer(callbacks=[best], logger=False, accelerator="cpu")

    An undefined metric (nan) never counts as the best. With ``save_last`` the last checkpoint is that of the last
    epoch; of Lightning 2.6 it is that of the last epoch that was among the best. A training that is resumed in another
    folder takes the best checkpoints of the first one along. A ``monitor`` that is never logged is refused at the
    start.
    """

    _earlier: dict[str, Any] | None = None  # the state of the training that is resumed, from another folder

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Tell whether a value of the metric is among the best; nan never is."""
        if current is not None and bool(torch.isnan(current)):
            return False
        return super().check_monitor_top_k(trainer, current)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the monitored metric, and copy the best checkpoints of a training resumed from another folder.

        Raises:
            ValueError: if nothing can log the metric: module and callbacks are Lightning's and this package's.
        """
        known = getattr(pl_module, "metric_names", None)
        if self.monitor is not None and known is not None and not _may_log_more(trainer, pl_module):
            _check_monitor(self.monitor, known)
        earlier, self._earlier = self._earlier, None
        if earlier is not None:
            copies = _copy(earlier["best_k_models"], Path(str(self.dirpath))) if trainer.is_global_zero else {}
            self._take_along(trainer.strategy.broadcast(copies))

    def _take_along(self, models: dict[str, Tensor]) -> None:
        if not models:
            return
        self.best_k_models = models
        worst, best = (max, min) if self.mode == "min" else (min, max)
        self.kth_best_model_path = worst(models, key=lambda path: float(models[path]))
        self.kth_value = models[self.kth_best_model_path]
        self.best_model_path = best(models, key=lambda path: float(models[path]))
        self.best_model_score = models[self.best_model_path]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the best and the last checkpoint where there is no validation."""
        super().on_train_epoch_end(trainer, pl_module)
        self._save_last(trainer, at_train_epoch_end=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the best and the last checkpoint."""
        super().on_validation_end(trainer, pl_module)
        self._save_last(trainer, at_train_epoch_end=False)

    def _save_last(self, trainer: pl.Trainer, at_train_epoch_end: bool) -> None:
        due = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if not due or self.save_last is not True or self._should_skip_saving_checkpoint(trainer):
            return
        if self._should_save_on_train_epoch_end(trainer) == at_train_epoch_end:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a training in the same folder; the state of another waits until the fit begins."""
        if state_dict.get("dirpath") == self.dirpath:
            super().load_state_dict(state_dict)
        else:
            self._earlier = state_dict


def _may_log_more(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Tell whether code of the user may log metrics of its own."""
    parts = (pl_module, *getattr(trainer, "callbacks", []))
    return not all(type(part).__module__.partition(".")[0] in _KNOWN for part in parts)


def _check_monitor(monitor: str, known: list[str]) -> None:
    if monitor not in known and not monitor.startswith("train/"):
        close = difflib.get_close_matches(monitor, known, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"logged are {', '.join(known[:12])} and train/..."
        raise ArgumentError(f"[LCD-C020] nothing logs '{monitor}', by which the best checkpoint is chosen; {hint}")


def _copy(models: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Copy checkpoints into a folder, each complete or not at all; return the copies with their scores."""
    copies = {}
    for name, score in models.items():
        source, target = Path(name), folder / Path(name).name
        if not source.is_file():
            _logger.warning("the earlier best checkpoint %s is gone; it is not taken along", source)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.copy.tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
        copies[str(target)] = score
    return copies
