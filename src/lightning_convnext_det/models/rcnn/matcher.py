"""Matching of boxes with ground truth, in bounded memory, by torchvision's or MMDetection's rules, and sampling.

No shape depends on what is matched or drawn, so that the host does not wait for a GPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
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
    return ChunkedMatcher(OverlapMatcher(*thresholds, allow_low_quality_matches=True))


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
    matcher = OverlapMatcher(*thresholds, allow_low_quality_matches=False)
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

    def __call__(self, pairs: BoxPairs, usable: Tensor | None = None) -> Tensor:
        """Return the index of the object of every box, or a negative number, int64 [N].

        Args:
            pairs: objects and boxes.
            usable: False on boxes that no object may be matched with, bool [N]; None: all may.
        """
        step = max(1, _PAIRS // max(1, len(pairs.objects)))
        boxes = torch.split(pairs.boxes, step)
        masks: Sequence[Tensor | None] = [None] * len(boxes) if usable is None else torch.split(usable, step)
        if len(boxes) == 1:
            matches: Tensor = self.matcher(_overlaps(pairs.objects, boxes[0], masks[0]))
            return matches
        parts = list(zip(boxes, masks, strict=True))
        highest = torch.stack([_overlaps(pairs.objects, *part).amax(1) for part in parts]).amax(0)  # [M]
        # one more column tells each part the best IoU of every object with any box, which decides about weak matches
        found = [self.matcher(torch.cat([_overlaps(pairs.objects, *part), highest[:, None]], 1))[:-1] for part in parts]
        return torch.cat(found)


def _overlaps(objects: Tensor, boxes: Tensor, usable: Tensor | None) -> Tensor:
    """IoU of objects and boxes, -1 for boxes that are not usable, float [M, N]."""
    overlaps: Tensor = box_iou(objects, boxes)
    return overlaps if usable is None else overlaps.masked_fill(~usable, -1.0)


class OverlapMatcher(Matcher):
    """torchvision's matcher without boolean masks, which make the host wait for a GPU; the same matches."""

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        """Match by the IoU of M objects and N boxes, float [M, N], both at least 1.

        Returns:
            The index of each box's object, -1 below the lower threshold and -2 between both, int64 [N].
        """
        overlap, best = match_quality_matrix.max(dim=0)
        weak = torch.where(overlap < self.low_threshold, self.BELOW_LOW_THRESHOLD, self.BETWEEN_THRESHOLDS)
        matches = torch.where(overlap < self.high_threshold, weak, best)
        if self.allow_low_quality_matches:
            self.set_low_quality_matches_(matches, best, match_quality_matrix)
        return matches

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Match boxes that some object overlaps most with the object that they overlap most; ``matches`` changes."""
        highest = match_quality_matrix.max(dim=1, keepdim=True).values
        matches.copy_(torch.where((match_quality_matrix == highest).any(dim=0), all_matches, matches))


class BestOverlapMatcher(OverlapMatcher):
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
        matches.copy_(torch.where(last > 0, last - 1, matches))


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


def take_objects(targets: Sequence[Target], matches: Tensor, valid: Tensor) -> Tensor:
    """Return the boxes of the objects that others are matched with, zeros where these are not valid.

    Args:
        targets: the objects of each image.
        matches: index of an object of the image, int64 [B, K].
        valid: which of them count, bool [B, K].

    Returns:
        Float [B, K, 4].
    """
    boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)  # [B, M, 4]
    boxes = F.pad(boxes, (0, 0, 0, 1))  # the last is nobody's
    index = torch.where(valid, matches, boxes.shape[1] - 1)
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


class Drawn(NamedTuple):
    """The boxes that are drawn for a loss, by their index; rows beyond their number are any boxes."""

    objects: Tensor
    """Boxes with an object, int64 [B, P]; P is the most that an image can have."""
    has_object: Tensor
    """Which of these are drawn, bool [B, P]; the first ones."""
    background: Tensor
    """Boxes of background, int64 [B, N]."""
    is_background: Tensor
    """Which of these are drawn, bool [B, N]; the first ones."""

    @property
    def rows(self) -> Tensor:
        """Both as one list, int64 [B, P + N]."""
        return torch.cat((self.objects, self.background), dim=1)

    @property
    def used(self) -> Tensor:
        """Which rows of it are drawn, bool [B, P + N]."""
        return torch.cat((self.has_object, self.is_background), dim=1)


def draw_samples(labels: Tensor, sampling: Sampling) -> Drawn:
    """Draw boxes at random for a loss, of all images at once: objects up to their share, the rest background.

    As many of each as torchvision's ``BalancedPositiveNegativeSampler`` draws, and each set of them as likely: the
    boxes with the largest of random numbers. The host does not know how many there are.

    >>> labels = torch.tensor([[2, 0, -1, 0, 0], [0, -1, -1, -1, -1]])
    >>> drawn = draw_samples(labels, Sampling(0.5, 0.5, 3, 0.5))
    >>> drawn.has_object.sum(1), drawn.is_background.sum(1)
    (tensor([1, 0]), tensor([2, 1]))

    Args:
        labels: above 0 for an object, 0 for background, below 0 for neither, [B, A].
        sampling: how many to draw, and the share of objects.
    """
    size, quota = sampling.batch_size_per_image, int(sampling.batch_size_per_image * sampling.positive_fraction)
    keys = torch.rand(labels.shape, device=labels.device)
    objects = keys.masked_fill(labels <= 0, -1.0).topk(min(quota, labels.shape[1]), dim=1)
    background = keys.masked_fill(labels != 0, -1.0).topk(min(size, labels.shape[1]), dim=1)
    has_object = objects.values >= 0
    left = size - has_object.sum(dim=1, keepdim=True)
    places = torch.arange(background.values.shape[1], device=labels.device)
    return Drawn(objects.indices, has_object, background.indices, (background.values >= 0) & (places < left))


def count_samples(drawn: Drawn, least: int) -> Tensor:
    """Count what a loss is divided by: objects and background, ``least`` of each per image, as MMDetection's 1."""
    counts = torch.cat([part.sum(dim=1) for part in (drawn.has_object, drawn.is_background)])
    return counts.clamp(min=least).sum().clamp(min=1)
