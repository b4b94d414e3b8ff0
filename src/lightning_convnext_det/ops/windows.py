"""Windows (tiles) of a large image: where they are, and which boxes they cut."""

from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """A rectangle of an image in whole pixels; right and bottom are the first column and row outside."""

    left: int
    top: int
    right: int
    bottom: int


def tile_windows(height: int, width: int, tile: int, overlap: float) -> list[Window]:
    """Divide an image into windows of one size that overlap and cover it, row by row.

    The windows are as few as the overlap allows and evenly spaced, so neighbours overlap by at least the share asked
    for. Where a side of the image is no longer than a tile, the windows are as long as that side.

    >>> tile_windows(height=100, width=200, tile=100, overlap=0.2)
    [Window(left=0, top=0, right=100, bottom=100), Window(left=50, top=0, right=150, bottom=100), \
Window(left=100, top=0, right=200, bottom=100)]

    Args:
        height: of the image in pixels.
        width: of the image in pixels.
        tile: side of a window in pixels.
        overlap: least share of a window that the next one covers, from 0 to below 1.

    Raises:
        ValueError: if ``tile`` or ``overlap`` is out of range.
    """
    if tile < 1:
        raise ValueError(f"tile is {tile}; a window needs at least 1 pixel")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; give a share from 0 to below 1")
    return [
        Window(left, top, min(left + tile, width), min(top + tile, height))
        for top in _starts(height, tile, overlap)
        for left in _starts(width, tile, overlap)
    ]


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    """First pixels of the windows along one side."""
    if side <= tile:
        return [0]
    stride = max(1, int(tile * (1 - overlap) + 1e-9))  # 0.9 * 10 is below 9 in floating point
    steps = -(-(side - tile) // stride)
    return [round(i * (side - tile) / steps) for i in range(steps + 1)]


def find_cut_sides(boxes: Tensor, windows: Tensor, image_size: Tensor, margin: float) -> Tensor:
    """Tell which sides of boxes lie at a border where their window cuts the image; its own borders cut nothing.

    >>> windows = torch.tensor([[0.0, 0.0, 100.0, 100.0], [80.0, 0.0, 180.0, 100.0]])
    >>> boxes = torch.tensor([[90.0, 0.0, 99.0, 20.0], [80.0, 5.0, 90.0, 100.0]])
    >>> find_cut_sides(boxes, windows, image_size=torch.tensor([180, 100]), margin=2.0)
    tensor([[False, False,  True, False],
            [ True, False, False, False]])

    Args:
        boxes: corners (x1, y1, x2, y2) in pixels of the image, float [N, 4].
        windows: the window that each box was found in, corners in pixels of the image, float [N, 4].
        image_size: width and height of the image, [2].
        margin: how close to the border a side counts, in pixels; detectors do not meet it exactly.

    Returns:
        Left, top, right and bottom of each box, bool [N, 4].
    """
    cut_low = (boxes[:, :2] <= windows[:, :2] + margin) & (windows[:, :2] > 0)
    cut_high = (boxes[:, 2:] >= windows[:, 2:] - margin) & (windows[:, 2:] < image_size)
    return torch.cat([cut_low, cut_high], dim=1)
