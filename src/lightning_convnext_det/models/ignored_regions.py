"""Ignored regions (``iscrowd``): what a detector predicts there is neither an object nor background in training."""

import torch
from torch import Tensor

IGNORED_SHARE = 0.5  # of a box inside a region; COCO's evaluation ignores a detection by the same share at IoU 0.5
_REGIONS = 16  # compared at a time: with the 120,000 anchors of an image some 60 MB


def find_ignored(boxes: Tensor, regions: Tensor) -> Tensor:
    """Tell which boxes lie for at least half of their area in one ignored region.

    >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [8.0, 0.0, 18.0, 10.0], [30.0, 0.0, 40.0, 10.0]])
    >>> find_ignored(boxes, torch.tensor([[0.0, 0.0, 12.0, 20.0]]))
    tensor([ True, False, False])

    Args:
        boxes: corners (x1, y1, x2, y2), float [..., N, 4]; a box without area lies in no region.
        regions: corners in the same frame, float [..., K, 4].

    Returns:
        Bool [..., N].
    """
    if not regions.shape[-2]:
        return torch.zeros(boxes.shape[:-1], dtype=torch.bool, device=boxes.device)
    areas = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
    inside = torch.zeros_like(areas)
    for some in torch.split(regions, _REGIONS, dim=-2):
        low = torch.maximum(boxes[..., :, None, :2], some[..., None, :, :2])
        high = torch.minimum(boxes[..., :, None, 2:], some[..., None, :, 2:])
        inside = torch.maximum(inside, (high - low).clamp(min=0).prod(-1).amax(-1))
    return (inside >= IGNORED_SHARE * areas) & (areas > 0)
