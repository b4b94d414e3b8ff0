"""Region proposal network (Faster R-CNN, arXiv:1506.01497, section 3), derived from torchvision's."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import clip_boxes_to_image

from lightning_convnext_det.models.rcnn.anchors import create_anchors
from lightning_convnext_det.models.rcnn.box_coder import create_box_coder
from lightning_convnext_det.models.rcnn.box_losses import create_delta_loss
from lightning_convnext_det.models.rcnn.conventions import Convention
from lightning_convnext_det.models.rcnn.matcher import BoxPairs, Sampling, count_samples, create_anchor_matcher
from lightning_convnext_det.ops.nms import grouped_nms
from lightning_convnext_det.types import Target

_DIVISOR = 32  # images are padded to a multiple of this
# torchvision's names of the losses, and the names that all detectors here use
_LOSSES = {"loss_objectness": "loss_objectness", "loss_rpn_box_reg": "loss_rpn_box"}


class ProposalLimits(NamedTuple):
    """Which proposals are kept."""

    pre_nms_top_n: tuple[int, int]
    """How many per level before NMS, in training and in evaluation."""
    post_nms_top_n: tuple[int, int]
    """How many per image after NMS, in training and in evaluation."""
    nms_threshold: float
    """IoU above which the weaker of two is dropped."""
    score_threshold: float
    """Proposals below this objectness are dropped."""


class ProposalNetwork(RegionProposalNetwork):
    """Region proposal network: feature maps in, boxes that may hold an object out.

    Args:
        strides: strides of the feature maps but for the pooled one on top.
        channels: channels of the feature maps.
        anchor_sizes: side lengths of the anchors in pixels, one group for each feature map.
        aspect_ratios: height over width of the anchors.
        convention: torchvision's or MMDetection's details.
        sampling: which anchors train.
        limits: which proposals are kept.
    """

    def __init__(
        self,
        strides: Sequence[int],
        channels: int,
        anchor_sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float],
        convention: Convention,
        sampling: Sampling,
        limits: ProposalLimits,
    ) -> None:
        anchors = create_anchors(strides, anchor_sizes, aspect_ratios, convention)
        super().__init__(
            anchors,
            FloatRPNHead(channels, anchors.num_anchors_per_location()[0]),
            *sampling,
            dict(zip(("training", "testing"), limits.pre_nms_top_n, strict=True)),
            dict(zip(("training", "testing"), limits.post_nms_top_n, strict=True)),
            limits.nms_threshold,
            limits.score_threshold,
        )
        self.box_coder = create_box_coder((1.0, 1.0, 1.0, 1.0), convention.box_coding)
        self.box_loss = create_delta_loss(convention.rpn_box_loss)
        self.box_similarity, self.proposal_matcher = BoxPairs, create_anchor_matcher(sampling, convention)
        self.usable_anchors = _choose_usable_anchors(convention)
        self.least_samples = 1 if convention.matching == "mmdetection" else 0
        self.min_side, self.separation = convention.min_proposal_side, convention.nms_separation
        self._shapes: list[tuple[int, int]] = []

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: Sequence[Target] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Propose boxes float32 [P, 4] by descending objectness for each image; in training also the two losses."""
        self._shapes = images.image_sizes  # assign_targets_to_anchors is not given them
        boxes, losses = super().forward(images, features, targets)
        return boxes, {_LOSSES[name]: value for name, value in losses.items()}

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Choose the best proposals of each level, then of each image.

        Args:
            proposals: corners in pixels, float [B, A, 4].
            objectness: logits, float [B, A] or a reshape of it.
            image_shapes: height and width of each image without padding.
            num_anchors_per_level: their sum is A.
        """
        objectness = objectness.detach().reshape(len(proposals), -1)
        best = self._get_top_n_idx(objectness, num_anchors_per_level)  # [B, K]
        counts = torch.tensor(num_anchors_per_level, device=best.device)
        levels = torch.bucketize(best, counts.cumsum(0), right=True)
        scores = objectness.gather(1, best).sigmoid()
        kept = []
        for boxes, score, index, level, shape in zip(proposals, scores, best, levels, image_shapes, strict=True):
            boxes = clip_boxes_to_image(boxes[index], shape)
            sides = boxes[:, 2:] - boxes[:, :2]
            large = ((sides >= self.min_side) & (sides > 0)).all(dim=1)
            chosen = torch.where(large & (score >= self.score_thresh))[0]
            boxes, score, level = boxes[chosen], score[chosen], level[chosen]
            keep = grouped_nms(boxes, score, level, self.nms_thresh, self.separation)
            keep = keep[: self.post_nms_top_n()]
            kept.append((boxes[keep], score[keep]))
        return [boxes for boxes, _ in kept], [score for _, score in kept]

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Label every anchor 1 (object), 0 (background) or -1 (left out), and give it a box of the ground truth."""
        if self.usable_anchors is None:
            labels, boxes = super().assign_targets_to_anchors(anchors, targets)
            return labels, boxes
        labels, boxes = [], []
        for own, target, shape in zip(anchors, targets, self._shapes, strict=True):
            used = self.usable_anchors(own, shape)
            matched = super().assign_targets_to_anchors([own[used]], [target])
            labels.append(own.new_full((len(own),), -1.0).masked_scatter(used, matched[0][0]))
            boxes.append(own.clone().masked_scatter(used[:, None], matched[1][0]))
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses of objectness and boxes over sampled anchors, float32 scalars."""
        positive, negative = self.fg_bg_sampler(labels)
        count = max(1, count_samples(positive, negative, self.least_samples))
        chosen = torch.where(torch.cat(positive).bool())[0]
        sampled = torch.cat((chosen, torch.where(torch.cat(negative).bool())[0]))
        box_loss = self.box_loss(pred_bbox_deltas[chosen], torch.cat(list(regression_targets))[chosen])
        logits, wanted = objectness.flatten()[sampled], torch.cat(labels)[sampled]
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / count, box_loss / count


def _choose_usable_anchors(convention: Convention) -> Callable[[Tensor, tuple[int, int]], Tensor] | None:
    if convention.matching == "torchvision":
        return None  # every anchor
    return _anchors_inside if convention.rpn_skip_crossing else _anchors_on_image


def _anchors_inside(anchors: Tensor, shape: tuple[int, int]) -> Tensor:
    """Which anchors [A, 4] do not cross the border of an image of (height, width), bool [A]."""
    inside = ((anchors[:, :2] >= 0) & (anchors[:, 2:] < anchors.new_tensor([shape[1], shape[0]]))).all(dim=1)
    return inside if inside.any() else _anchors_on_image(anchors, shape)  # none fits into a very small image


def _anchors_on_image(anchors: Tensor, shape: tuple[int, int]) -> Tensor:
    """Which anchors [A, 4] are not on cells of the batch beyond the padding of this image, bool [A]."""
    padded = anchors.new_tensor([-(-side // _DIVISOR) * _DIVISOR for side in (shape[1], shape[0])])
    return ((anchors[:, :2] + anchors[:, 2:]) / 2 < padded - 0.5).all(dim=1)


class FloatRPNHead(RPNHead):
    """torchvision's head; boxes decoded from bfloat16 deltas would be off by pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute objectness [B, A, H, W] and deltas [B, 4 * A, H, W] of every map, float32."""
        objectness, deltas = super().forward(x)
        return [o.float() for o in objectness], [d.float() for d in deltas]
