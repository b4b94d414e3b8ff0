"""Box heads of Faster R-CNN and Cascade R-CNN: proposals in, classes and better boxes out.

Derived from torchvision's ``RoIHeads``, with the same names of parameters. Background is class 0 in here.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads

from lightning_convnext_det.models.rcnn.box_coder import Stds, clip_boxes, create_box_coder
from lightning_convnext_det.models.rcnn.box_losses import create_box_loss
from lightning_convnext_det.models.rcnn.conventions import Convention
from lightning_convnext_det.models.rcnn.matcher import Sampling, create_proposal_matcher, leave_out_ignored
from lightning_convnext_det.models.selection import Selection, Setting
from lightning_convnext_det.ops.roi_align import MultiScaleRoIAlign
from lightning_convnext_det.types import Target, TensorDetections

BoxHeadKind = Literal["two_fc", "four_conv"]
FASTER_STDS = (0.1, 0.1, 0.2, 0.2)  # of the deltas; torchvision's weights are 1 / std


class Samples(NamedTuple):
    """The boxes of one image that a stage trains on."""

    boxes: Tensor
    """Corners in pixels, float32 [S, 4]."""
    labels: Tensor
    """Classes, 0 for background, int64 [S]."""
    ground_truth: Tensor
    """The object's box where there is one, float32 [S, 4]."""
    added: Tensor
    """Which are boxes of the ground truth, not proposals, bool [S]."""


class Regions(NamedTuple):
    """The boxes of all images of a batch as one list."""

    boxes: Tensor
    """Corners in pixels of the batch, float32 [R, 4]."""
    images: Tensor
    """Index of each box's image, int64 [R]."""
    used: Tensor
    """False where a row is only filled up, bool [R]."""
    padded_height: int
    """Height of the batch."""
    sizes: Tensor
    """Height and width of each image without padding, int64 [B, 2]."""

    def as_rois(self) -> Tensor:
        """Image index and corners, float32 [R, 5]."""
        return torch.cat((self.images[:, None].to(self.boxes), self.boxes), dim=1)


