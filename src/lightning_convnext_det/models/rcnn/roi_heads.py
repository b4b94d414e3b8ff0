"""Box heads of Faster R-CNN and Cascade R-CNN: proposals in, classes and better boxes out.

Derived from torchvision's ``RoIHeads``, with the same names of parameters. Background is class 0 in here.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou

from lightning_convnext_det.models.rcnn.box_coder import Stds, clip_boxes, create_box_coder
from lightning_convnext_det.models.rcnn.box_losses import create_box_loss
from lightning_convnext_det.models.rcnn.conventions import Convention
from lightning_convnext_det.models.rcnn.matcher import (
    Sampling,
    create_proposal_matcher,
    draw_samples,
    leave_out_ignored,
    take_objects,
)
from lightning_convnext_det.models.selection import Selection, Setting
from lightning_convnext_det.ops.host_numbers import send
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
    """The object's box where there is one, else zeros, float32 [S, 4]."""
    num_proposals: int
    """How many of them are proposals; boxes of the ground truth follow."""


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
        self.proposal_matcher, self.sampling = create_proposal_matcher(sampling, convention, match_best), sampling
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
        counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses, in training; labels of targets count from 1, ``counts`` is as for ``sample``."""
        samples = self.sample(proposals, targets, counts)
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
    def sample(
        self, proposals: Sequence[Tensor], targets: Sequence[Target], counts: Tensor | None = None
    ) -> list[Samples]:
        """Match proposals and the boxes of the ground truth with objects, and draw those that the stage trains on.

        Args:
            proposals: corners in pixels of the batch, one float tensor [P, 4] per image.
            targets: the objects of each image, labels from 1.
            counts: how many of the proposals count, int64 [B] (default: all); every image then has as many rows.
        """
        joined = [torch.cat((own, t["boxes"])) for own, t in zip(proposals, targets, strict=True)]
        found = [self.match(*of_image) for of_image in zip(joined, targets, strict=True)]
        labels = pad_sequence([label for label, _ in found], batch_first=True, padding_value=-1)  # [B, N]
        if counts is not None:
            width = len(proposals[0])
            beyond_count = torch.arange(width, device=labels.device) >= counts[:, None]
            labels[:, :width] = labels[:, :width].masked_fill(beyond_count, -1)
        drawn = draw_samples(labels, self.sampling)
        beyond = labels.shape[1]
        rows = torch.where(drawn.used, drawn.rows, beyond).sort(dim=1).values  # in order, the unused behind them
        limits = [(len(own), beyond) for own in proposals]
        # the one look at the device: how many samples there are, and how many of them are proposals
        numbers = torch.stack([(row < limit).sum() for row, pair in zip(rows, limits, strict=True) for limit in pair])
        samples = []
        for i, (num_proposals, count) in enumerate(numbers.view(-1, 2).tolist()):
            row = rows[i, :count]
            boxes, (label, match) = joined[i][row], (x[row] for x in found[i])
            ground_truth = take_objects([targets[i]], match[None], (label > 0)[None])[0]
            samples.append(Samples(boxes, label, ground_truth, num_proposals))
        return samples

    def match(self, boxes: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Label the boxes [N, 4] of an image by class, 0 for background, -1 for neither, and match them with objects.

        Returns:
            Labels int64 [N], and the index of the object or a negative number, int64 [N].
        """
        background = self.proposal_matcher.BELOW_LOW_THRESHOLD
        if not len(target["boxes"]):
            matches = torch.full((len(boxes),), background, device=boxes.device)
            labels = torch.zeros_like(matches)
        else:
            matches = self.proposal_matcher(box_iou(target["boxes"], boxes))
            labels = torch.where(matches == background, 0, -1)
            labels = torch.where(matches >= 0, target["labels"][matches.clamp(min=0)], labels)
        return leave_out_ignored(labels, boxes, target), matches

    def compute_losses(self, logits: Tensor, deltas: Tensor, samples: Sequence[Samples]) -> tuple[Tensor, Tensor]:
        """Compute the losses of classes and boxes, each a mean over all samples of the batch."""
        labels = torch.cat([s.labels for s in samples])
        boxes, ground_truth = torch.cat([s.boxes for s in samples]), torch.cat([s.ground_truth for s in samples])
        # background has no box to learn: in its place one of a pixel, since a box without area would give nan gradients
        pixel = (torch.arange(4, device=labels.device) // 2).to(boxes)
        boxes, ground_truth = (torch.where((labels > 0)[:, None], x, pixel) for x in (boxes, ground_truth))
        each = torch.where(labels > 0, self.box_loss(_of_class(deltas, labels), boxes, ground_truth), 0.0)
        loss = each.sum() * (self.box_loss_weight / max(1, len(labels)))
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
        own = _of_class(deltas, labels)
        return clip_boxes(self.box_coder.decode_single(own, boxes), sizes)

    def select(self, logits: Tensor, deltas: Tensor, regions: Regions) -> TensorDetections:
        """Choose the detections of each image from the scores and boxes of all classes."""
        scores = logits.softmax(-1)[:, 1:]  # column 0 is the background
        row, label = torch.where((scores > self.selection.score_threshold) & regions.used[:, None])
        moved = _by_class(self.box_coder.decode_single(deltas, regions.boxes))  # [R, classes + 1, 4]
        boxes = clip_boxes(moved[row, label + 1], regions.sizes[regions.images[row]])
        large = (boxes[:, 2:] - boxes[:, :2] >= self.min_side).all(dim=1)
        return self.selection.select(
            boxes,
            scores[row, label],
            label,
            regions.images[row],
            regions.sizes.shape[0],
            scores.shape[1],
            self.separation,
            large,
        )


def _by_class(deltas: Tensor) -> Tensor:
    return deltas.reshape(deltas.shape[0], deltas.shape[1] // 4, 4)  # [R, classes + 1, 4], also without boxes


def _of_class(deltas: Tensor, labels: Tensor) -> Tensor:
    """Take the deltas of one class for each box, [R, 4]."""
    return _by_class(deltas).gather(1, labels[:, None, None].expand(-1, -1, 4))[:, 0]


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
        counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of all stages, in training; labels and ``counts`` are as for `BoxHeads`."""
        losses = {}
        for i, (stage, weight) in enumerate(zip(self.stages, self.loss_weights, strict=True), 1):
            samples = stage.sample(proposals, targets, counts)
            boxes = [s.boxes for s in samples]
            logits, deltas = stage.predict(features, boxes, image_shapes)
            classification, box = stage.compute_losses(logits, deltas, samples)
            losses[f"loss_classification_{i}"], losses[f"loss_box_{i}"] = weight * classification, weight * box
            if i < len(self.stages):
                proposals = _move_samples(stage, logits.detach(), deltas.detach(), samples, image_shapes)
                counts = None
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
    sizes = send([shape for shape, n in zip(image_shapes, counts, strict=True) for _ in range(n)], deltas.device)
    sizes = sizes.view(-1, 2)
    moved = stage.move(deltas, labels, torch.cat([s.boxes for s in samples]), sizes)
    return [boxes[: s.num_proposals] for boxes, s in zip(torch.split(moved, counts), samples, strict=True)]
