"""Functions of timm and torch in forms that ``torch.export`` can record with free height and width.

Swin Transformers roll their maps and cut them into windows; with free sizes ``torch.roll`` asks whether the map is
empty, and timm's `window_reverse` leaves the batch to be inferred. Both are exchanged while a graph is recorded.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor


@contextmanager
def recordable_backbones() -> Iterator[None]:
    """Exchange what cannot be recorded for a while."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "roll", roll))
        for module in (swin_transformer, swin_transformer_v2):
            stack.enter_context(patch.object(module, "window_reverse", window_reverse))
        yield


def roll(x: Tensor, shifts: int | Sequence[int], dims: int | Sequence[int]) -> Tensor:
    """Do what ``torch.roll`` does, without asking for the length of an axis.

    >>> roll(torch.arange(5), 2, 0).tolist(), roll(torch.arange(5), -1, 0).tolist()
    ([3, 4, 0, 1, 2], [1, 2, 3, 4, 0])
    """
    shifts = [shifts] if isinstance(shifts, int) else shifts
    dims = [dims] if isinstance(dims, int) else dims
    for shift, dim in zip(shifts, dims, strict=True):
        start = (slice(None),) * (dim % x.dim())
        x = torch.cat([x[(*start, slice(-shift, None))], x[(*start, slice(None, -shift))]], dim) if shift else x
    return x


def window_reverse(windows: Tensor, window_size: tuple[int, int], *size: int | tuple[int, int]) -> Tensor:
    """Join windows [B * N, h, w, C] to maps [B, H, W, C] as timm does, with the batch as a number.

    >>> windows = torch.arange(16.0).view(4, 2, 2, 1)
    >>> torch.equal(window_reverse(windows, (2, 2), 4, 4), swin_transformer.window_reverse(windows, (2, 2), 4, 4))
    True
    """
    height, width = size if len(size) == 2 else size[0]  # type: ignore[misc]  # Swin V2 has them in one
    rows, columns = height // window_size[0], width // window_size[1]  # type: ignore[operator]
    x = windows.view(windows.shape[0] // (rows * columns), rows, columns, *window_size, windows.shape[-1])
    joined = x.permute(0, 1, 3, 2, 4, 5).contiguous()
    return joined.view(joined.shape[0], rows * window_size[0], columns * window_size[1], windows.shape[-1])
