"""The pace of a fit: seconds of its steps and validations, and how long the rest will take."""

import math
from time import monotonic

import lightning.pytorch as pl

WARM_UP = 2  # first steps, which load kernels and fill the queue of images, and are not timed


class Pace:
    """Times the steps and the validations of a fit.

    What lies between two steps and is no validation, such as waiting for images, belongs to the steps. Before the
    first validation, its time is estimated from the batches of the sanity check, the first of which warms up.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Start the clock of the whole fit."""
        self.started = self._mark = monotonic()
        self._timed = self._validating = self._validation_start = self._batch_start = 0.0
        self._steps, self._step = -WARM_UP, -1
        self._validations: list[float] = []
        self._sanity: list[float] = []

    @property
    def elapsed(self) -> float:
        """Seconds since the fit began."""
        return monotonic() - self.started

    def train_started(self, step: int) -> None:
        """Begin to time steps."""
        self._mark, self._step, self._validating = monotonic(), step, 0.0

    def step_ended(self, step: int) -> None:
        """Note the time of a step of the optimizer; batches that only accumulate gradients belong to the next one."""
        if step == self._step:
            return
        now = monotonic()
        self._steps += 1
        if self._steps > 0:
            self._timed += now - self._mark - self._validating
        self._mark, self._step, self._validating = now, step, 0.0

    def validation_started(self) -> None:
        """Begin to time a validation."""
        self._validation_start = monotonic()

    def validation_ended(self) -> None:
        """Note the time of a validation."""
        self._validations.append(monotonic() - self._validation_start)
        self._validating += self._validations[-1]

    def sanity_batch_started(self) -> None:
        """Begin to time a batch of the sanity check."""
        self._batch_start = monotonic()

    def sanity_batch_ended(self) -> None:
        """Note the time of a batch of the sanity check."""
        self._sanity.append(monotonic() - self._batch_start)

    @property
    def timed_steps(self) -> int:
        """How many steps have been timed."""
        return max(0, self._steps)

    @property
    def seconds_per_step(self) -> float:
        """Mean of the timed steps; nan before there is one."""
        return self._timed / self._steps if self._steps > 0 else math.nan

    def seconds_per_validation(self, trainer: pl.Trainer) -> float:
        """Mean of the validations, or its estimate; 0 where nothing is known of them."""
        if self._validations:
            return sum(self._validations) / len(self._validations)
        timed = self._sanity[1:]
        batches = float(sum(trainer.num_val_batches or [0]))
        return sum(timed) / len(timed) * batches if timed and math.isfinite(batches) else 0.0

    def seconds_to_go(self, trainer: pl.Trainer) -> float:
        """Seconds until the last step and the last validation; infinite where the length is not known."""
        left = float(trainer.estimated_stepping_batches) - trainer.global_step
        return left * self.seconds_per_step + validations_left(trainer) * self.seconds_per_validation(trainer)


def validations_left(trainer: pl.Trainer) -> int:
    """How many validations are still to come; one follows the last step, wherever it lies (`FinalValidation`)."""
    total = float(trainer.estimated_stepping_batches)
    every, _ = steps_between_validations(trainer)
    if not math.isfinite(every) or not math.isfinite(total):
        return 0
    return max(0, math.ceil(total / every - 1e-9) - math.floor(trainer.global_step / every + 1e-9))


def steps_between_validations(trainer: pl.Trainer) -> tuple[float, float]:
    """Optimizer steps from one validation to the next, and how many steps have as many images as a validation."""
    accumulated = trainer.accumulate_grad_batches
    if not trainer.enable_validation:
        return math.inf, 0.0
    batches = float(sum(trainer.num_val_batches or [0]))
    epoch = float(trainer.num_training_batches)
    every = float(trainer.val_check_batch or epoch)
    if trainer.check_val_every_n_epoch is not None and every >= epoch:
        every = epoch * trainer.check_val_every_n_epoch
    return max(1.0, every / accumulated), batches / accumulated
