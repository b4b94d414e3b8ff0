"""Weights of the classes in a detector's classification loss, for datasets with rare classes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_convnext_det.errors import ArgumentError


def weight_classes(weights: Sequence[float] | None, num_classes: int) -> Tensor | None:
    """The weights as float32 [C]; None for none.

    Raises:
        ArgumentError: if there is not one for each class, one is not finite, or all are 0.
    """
    if weights is None:
        return None
    if len(weights) != num_classes:
        raise ArgumentError(f"class_weights has {len(weights)} entries, but num_classes is {num_classes}")
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ArgumentError(f"class_weights is {list(weights)}; weights are finite, and one or more are above 0")
    return torch.tensor(weights, dtype=torch.float32)
