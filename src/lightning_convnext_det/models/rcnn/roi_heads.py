"""The second stage of Faster R-CNN, and one stage of Cascade R-CNN: boxes in, classes and better boxes out.

On torchvision's ``RoIHeads``, whose names of parameters it keeps. Background is class 0 in here.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss

from lightning_convnext_det.models.rcnn.box_coder import create_box_coder
from lightning_convnext_det.models.rcnn.conventions import Conventions
from lightning_convnext_det.models.rcnn.matcher import BestOverlapMatcher
from lightning_convnext_det.ops.nms import NMSMethod, apply_nms
from lightning_convnext_det.ops.roi_align import MultiScaleRoIAlign
from lightning_convnext_det.types import Detection, Target

BoxHeadKind = Literal["two_fc", "four_conv"]
FASTER_STDS = (0.1, 0.1, 0.2, 0.2)  # of the deltas; torchvision's weights are 1 / std


class Samples(NamedTuple):
    """The boxes of one image that a stage trains on."""

    boxes: Tensor
    """Corners in pixels, float32 [S, 4]."""
    labels: Tensor
    """Classes, 0 for background, int64 [S]."""
    truth: Tensor
    """The object's box where there is one, float32 [S, 4]."""
    added: Tensor
    """Which are the objects' own boxes, not proposals, bool [S]."""