class BoxHeads(RoIHeads):
    """Box head of Faster R-CNN: proposals in, losses (``forward``) or detections (``detect``) out.

    Args:
        pooler: takes features of boxes from the pyramid.
        head: turns the features [R, C, 7, 7] into vectors.
        predictor: turns the vectors into logits [R, classes + 1] and deltas [R, 4 * (classes + 1)].
        convention: torchvision's or MMDetection's details.
        sampling: which proposals train.
        selection: which detections are kept.
        stds: standard deviations of the deltas.
        match_best: with MMDetection's matching, also match each object's best proposal if it reaches the threshold.
        class_weights: factor of the classification loss of each class, float [classes]; None for 1 each.
    """

    class_weights: Tensor | None
    # torchvision's names, by which its users change them
    score_thresh = Setting[float]("score_threshold")
    nms_thresh = Setting[float]("nms_threshold")
    detections_per_img = Setting[int]("detections_per_image")

    def __init__(
        self,
        pooler: MultiScaleRoIAlign,
        head: nn.Module,
        predictor: nn.Module,
        convention: Convention,
        sampling: Sampling,
        selection: Selection,
        stds: Stds = FASTER_STDS,
        match_best: bool = True,
        class_weights: Tensor | None = None,
    ) -> None:
        self.selection = selection  # first: torchvision's constructor sets the attributes above
        limits = selection.score_threshold, selection.nms_threshold, selection.detections_per_image
        super().__init__(pooler, head, predictor, *sampling, None, *limits)
        background = None if class_weights is None else torch.cat((torch.ones(1), class_weights))
        self.register_buffer("class_weights", background, persistent=False)  # [classes + 1]
        self.box_coder = create_box_coder(stds, convention.box_coding)
        self.box_loss = create_box_loss(convention.box_loss, self.box_coder, convention.box_smooth_l1_beta)
        default_weight = 10.0 if convention.box_loss == "giou" else 1.0
        self.box_loss_weight = default_weight if convention.box_loss_weight is None else convention.box_loss_weight
        self.proposal_matcher = create_proposal_matcher(sampling, convention, match_best)
        self.min_side, self.separation = convention.min_detection_side, convention.nms_separation

    @property
    def last(self) -> "BoxHeads":
        """The stage that chooses the detections, as in a cascade: this one."""
        return self

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        """Compute the losses, in training; labels of targets count from 1."""
        samples = self.sample(proposals, targets)
        logits, deltas = self.predict(features, [s.boxes for s in samples], image_shapes)
        classification, box = self.compute_losses(logits, deltas, samples)
        return {"loss_classification": classification, "loss_box": box}

    def detect(self, features: dict[str, Tensor], regions: Regions) -> TensorDetections:
        """Choose the detections of each image; labels count from 0."""
        logits, deltas = self.classify(features, regions)
        return self.select(logits, deltas, regions)

    def predict(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Compute logits [R, classes + 1] and deltas [R, 4 * (classes + 1)] of the boxes of all images, float32."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))
        return logits, deltas

    def classify(self, features: dict[str, Tensor], regions: Regions) -> tuple[Tensor, Tensor]:
        """Compute what ``predict`` does, without reading values of the device."""
        pooled = self.box_roi_pool.pool(features, regions.as_rois(), regions.padded_height, regions.sizes)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        return logits, deltas

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Target]) -> list[Samples]:
        """Match proposals and the boxes of the ground truth with objects, and draw those that the stage trains on."""
        objects, classes = [t["boxes"] for t in targets], [t["labels"] for t in targets]
        joined = self.add_gt_proposals(proposals, objects)
        matches, labels = self.assign_targets_to_proposals(joined, objects, classes)
        labels = [leave_out_ignored(*of_image) for of_image in zip(labels, joined, targets, strict=True)]
        samples = []
        for i, chosen in enumerate(self.subsample(labels)):
            # without objects every match is 0 and never looked at
            matched = objects[i][matches[i][chosen]] if len(objects[i]) else joined[i].new_zeros(len(chosen), 4)
            samples.append(Samples(joined[i][chosen], labels[i][chosen], matched, chosen >= len(proposals[i])))
        return samples

    def compute_losses(self, logits: Tensor, deltas: Tensor, samples: Sequence[Samples]) -> tuple[Tensor, Tensor]:
        """Compute the losses of classes and boxes, each a mean over all samples of the batch."""
        labels = torch.cat([s.labels for s in samples])
        object_rows = torch.where(labels > 0)[0]
        own = _by_class(deltas)[object_rows, labels[object_rows]]  # [P, 4]
        boxes = torch.cat([s.boxes for s in samples])[object_rows]
        ground_truth = torch.cat([s.ground_truth for s in samples])[object_rows]
        loss = self.box_loss(own, boxes, ground_truth) * (self.box_loss_weight / max(1, len(labels)))
        return self._classification_loss(logits, labels), loss

    def _classification_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over all samples, weighted or not, so that a weight of 2 doubles what its class adds."""
        if len(labels) == 0:
            return logits.sum()  # 0 if there is no proposal
        if self.class_weights is None:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, self.class_weights, reduction="sum") / len(labels)

    def move(self, deltas: Tensor, labels: Tensor, boxes: Tensor, sizes: Tensor) -> Tensor:
        """Move each box by the deltas of one class, and clip it to its image.

        Args:
            deltas: of all classes, float [R, 4 * (classes + 1)].
            labels: the class whose deltas to take, int64 [R].
            boxes: corners in pixels, float [R, 4].
            sizes: height and width of each box's image, int64 [R, 2].
        """
        own = _by_class(deltas).gather(1, labels[:, None, None].expand(-1, -1, 4))[:, 0]
        return clip_boxes(self.box_coder.decode_single(own, boxes), sizes)

    def select(self, logits: Tensor, deltas: Tensor, regions: Regions) -> TensorDetections:
        """Choose the detections of each image from the scores and boxes of all classes."""
        scores = logits.softmax(-1)[:, 1:]  # column 0 is the background
        row, label = torch.where((scores > self.selection.score_threshold) & regions.used[:, None])
        moved = _by_class(self.box_coder.decode_single(deltas, regions.boxes))  # [R, classes + 1, 4]
        boxes = clip_boxes(moved[row, label + 1], regions.sizes[regions.images[row]])
        large = torch.where((boxes[:, 2:] - boxes[:, :2] >= self.min_side).all(dim=1))[0]
        row, label = row[large], label[large]
        return self.selection.select(
            boxes[large],
            scores[row, label],
            label,
            regions.images[row],
            regions.sizes.shape[0],
            scores.shape[1],
            self.separation,
        )


def _by_class(deltas: Tensor) -> Tensor:
    return deltas.reshape(deltas.shape[0], deltas.shape[1] // 4, 4)  # [R, classes + 1, 4], also without boxes


def create_pooler(strides: Sequence[int], output_size: int, convention: Convention) -> MultiScaleRoIAlign:
    """Build what takes the features of boxes from the maps of a pyramid at these strides."""
    return MultiScaleRoIAlign(
        [str(i) for i in range(len(strides))],
        output_size,
        convention.roi_sampling_ratio,
        aligned=convention.roi_aligned,
        strides=strides,
        rounds_stride=not convention.fixed_strides,
        margin=convention.roi_level_margin,
    )


class StageBuilder(NamedTuple):
    """Builds the box heads of a detector, one or several with the same layers."""

    pooler: MultiScaleRoIAlign
    kind: BoxHeadKind
    channels: int
    """Of the feature pyramid."""
    features: int
    """Width of the fully connected layers."""
    num_classes: int
    convention: Convention
    selection: Selection
    class_weights: Tensor | None = None

    def build(self, sampling: Sampling, stds: Stds = FASTER_STDS, match_best: bool = True) -> BoxHeads:
        """Build box heads with weights of their own, see `BoxHeads`."""
        head = create_box_head(self.kind, self.channels, self.pooler.output_size[0], self.features)
        predictor = BoxPredictor(self.features, self.num_classes + 1)  # torchvision's background is class 0
        return BoxHeads(
            self.pooler, head, predictor, self.convention, sampling, self.selection, stds, match_best,
            self.class_weights,
        )  # fmt: skip


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
    """Box heads of Cascade R-CNN: each stage moves the boxes for the next.

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

    def detect(self, features: dict[str, Tensor], regions: Regions) -> TensorDetections:
        """Choose the detections of each image by the mean of all stages' logits; labels count from 0."""
        votes = []
        for i, stage in enumerate(self.stages):
            logits, deltas = stage.classify(features, regions)
            votes.append(logits)
            if i < len(self.stages) - 1:
                labels = logits[:, 1:].argmax(dim=1) + 1
                moved = stage.move(deltas, labels, regions.boxes, regions.sizes[regions.images])
                regions = regions._replace(boxes=moved)
        return self.last.select(torch.stack(votes).mean(dim=0), deltas, regions)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        """Compute the losses of all stages, in training; labels of targets count from 1."""
        losses = {}
        for i, (stage, weight) in enumerate(zip(self.stages, self.loss_weights, strict=True), 1):
            samples = stage.sample(proposals, targets)
            boxes = [s.boxes for s in samples]
            logits, deltas = stage.predict(features, boxes, image_shapes)
            classification, box = stage.compute_losses(logits, deltas, samples)
            losses[f"loss_classification_{i}"], losses[f"loss_box_{i}"] = weight * classification, weight * box
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
    """Move samples for the next stage, objects by the deltas of their class; boxes of the ground truth are left out."""
    labels = torch.cat([s.labels for s in samples])
    labels = torch.where(labels > 0, labels, logits[:, 1:].argmax(dim=1) + 1)
    counts = [len(s.boxes) for s in samples]
    sizes = deltas.new_tensor(image_shapes).repeat_interleave(torch.tensor(counts, device=deltas.device), dim=0)
    moved = stage.move(deltas, labels, torch.cat([s.boxes for s in samples]), sizes)
    return [boxes[~s.added] for boxes, s in zip(torch.split(moved, counts), samples, strict=True)]
