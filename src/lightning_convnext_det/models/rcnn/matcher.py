"""Matching of boxes with ground truth: in bounded memory, by torchvision's or MMDetection's rules."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from lightning_convnext_det.models.ignored_regions import find_ignored
from lightning_convnext_det.models.rcnn.conventions import Convention
from lightning_convnext_det.types import Target

_PAIRS = 2**24  # of objects and boxes compared at a time: about half a gigabyte for what box_iou holds meanwhile
_MIN_ANCHOR_IOU = 0.3  # MMDetection: below, the best anchor of an object is left as it is (train_cfg.rpn.assigner)


class Sampling(NamedTuple):
    """How boxes are matched with ground truth, and drawn for a loss."""

    fg_iou_threshold: float
    """IoU from which a box stands for an object."""
    bg_iou_threshold: float
    """IoU below which it stands for background."""
    batch_size_per_image: int
    """How many boxes are drawn."""
    positive_fraction: float
    """Largest share of objects among them."""


def create_anchor_matcher(sampling: Sampling, convention: Convention) -> "ChunkedMatcher":
    """Build the matcher of anchors, of which there are too many for one matrix."""
    thresholds = sampling.fg_iou_threshold, sampling.bg_iou_threshold
    if convention.matching == "mmdetection":
        return ChunkedMatcher(BestOverlapMatcher(*thresholds, _MIN_ANCHOR_IOU))
    return ChunkedMatcher(Matcher(*thresholds, allow_low_quality_matches=True))


def create_proposal_matcher(
    sampling: Sampling, convention: Convention, match_best: bool
) -> "Matcher | GroundTruthMatcher":
    """Build the matcher of proposals that the boxes of the ground truth have been appended to.

    Args:
        sampling: the thresholds.
        convention: torchvision matches the appended boxes as any other, MMDetection each with itself.
        match_best: with MMDetection's matching, also match each object's best proposal if it reaches the threshold.
    """
    thresholds = sampling.fg_iou_threshold, sampling.bg_iou_threshold
    matcher = Matcher(*thresholds, allow_low_quality_matches=False)
    if convention.matching == "torchvision":
        return matcher
    return GroundTruthMatcher(BestOverlapMatcher(*thresholds, thresholds[0]) if match_best else matcher)


class BoxPairs(NamedTuple):
    """Objects and the boxes to compare them with, in place of the matrix of their IoU."""

    objects: Tensor
    """Corners, float [M, 4]."""
    boxes: Tensor
    """Corners, float [N, 4]."""


class ChunkedMatcher:
    """Matches a part of the boxes at a time, where the IoU of all would take too much memory.

    A thousand objects and the 120,000 anchors of an image take torchvision 4.2 GB. The result is the same.

    Args:
        matcher: torchvision's or `BestOverlapMatcher`.
    """

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.BELOW_LOW_THRESHOLD, self.BETWEEN_THRESHOLDS = matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS

    def __call__(self, pairs: BoxPairs) -> Tensor:
        """Return the index of the object of every box, or a negative number, int64 [N]."""
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
    """Matches every object also with the boxes that overlap it most.

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


class GroundTruthMatcher:
    """Matches the ground truth's own boxes with themselves, and the others as if those were not there.

    Args:
        matcher: for the other boxes.
    """

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.BELOW_LOW_THRESHOLD, self.BETWEEN_THRESHOLDS = matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        """Match by the IoU of M objects and N boxes, the last M of which are the objects' own, float [M, N]."""
        count = len(match_quality_matrix)
        own = torch.arange(count, device=match_quality_matrix.device)
        others = match_quality_matrix[:, : match_quality_matrix.shape[1] - count]
        return torch.cat((self.matcher(others), own)) if others.shape[1] else own


def leave_out_ignored(labels: Tensor, boxes: Tensor, target: Target | dict[str, Tensor]) -> Tensor:
    """Turn the label of background (0) into that of no sample (-1) for boxes in an image's ignored regions, [N]."""
    if "ignored" not in target:
        return labels
    return labels.masked_fill((labels == 0) & find_ignored(boxes, target["ignored"]), -1)


def count_samples(positive: Sequence[Tensor], negative: Sequence[Tensor], least: int) -> int:
    """Count what a loss is divided by: objects and background, ``least`` of each per image, as MMDetection's 1."""
    return sum(max(int(part.sum()), least) for part in (*positive, *negative))
