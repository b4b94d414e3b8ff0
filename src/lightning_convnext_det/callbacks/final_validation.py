"""Callback that validates a training whose last step lies inside an epoch."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class FinalValidation(Callback):
    """Validates after the last step of ``max_steps``, wherever in an epoch it lies.

    Lightning leaves out the part since the last validation; a training below one epoch would end without a metric and
    without a best checkpoint. Nothing is validated twice.
    """

    _every: int | None = None  # the trainer's, while it is replaced

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Ask the trainer to stop, which validates first."""
        if not 0 < trainer.max_steps <= trainer.global_step or not trainer.enable_validation:
            return
        trainer.should_stop = True
        if trainer.check_val_every_n_epoch not in (None, 1):
            self._every, trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch, 1

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the trainer back what it was told."""
        if self._every is not None:
            trainer.check_val_every_n_epoch, self._every = self._every, None
