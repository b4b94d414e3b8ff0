"""Callback that validates a training after its last step, wherever that lies."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class FinalValidation(Callback):
    """Validates after the last step of ``max_steps`` or ``max_epochs``, whatever the interval of validations is.

    Lightning leaves out the part since the last validation; a training below one interval would end without a metric
    and without a best checkpoint. Nothing is validated twice.
    """

    _every: int | None = None  # the trainer's, while it is replaced

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Ask the trainer to stop, which validates first."""
        if not _is_last_step(trainer) or not trainer.enable_validation:
            return
        trainer.should_stop = True
        if trainer.check_val_every_n_epoch not in (None, 1):
            self._every, trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch, 1

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the trainer back what it was told."""
        if self._every is not None:
            trainer.check_val_every_n_epoch, self._every = self._every, None


def _is_last_step(trainer: pl.Trainer) -> bool:
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    return trainer.is_last_batch and 0 < (trainer.max_epochs or 0) <= trainer.current_epoch + 1
