"""MMDetection's rules of which box stands for which object, where they differ from torchvision's."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from lightning_convnext_det.models.dialects import Matching


class OwnMatcher(Matcher):
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
    """Count what a loss is divided by; MMDetection counts at least one object and one background per picture."""
    least = 1 if matching == "mmdetection" else 0
    return sum(max(int(part.sum()), least) for part in (*positive, *negative))
