"""The region proposal network (Faster R-CNN, arXiv:1506.01497, section 3), on torchvision's."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import clip_boxes_to_image

from lightning_convnext_det.models.rcnn.anchors import PyramidAnchors
from lightning_convnext_det.models.rcnn.box_coder import create_box_coder
from lightning_convnext_det.models.rcnn.conventions import Conventions
from lightning_convnext_det.models.rcnn.matcher import BestOverlapMatcher, BoxPairs, ChunkedMatcher, count_samples
from lightning_convnext_det.ops.nms import grouped_nms
from lightning_convnext_det.types import Target

_MIN_MATCH_IOU = 0.3  # MMDetection: below, the best anchor of an object is left as it is (train_cfg.rpn.assigner)
_DIVISOR = 32  # images are padded to a multiple of this
# torchvision's names of the losses, and the names that all detectors here use
_LOSSES = {"loss_objectness": "loss_objectness", "loss_rpn_box_reg": "loss_rpn_box"}


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's network under the conventions of either dialect.

    Args:
        anchors: the anchor generator.
        head: the convolutions.
        conventions: what to do where the dialects differ.
        skip_crossing: leave anchors that cross the image's border out of the training, as the paper and the ConvNeXt
            authors' Cascade R-CNN do; only with matching ``mmdetection``.
        options: the other arguments of torchvision's network.
    """

    def __init__(
        self,
        anchors: PyramidAnchors,
        head: RPNHead,
        conventions: Conventions,
        skip_crossing: bool,
        **options: Any,  # the keywords of RegionProposalNetwork
    ) -> None:
        super().__init__(anchors, head, **options)
        self.conventions = conventions
        self.skip_crossing = skip_crossing
        self.box_coder = create_box_coder((1.0, 1.0, 1.0, 1.0), conventions.box_coding)
        thresholds = options["fg_iou_thresh"], options["bg_iou_thresh"]
        matcher = Matcher(*thresholds, allow_low_quality_matches=True)  # as torchvision's constructor makes it
        if conventions.matching == "mmdetection":
            matcher = BestOverlapMatcher(*thresholds, _MIN_MATCH_IOU)
        self.box_similarity, self.proposal_matcher = BoxPairs, ChunkedMatcher(matcher)
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
            large = ((sides >= self.conventions.min_proposal_side) & (sides > 0)).all(dim=1)
            chosen = torch.where(large & (score >= self.score_thresh))[0]
            boxes, score, level = boxes[chosen], score[chosen], level[chosen]
            keep = grouped_nms(boxes, score, level, self.nms_thresh, self.conventions.nms_separation)
            keep = keep[: self.post_nms_top_n()]
            kept.append((boxes[keep], score[keep]))
        return [boxes for boxes, _ in kept], [score for _, score in kept]

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Label every anchor 1 (object), 0 (background) or -1 (left out), and give it a box of the truth."""
        if self.conventions.matching == "torchvision":
            labels, boxes = super().assign_targets_to_anchors(anchors, targets)
            return labels, boxes
        labels, boxes = [], []
        for own, target, shape in zip(anchors, targets, self._shapes, strict=True):
            used = _usable(own, shape, self.skip_crossing)
            matched = super().assign_targets_to_anchors([own[used]], [target])
            labels.append(own.new_full((len(own),), -1.0).masked_scatter(used, matched[0][0]))
            boxes.append(own.clone().masked_scatter(used[:, None], matched[1][0]))
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses of objectness and boxes over sampled anchors, float32 scalars."""
        if self.conventions.matching == "torchvision" and self.conventions.rpn_box_loss == "smooth_l1":
            losses: tuple[Tensor, Tensor] = super().compute_loss(
                objectness, pred_bbox_deltas, labels, regression_targets
            )
            return losses
        positive, negative = self.fg_bg_sampler(labels)
        count = count_samples(positive, negative, self.conventions.matching)
        chosen = torch.where(torch.cat(positive).bool())[0]
        sampled = torch.cat((chosen, torch.where(torch.cat(negative).bool())[0]))
        deltas, wanted = pred_bbox_deltas[chosen], torch.cat(list(regression_targets))[chosen]
        if self.conventions.rpn_box_loss == "l1":
            box_loss = F.l1_loss(deltas, wanted, reduction="sum") / count
        else:
            box_loss = F.smooth_l1_loss(deltas, wanted, beta=1 / 9, reduction="sum") / count
        logits, truth = objectness.flatten()[sampled], torch.cat(labels)[sampled]
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / count, box_loss


def _usable(anchors: Tensor, shape: tuple[int, int], skip_crossing: bool) -> Tensor:
    """Tell which anchors [A, 4] may train on an image of (height, width), bool [A]."""
    if skip_crossing:
        limit = anchors.new_tensor([shape[1], shape[0]])
        inside = ((anchors[:, :2] >= 0) & (anchors[:, 2:] < limit)).all(dim=1)
        if inside.any():  # none fits into a very small image
            return inside
    # the cells of a batch beyond the image's own padding
    padded = anchors.new_tensor([-(-side // _DIVISOR) * _DIVISOR for side in (shape[1], shape[0])])
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (centres < padded - 0.5).all(dim=1)


class FloatRPNHead(RPNHead):
    """torchvision's head; boxes decoded from bfloat16 deltas would be off by pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute objectness [B, A, H, W] and deltas [B, 4 * A, H, W] of every map, float32."""
        objectness, deltas = super().forward(x)
        return [o.float() for o in objectness], [d.float() for d in deltas]
