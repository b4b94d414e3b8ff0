"""Callback that turns a wanted length of training into optimizer steps."""

import math
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_convnext_det.arguments import Positive, check_arguments
from lightning_convnext_det.callbacks.pace import steps_between_validations

SETTLE = 3  # first steps, which also load kernels and fill the queue of images, and are not timed
TIMED = 10  # step at which the length is first decided; then at 20, 40 ..., and after each validation
EVALUATION = 0.4  # of the time of a training image, until a validation has been timed


class TimeBudget(Callback):
    """Ends a training after a wanted time, with its schedule finished.

    After ten steps have been timed, the number of steps that fit into the time, validations included, becomes the
    trainer's ``max_steps``; it is corrected as the training goes on. Learning rates of this package's modules follow.
    A ``max_steps`` or ``max_epochs`` of the trainer that comes first ends it earlier; ``max_epochs=-1`` is no limit. A
    resumed training has the time that was left.

    Args:
        seconds: wanted length of the fit.
    """

    def __init__(self, seconds: Positive) -> None:
        check_arguments(TimeBudget.__init__, locals())
        self.seconds = seconds
        self.steps: int | None = None
        self._spent = 0.0  # before a checkpoint that is resumed
        self._start = self._timed_from = 0.0
        self._first = self._next = self._step = 0
        self._validation_start = self._validating = 0.0
        self._validations = 0
        self._most = math.inf  # steps that the trainer was given

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start = self._timed_from = time.monotonic()
        self._validating, self._validations = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the length that a resumed training was given."""
        self._first = self._step = trainer.global_step
        self._next = self._first + TIMED
        self._most = trainer.estimated_stepping_batches
        if self.steps is not None:
            _set_length(trainer, pl_module, self.steps)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Decide the length when enough steps are timed."""
        if trainer.global_step == self._step:  # a batch whose gradients are accumulated
            return
        self._step = trainer.global_step
        done = self._step - self._first
        if done <= SETTLE:
            self._timed_from, self._validating = time.monotonic(), 0.0
        elif trainer.global_step >= self._next:
            self._decide(trainer, pl_module)
            self._next = trainer.global_step + max(TIMED, done)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time validations apart from steps."""
        self._validation_start = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Correct the length by what the validation took."""
        if trainer.sanity_checking:
            return
        self._validating += time.monotonic() - self._validation_start
        self._validations += 1
        self._next = min(self._next, trainer.global_step + 1) if self.steps is not None else self._next

    def _decide(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now, step = time.monotonic(), trainer.global_step
        timed = step - self._first - SETTLE
        per_step = (now - self._timed_from - self._validating) / max(1, timed)
        left = self.seconds - self._spent - (now - self._start)
        every, size = steps_between_validations(trainer)
        each = self._validating / self._validations if self._validations else EVALUATION * size * per_step
        more = max(1, int((left - each) / (per_step + each / every)))
        steps = int(trainer.strategy.broadcast(min(step + more, self._most)))
        if self.steps is None:
            what = "are the trainer's limit, within" if steps == self._most else "take"
            rank_zero_info(f"{per_step:.3g} seconds a step: {steps} steps {what} {self.seconds:g} seconds")
        self.steps = steps
        _set_length(trainer, pl_module, steps)

    def state_dict(self) -> dict[str, Any]:
        """The time spent and the length decided."""
        return {"spent": self._spent + time.monotonic() - self._start, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the time that is left."""
        self._spent, self.steps = float(state_dict["spent"]), state_dict["steps"]


def _set_length(trainer: pl.Trainer, pl_module: pl.LightningModule, steps: int) -> None:
    trainer.fit_loop.epoch_loop.max_steps = steps
    pl_module.total_steps = steps  # type: ignore[assignment]  # of this package's modules, whose schedule reads it
