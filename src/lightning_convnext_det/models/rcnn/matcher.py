"""Which box stands for which object: in bounded memory, and by MMDetection's rules where they differ."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from lightning_convnext_det.models.rcnn.conventions import Matching

_PAIRS = 2**24  # of objects and boxes compared at a time: about half a gigabyte for what box_iou holds meanwhile


class BoxPairs(NamedTuple):
    """Objects and the boxes that they are to be compared with, in place of the matrix of their IoU."""

    objects: Tensor
    """Corners, float [M, 4]."""
    boxes: Tensor
    """Corners, float [N, 4]."""


class ChunkedMatcher:
    """Calls a matcher with the IoU of objects and boxes, part by part where the whole would take too much memory.

    A thousand objects and the 120,000 anchors of an image take torchvision 4.2 GB. The result is the same.

    Args:
        matcher: torchvision's or `BestOverlapMatcher`.
    """

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.BELOW_LOW_THRESHOLD, self.BETWEEN_THRESHOLDS = matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS

    def __call__(self, pairs: BoxPairs) -> Tensor:
        """Give the object of every box, or a negative number, int64 [N]."""
        step = max(1, _PAIRS // max(1, len(pairs.objects)))
        if len(pairs.boxes) <= step:
            matches: Tensor = self.matcher(box_iou(*pairs))
            return matches
        parts = torch.split(pairs.boxes, step)
        highest = torch.stack([box_iou(pairs.objects, part).amax(1) for part in parts]).amax(0)  # [M]
        # one more column tells each part the best IoU of every object with any box, which decides about weak matches
        found = [self.matcher(torch.cat([box_iou(pairs.objects, part), highest[:, None]], 1))[:-1] for part in parts]
        return torch.cat(found)


class BestOverlapMatcher(Matcher):
    """Also gives every object the boxes that overlap it most.

    torchvision gives such a box to the object that it overlaps most itself, however little; MMDetection
    (``MaxIoUAssigner`` with ``match_low_quality``) to the object that has no better one, if the overlap reaches a
    minimum.

    Args:
        fg_iou_threshold: IoU from which a box stands for an object.
        bg_iou_threshold: IoU below which it stands for background.
        min_iou: least IoU of an object's best box.
    """

    def __init__(self, fg_iou_threshold: float, bg_iou_threshold: float, min_iou: float) -> None:
        super().__init__(fg_iou_threshold, bg_iou_threshold, allow_low_quality_matches=True)
        self.min_iou = min_iou

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Change ``matches`` [N] in place by the IoU of objects and boxes [M, N]; of several objects the last wins."""
        highest = match_quality_matrix.max(dim=1, keepdim=True).values
        own = (match_quality_matrix == highest) & (highest >= self.min_iou)  # [M, N]
        order = torch.arange(1, len(own) + 1, device=own.device)[:, None]
        last = (own * order).max(dim=0).values  # 0 where no object claims the box
        matches[:] = torch.where(last > 0, last - 1, matches)


def count_samples(positive: Sequence[Tensor], negative: Sequence[Tensor], matching: Matching) -> int:
    """Count what a loss is divided by; MMDetection counts at least one object and one background per image."""
    least = 1 if matching == "mmdetection" else 0
    return sum(max(int(part.sum()), least) for part in (*positive, *negative))