class BoxHeads(RoIHeads):
    """Classify proposals and move them.

    Args:
        pooler: takes features of boxes from the pyramid.
        head: turns the features [R, C, 7, 7] into vectors.
        predictor: turns the vectors into logits [R, classes + 1] and deltas [R, 4 * (classes + 1)].
        conventions: what to do where the dialects differ.
        fg_iou_threshold: IoU from which a proposal is an object.
        bg_iou_threshold: IoU below which a proposal is background.
        batch_size_per_image: proposals sampled per image for the loss.
        positive_fraction: share of objects among them.
        stds: standard deviations of the deltas.
        box_loss_weight: factor of the loss of the boxes.
        smooth_l1_beta: below this difference of deltas, the loss ``smooth_l1`` is quadratic.
        match_own: also give each object its best proposal, if that reaches ``fg_iou_threshold``; only with matching
            ``mmdetection``.
        score_threshold: detections with a lower score are dropped.
        nms_threshold: IoU above which the weaker of two detections of a class is dropped.
        detections_per_image: how many detections are kept per image.
    """

    nms: NMSMethod = "hard"
    soft_nms_sigma = 0.5

    def __init__(
        self,
        pooler: MultiScaleRoIAlign,
        head: nn.Module,
        predictor: nn.Module,
        conventions: Conventions,
        *,
        fg_iou_threshold: float = 0.5,
        bg_iou_threshold: float = 0.5,
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
        stds: tuple[float, float, float, float] = FASTER_STDS,
        box_loss_weight: float = 1.0,
        smooth_l1_beta: float = 1 / 9,
        match_own: bool = True,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 100,
    ) -> None:
        super().__init__(
            pooler,
            head,
            predictor,
            fg_iou_threshold,
            bg_iou_threshold,
            batch_size_per_image,
            positive_fraction,
            None,
            score_threshold,
            nms_threshold,
            detections_per_image,
        )
        self.conventions = conventions
        self.box_loss_weight = box_loss_weight
        self.smooth_l1_beta = smooth_l1_beta
        self.box_coder = create_box_coder(stds, conventions.box_coding)
        if conventions.matching == "mmdetection" and match_own:
            self.proposal_matcher = BestOverlapMatcher(fg_iou_threshold, bg_iou_threshold, fg_iou_threshold)

    @property
    def last(self) -> "BoxHeads":
        """The stage that chooses the detections, as in a cascade: this one."""
        return self

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[Target] | None = None,
    ) -> tuple[list[Detection], dict[str, Tensor]]:
        """Compute losses in training, with labels from 1; else detections, with labels from 1."""
        if self.training:
            assert targets is not None  # the detector has checked them
            samples = self.sample(proposals, targets)
            logits, deltas = self.predict(features, [s.boxes for s in samples], image_shapes)
            classifier, box_reg = self.compute_losses(logits, deltas, samples)
            return [], {"loss_classification": classifier, "loss_box": box_reg}
        logits, deltas = self.predict(features, proposals, image_shapes)
        return self.detect(logits, deltas, proposals, image_shapes), {}

    def predict(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Compute logits [R, classes + 1] and deltas [R, 4 * (classes + 1)] of the boxes of all images, float32."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))
        return logits, deltas

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Target]) -> list[Samples]:
        """Match proposals with objects, and draw those that the stage trains on."""
        truths, classes = [t["boxes"] for t in targets], [t["labels"] for t in targets]
        joined = self.add_gt_proposals(proposals, truths)
        if self.conventions.matching == "torchvision":
            matches, labels = self.assign_targets_to_proposals(joined, truths, classes)
        else:  # the objects' own boxes do not compete with the proposals
            matches, labels = [], []
            for boxes, truth, own in zip(proposals, truths, classes, strict=True):
                found, label = _match(self, boxes, truth, own)
                matches.append(torch.cat((found, torch.arange(len(truth), device=truth.device))))
                labels.append(torch.cat((label, own)))
        samples = []
        for i, chosen in enumerate(self.subsample(labels)):
            # without objects every match is 0 and never looked at
            truth = truths[i][matches[i][chosen]] if len(truths[i]) else joined[i].new_zeros(len(chosen), 4)
            samples.append(Samples(joined[i][chosen], labels[i][chosen], truth, chosen >= len(proposals[i])))
        return samples

    def compute_losses(self, logits: Tensor, deltas: Tensor, samples: Sequence[Samples]) -> tuple[Tensor, Tensor]:
        """Compute the losses of classes and boxes, each a mean over all samples of the batch."""
        labels = torch.cat([s.labels for s in samples])
        object_rows = torch.where(labels > 0)[0]
        own = _by_class(deltas)[object_rows, labels[object_rows]]  # [P, 4]
        boxes, truth = (torch.cat(x)[object_rows] for x in ([s.boxes for s in samples], [s.truth for s in samples]))
        loss = self._box_loss(own, boxes, truth) * (self.box_loss_weight / max(1, len(labels)))
        classifier = F.cross_entropy(logits, labels) if len(labels) else logits.sum()  # 0 if there is no proposal
        return classifier, loss

    def _box_loss(self, deltas: Tensor, boxes: Tensor, truth: Tensor) -> Tensor:
        """Sum the losses of deltas [P, 4] that should move boxes [P, 4] to the truth [P, 4]."""
        if self.conventions.box_loss == "giou":
            moved = self.box_coder.decode_single(deltas, boxes)
            loss: Tensor = generalized_box_iou_loss(moved, truth, reduction="sum")
            return loss
        wanted = self.box_coder.encode_single(truth, boxes)
        if self.conventions.box_loss == "l1":
            return F.l1_loss(deltas, wanted, reduction="sum")
        return F.smooth_l1_loss(deltas, wanted, beta=self.smooth_l1_beta, reduction="sum")

    def move(
        self, deltas: Tensor, labels: Tensor, boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Move each box by the deltas of one class, and clip it to its image.

        Args:
            deltas: of all classes, float [R, 4 * (classes + 1)].
            labels: the class whose deltas to take, int64 [R].
            boxes: corners in pixels of each image's boxes, float [L, 4].
            image_shapes: height and width of the images.
        """
        rows = torch.arange(len(labels), device=labels.device)
        own = _by_class(deltas)[rows, labels]
        moved = self.box_coder.decode_single(own, torch.cat(list(boxes))).split([len(b) for b in boxes])
        return [clip_boxes_to_image(b, shape) for b, shape in zip(moved, image_shapes, strict=True)]

    def detect(
        self, logits: Tensor, deltas: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[Detection]:
        """Choose the detections of each image from the scores and boxes of all classes."""
        counts = [len(p) for p in proposals]
        moved = self.box_coder.decode_single(deltas, torch.cat(proposals))
        all_boxes = torch.split(_by_class(moved), counts)  # [R, classes + 1, 4]
        all_scores = torch.split(logits.softmax(-1), counts)  # [R, classes + 1]
        found = []
        for boxes, scores, shape in zip(all_boxes, all_scores, image_shapes, strict=True):
            row, column = torch.where(scores[:, 1:] > self.score_thresh)  # column 0 is the background
            boxes, scores = clip_boxes_to_image(boxes[row, column + 1], shape), scores[row, column + 1]
            large = (boxes[:, 2:] - boxes[:, :2] >= self.conventions.min_detection_side).all(dim=1)
            each = apply_nms(
                boxes[large],
                scores[large],
                column[large] + 1,
                self.nms,
                self.nms_thresh,
                self.soft_nms_sigma,
                self.conventions.nms_separation,
            )
            high = each[1] > self.score_thresh  # soft suppression lowers scores
            boxes, scores, labels = (values[high][: self.detections_per_img] for values in each)
            found.append(Detection(boxes=boxes, labels=labels, scores=scores))
        return found


def _by_class(deltas: Tensor) -> Tensor:
    return deltas.reshape(len(deltas), deltas.shape[1] // 4, 4)  # [R, classes + 1, 4], also without boxes


def _match(heads: RoIHeads, boxes: Tensor, truth: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Match the proposals of one image, which may be none."""
    if len(boxes) == 0:
        nothing = classes.new_zeros(0)
        return nothing, nothing
    matches, labels = heads.assign_targets_to_proposals([boxes], [truth], [classes])
    return matches[0], labels[0]


def create_box_head(kind: BoxHeadKind, channels: int, size: int, features: int) -> nn.Module:
    """Build what turns features [R, channels, size, size] of boxes into vectors [R, features]."""
    if kind == "two_fc":
        head: nn.Module = TwoMLPHead(channels * size**2, features)
        return head
    if kind == "four_conv":
        head = FastRCNNConvFCHead((channels, size, size), [channels] * 4, [features], norm_layer=nn.BatchNorm2d)
        return head
    raise ValueError(f"box_head is '{kind}'; choose one of {', '.join(get_args(BoxHeadKind))}")


class BoxPredictor(FastRCNNPredictor):
    """torchvision's predictor with float32 scores and deltas."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and deltas of vectors [R, C] or features [R, C, 1, 1]."""
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


class CascadeHeads(nn.Module):
    """Stages of which each moves the boxes for the next.

    Args:
        stages: each a `BoxHeads`.
        loss_weights: factor of the losses of each stage.
    """

    def __init__(self, stages: Sequence[BoxHeads], loss_weights: Sequence[float]) -> None:
        super().__init__()
        self.stages: Sequence[BoxHeads] = nn.ModuleList(stages)  # type: ignore[assignment]  # whose items are Modules
        self.loss_weights = tuple(loss_weights)
        for stage in stages:  # small boxes at first: untrained deltas would spoil the input of the next stage
            nn.init.normal_(stage.box_predictor.cls_score.weight, std=0.01)
            nn.init.normal_(stage.box_predictor.bbox_pred.weight, std=0.001)
            nn.init.zeros_(stage.box_predictor.cls_score.bias)
            nn.init.zeros_(stage.box_predictor.bbox_pred.bias)

    @property
    def last(self) -> BoxHeads:
        """The stage whose boxes are the detections, and which chooses among them."""
        return self.stages[-1]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[Target] | None = None,
    ) -> tuple[list[Detection], dict[str, Tensor]]:
        """Compute the losses of all stages in training, with labels from 1; else detections, with labels from 1."""
        if self.training:
            assert targets is not None  # the detector has checked them
            return [], self._compute_losses(features, proposals, image_shapes, targets)
        votes = []
        for i, stage in enumerate(self.stages):
            logits, deltas = stage.predict(features, proposals, image_shapes)
            votes.append(logits)
            if i < len(self.stages) - 1:
                proposals = stage.move(deltas, logits[:, 1:].argmax(dim=1) + 1, proposals, image_shapes)
        return self.last.detect(torch.stack(votes).mean(dim=0), deltas, proposals, image_shapes), {}

    def _compute_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        losses = {}
        for i, (stage, weight) in enumerate(zip(self.stages, self.loss_weights, strict=True), 1):
            samples = stage.sample(proposals, targets)
            boxes = [s.boxes for s in samples]
            logits, deltas = stage.predict(features, boxes, image_shapes)
            classifier, box_reg = stage.compute_losses(logits, deltas, samples)
            losses[f"loss_classification_{i}"], losses[f"loss_box_{i}"] = weight * classifier, weight * box_reg
            if i < len(self.stages):
                proposals = _move_samples(stage, logits.detach(), deltas.detach(), samples, image_shapes)
        return losses


def _move_samples(
    stage: BoxHeads,
    logits: Tensor,
    deltas: Tensor,
    samples: Sequence[Samples],
    image_shapes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Move samples for the next stage, objects by the deltas of their class; the objects' own boxes are left out."""
    labels = torch.cat([s.labels for s in samples])
    labels = torch.where(labels > 0, labels, logits[:, 1:].argmax(dim=1) + 1)
    moved = stage.move(deltas, labels, [s.boxes for s in samples], image_shapes)
    return [boxes[~s.added] for boxes, s in zip(moved, samples, strict=True)]
