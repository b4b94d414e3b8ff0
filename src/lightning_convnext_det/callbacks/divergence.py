"""Detect divergence: losses and weights that are not finite (nan or inf)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_convnext_det.errors import DivergenceError

REMEDY = "lower the learning rate, clip gradients, or train in bf16 or float32"


class _Step(NamedTuple):
    epoch: int
    step: int
    losses: dict[str, Tensor]
    images: list[str]
    reason: str | None
    """What the network itself has reported."""


class LossWatch:
    """Watches the losses for nan and inf, and reads those of several steps from the device at once.

    Args:
        patience: how many steps in a row may have a loss that is not finite; more than 0 for fp16, whose gradient
            scaler leaves out such steps to find its scale.
    """

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience
        self._steps: list[_Step] = []
        self._bad_in_a_row = 0

    def add(
        self,
        losses: Mapping[str, Tensor],
        images: Sequence[str],
        epoch: int,
        step: int,
        reason: str | None = None,
    ) -> None:
        """Add the losses of a step, without reading them.

        Args:
            losses: scalars by name.
            images: names of the step's images.
            epoch: counts from 0.
            step: of the optimizer, counts from 0.
            reason: why the losses are known not to be finite.
        """
        self._steps.append(_Step(epoch, step, {k: v.detach() for k, v in losses.items()}, list(images), reason))

    def read(self, rank: int = 0) -> str | None:
        """Read the losses added since the last time; return a line about the first that is not finite, or None.

        Args:
            rank: this rank, for the line.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return None
        values = torch.cat([torch.stack([x.float().reshape(()) for x in s.losses.values()]) for s in steps]).tolist()
        for step in steps:
            own, values = values[: len(step.losses)], values[len(step.losses) :]
            named = dict(zip(step.losses, own, strict=True))
            bad = [f"{name} is {value}" for name, value in named.items() if not abs(value) < float("inf")]
            self._bad_in_a_row = self._bad_in_a_row + 1 if bad else 0
            if self._bad_in_a_row > self.patience:
                what = step.reason.removeprefix("[LCD-N001] ").partition(";")[0] if step.reason else ", ".join(bad)
                where = f"epoch {step.epoch}, step {step.step}, rank {rank}"
                return f"[LCD-N001] {what} at {where}, images {', '.join(step.images)}"
        return None


def find_non_finite(state: Mapping[str, object]) -> str | None:
    """Return the name of the first tensor of a state dict with a nan or inf; None if all are finite."""
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point() and v.numel()}
    if not tensors:
        return None
    finite = torch.stack([value.isfinite().all() for value in tensors.values()]).tolist()
    return next((name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite), None)


def check_weights(state: Mapping[str, object], when: str) -> None:
    """Raise an error if a weight is not finite.

    Args:
        state: of a module.
        when: what is about to be done with them, for the message.

    Raises:
        DivergenceError: if a weight is not finite.
    """
    name = find_non_finite(state)
    if name is not None:
        raise DivergenceError(f"[LCD-N002] {when}: weight '{name}' is not finite; {REMEDY}")
