"""Dropout whose masks take a fifth of the time on CPUs.

torch (2.14) draws a float64 for each element there; 16 random bits say as much, so the probability is rounded to
65536ths and the factor of what is kept follows, which leaves the mean as it was. They come from numpy's SFC64, seeded
by torch's generator: the same seed gives the same masks, and a training that is continued goes on with the masks that
would have followed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_convnext_det.ops.tracing import is_recording

_VALUES = 1 << 16
_BLOCK = 1 << 17  # elements: a block and its mask stay in the processor's cache


class Dropout(nn.Dropout):
    """Drop-in ``nn.Dropout``: in training it zeroes elements at random and scales the others up.

    Takes and gives any shape. Accelerators, compilers, exporters and torch.func see ``nn.Dropout``.

    >>> import torch
    >>> dropout = Dropout(0.25)
    >>> dropout(torch.ones(1000, 1000)).unique()
    tensor([0.0000, 1.3333])
    >>> dropout.eval()(torch.ones(2))
    tensor([1., 1.])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of a float tensor."""
        if not _is_fast(input, self.p, self.training) or self.inplace:
            return super().forward(input)
        dropped: Tensor = _Dropout.apply(input, self.p)
        return dropped


def relu_dropout(x: Tensor, dropout: nn.Dropout) -> Tensor:
    """Compute ``dropout(relu(x))`` in place: nothing but the result is kept for the backward pass.

    >>> relu_dropout(torch.tensor([-1.0, 2.0]), Dropout(0.5).eval())
    tensor([0., 2.])

    Args:
        x: float of any shape, which is overwritten; the output of a layer that does not need it again, such as a linear
            one.
        dropout: its probability and mode.
    """
    if not (_is_fast(x, dropout.p, dropout.training) and x.is_contiguous()):
        dropped: Tensor = dropout(F.relu(x, inplace=True))
        return dropped
    dropped = _ReluDropout.apply(x, dropout.p)
    return dropped


def _is_fast(x: Tensor, probability: float, training: bool) -> bool:
    if not training or torch.compiler.is_compiling() or is_recording():
        return False
    if torch._C._are_functorch_transforms_active():  # torch.func: vmap's rules of randomness are torch's to keep
        return False
    return x.device.type == "cpu" and x.numel() > 0 and 0 < _dropped_values(probability) < _VALUES


def _dropped_values(probability: float) -> int:
    """How many of the values of 16 bits mean that an element is dropped."""
    return round(probability * _VALUES)


def _draw_masks(length: int, probability: float) -> Iterator[Tensor]:
    """Yield the mask of each block of a tensor, True where an element is dropped."""
    seed = int(torch.empty((), dtype=torch.int64).random_())
    source, highest = np.random.SFC64(seed), _dropped_values(probability) - _VALUES // 2
    for start in range(0, length, _BLOCK):
        count = min(_BLOCK, length - start)
        bits = torch.from_numpy(source.random_raw(-(-count // 4)).view(np.int16))
        yield bits[:count] < highest


class _Dropout(torch.autograd.Function):
    """Dropout that keeps a mask of one byte an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        mask = torch.cat(list(_draw_masks(x.numel(), probability))).view(x.shape)
        ctx.save_for_backward(mask)
        ctx.scale = _VALUES / (_VALUES - _dropped_values(probability))
        return x.masked_fill(mask, 0.0).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient.masked_fill(mask, 0.0).mul_(ctx.scale), None


class _ReluDropout(torch.autograd.Function):
    """ReLU and dropout, whose result tells where both let a gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        ctx.scale = _VALUES / (_VALUES - _dropped_values(probability))
        elements = x.view(-1)
        for number, mask in enumerate(_draw_masks(x.numel(), probability)):
            part = elements[number * _BLOCK : (number + 1) * _BLOCK]
            part.relu_().masked_fill_(mask, 0.0).mul_(ctx.scale)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        passed: Tensor = torch.ops.aten.threshold_backward(gradient, result, 0)
        return passed.mul_(ctx.scale), None
