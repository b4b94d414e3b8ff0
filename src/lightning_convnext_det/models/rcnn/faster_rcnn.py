"""Faster R-CNN with a feature pyramid on any timm backbone, from torchvision's parts.

Differences from ``torchvision.models.detection.FasterRCNN``: the backbone is any `TimmPyramid`; labels run from 0
outside (only the box heads know that torchvision's background is 0); anchors, box deltas, scores and losses are
float32 under autocast; targets are checked before they can do harm; NMS of detections can be hard, soft or none; and
details follow torchvision or MMDetection (``convention``). With the same weights it gives the same boxes as the one or
the other.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_convnext_det.arguments import Count, Fraction, NonNegative, NonNegativeInt, Positive, check_arguments
from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.class_weights import weight_classes
from lightning_convnext_det.models.fpn import PyramidFPN
from lightning_convnext_det.models.image_transform import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageTransform,
    check_tensors,
)
from lightning_convnext_det.models.rcnn.conventions import (
    CONVENTIONS,
    Convention,
    ConventionName,
    ConventionSetting,
    resolve_convention,
)
from lightning_convnext_det.models.rcnn.matcher import Sampling
from lightning_convnext_det.models.rcnn.roi_heads import BoxHeadKind, BoxHeads, Regions, StageBuilder, create_pooler
from lightning_convnext_det.models.rcnn.rpn import ProposalLimits, ProposalNetwork, Proposals
from lightning_convnext_det.models.selection import Selection, SelectsDetections
from lightning_convnext_det.models.target_check import prepare_targets
from lightning_convnext_det.models.tensor_detections import split_detections
from lightning_convnext_det.ops.host_numbers import send
from lightning_convnext_det.ops.nms import NMSMethod
from lightning_convnext_det.ops.precision import weight_precision
from lightning_convnext_det.ops.tracing import is_recording
from lightning_convnext_det.types import Detection, Target, TensorDetections

if TYPE_CHECKING:
    from lightning_convnext_det.models.rcnn.roi_heads import CascadeHeads


class FasterRCNN(SelectsDetections, nn.Module):
    """Faster R-CNN with a feature pyramid on any timm backbone.

    In evaluation mode, images give detections: boxes (x1, y1, x2, y2) in pixels of the image given, labels from 0 and
    scores in [0, 1], by descending score. In training mode, images and targets give the weighted losses, whose sum is
    the objective.

    >>> import torch
    >>> detector = FasterRCNN(
    ...     3, backbone="test_convnext", min_size=64, box_head_features=64, score_threshold=0.0
    ... ).eval()
    >>> images = [torch.rand(3, 48, 64), torch.randint(256, (3, 50, 40), dtype=torch.uint8)]
    >>> with torch.no_grad():
    ...     first, second = detector(images)
    >>> {name: (value.dtype, value.shape[1:]) for name, value in first.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'boxes': (torch.float32, torch.Size([4])), 'labels': (torch.int64, torch.Size([])),
     'scores': (torch.float32, torch.Size([]))}
    >>> targets = [{"boxes": torch.tensor([[4.0, 8.0, 30.0, 40.0]]), "labels": torch.tensor([2])},
    ...            {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    >>> sorted(detector.train()(images, targets))
    ['loss_box', 'loss_classification', 'loss_objectness', 'loss_rpn_box']

    Args:
        num_classes: foreground classes; labels run from 0 to ``num_classes - 1``.
        backbone: timm name of the backbone, e.g. ``convnext_tiny``, ``convnextv2_atto``, ``resnet50``.
        pretrained_backbone: start from timm's pretrained weights of the backbone.
        backbone_weights: start from a local weight file of the backbone instead.
        drop_path_rate: stochastic depth of the backbone; 0 leaves its default.
        out_norm: LayerNorm on every feature map of the backbone, as the ConvNeXt authors' detectors have.
        frozen_stages: freeze the backbone up to this stage.
        batch_norm: ``frozen`` or ``train``, for the BatchNorms of the backbone.
        gradient_checkpointing: trade time for memory in the backbone.
        channels_last: memory format of the convolutions.
        in_chans: channels of the images.
        fpn_channels: width of the feature pyramid.
        min_size: shorter side of the resized image in pixels; of several, one is drawn per image in training and
            the last is used in evaluation.
        max_size: limit of the longer side in pixels.
        image_mean: mean per channel, for images in 0..1.
        image_std: standard deviation per channel.
        anchor_sizes: side lengths of the anchors in pixels of the resized image, one group for each level and one
            for the pooled extra level.
        aspect_ratios: height over width of the anchors, at every level.
        rpn_pre_nms_top_n: proposals kept per level before NMS, in training and in evaluation.
        rpn_post_nms_top_n: proposals kept per image after NMS, in training and in evaluation.
        rpn_nms_threshold: IoU above which the weaker of two proposals is dropped.
        rpn_score_threshold: proposals below this objectness are dropped.
        rpn_fg_iou_threshold: IoU from which an anchor is an object.
        rpn_bg_iou_threshold: IoU below which an anchor is background.
        rpn_batch_size_per_image: anchors sampled per image for the loss.
        rpn_positive_fraction: share of objects among them.
        roi_output_size: bins along each side of a pooled box.
        box_head: ``two_fc`` layers (Faster R-CNN's default), or ``four_conv`` with BatchNorm and one fully connected
            layer (Cascade R-CNN's default), whose statistics ranks share with the trainer's ``sync_batchnorm``.
        box_head_features: width of the fully connected layers.
        box_fg_iou_threshold: IoU from which a proposal is an object.
        box_bg_iou_threshold: IoU below which a proposal is background.
        box_batch_size_per_image: proposals sampled per image for the loss.
        box_positive_fraction: share of objects among them.
        score_threshold: detections with a score that is not higher are dropped.
        nms: what happens to overlapping detections of a class: ``hard`` drops the weaker, ``soft`` lowers its score,
            ``none`` keeps all.
        nms_threshold: IoU above which ``hard`` drops the weaker of two detections of a class.
        soft_nms_sigma: width of the Gaussian, in squared IoU, by which ``soft`` lowers scores; smaller lowers more.
        detections_per_image: how many detections are kept per image.
        convention: whose details to follow, ``torchvision`` (Faster R-CNN's default) or ``mmdetection`` (Cascade
            R-CNN's default); weights trained under one give other boxes under the other. A mapping changes single
            points, e.g. ``{base: mmdetection, roi_aligned: false}``; `Convention` lists them.
        class_weights: factor of the classification loss of samples of each class, in order of label; background
            has 1. None for 1 each.

    Raises:
        ValueError: if an argument is out of range or does not fit the others.
        DataError: in a call, if a target has a box that is not finite or has no area, or a label out of range.

    Reference:
        Ren et al., "Faster R-CNN", arXiv:1506.01497; parts and defaults are torchvision's.
    """

    conventions: ClassVar[dict[ConventionName, Convention]] = CONVENTIONS
    default_convention: ClassVar[ConventionName] = "torchvision"
    default_box_head: ClassVar[BoxHeadKind] = "two_fc"

    def __init__(
        self,
        num_classes: Count,
        backbone: str = "convnext_tiny",
        pretrained_backbone: bool = False,
        backbone_weights: str | None = None,
        drop_path_rate: Fraction = 0.0,
        out_norm: bool = False,
        frozen_stages: NonNegativeInt = 0,
        batch_norm: Literal["frozen", "train"] = "frozen",
        gradient_checkpointing: bool = False,
        channels_last: bool = True,
        in_chans: Count = 3,
        fpn_channels: Count = 256,
        min_size: Count | list[Count] = 800,
        max_size: Count = 1333,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        anchor_sizes: Sequence[Sequence[Count]] = ((32,), (64,), (128,), (256,), (512,)),
        aspect_ratios: Sequence[Positive] = (0.5, 1.0, 2.0),
        rpn_pre_nms_top_n: tuple[Count, Count] = (2000, 1000),
        rpn_post_nms_top_n: tuple[Count, Count] = (2000, 1000),
        rpn_nms_threshold: Fraction = 0.7,
        rpn_score_threshold: Fraction = 0.0,
        rpn_fg_iou_threshold: Fraction = 0.7,
        rpn_bg_iou_threshold: Fraction = 0.3,
        rpn_batch_size_per_image: Count = 256,
        rpn_positive_fraction: Fraction = 0.5,
        roi_output_size: Count = 7,
        box_head: BoxHeadKind | None = None,
        box_head_features: Count = 1024,
        box_fg_iou_threshold: Fraction = 0.5,
        box_bg_iou_threshold: Fraction = 0.5,
        box_batch_size_per_image: Count = 512,
        box_positive_fraction: Fraction = 0.25,
        score_threshold: Fraction = 0.05,
        nms: NMSMethod = "hard",
        nms_threshold: Fraction = 0.5,
        soft_nms_sigma: Positive = 0.5,
        detections_per_image: Count = 100,
        convention: ConventionSetting | None = None,
        class_weights: Sequence[NonNegative] | None = None,
    ) -> None:
        super().__init__()
        check_arguments(FasterRCNN.__init__, locals())
        rules = resolve_convention(convention, self.conventions, self.default_convention)
        self.num_classes = num_classes
        self.selection = Selection(score_threshold, nms, nms_threshold, soft_nms_sigma, detections_per_image)
        self.transform = ImageTransform(min_size, max_size, image_mean, image_std, in_chans, resize=rules.resize)
        self.backbone = PyramidFPN(TimmPyramid(
            backbone, pretrained=pretrained_backbone, weights=backbone_weights, in_chans=in_chans, out_norm=out_norm,
            drop_path_rate=drop_path_rate, frozen_stages=frozen_stages, batch_norm=batch_norm,
            gradient_checkpointing=gradient_checkpointing, channels_last=channels_last,
        ), fpn_channels)  # fmt: skip
        draw = Sampling(rpn_fg_iou_threshold, rpn_bg_iou_threshold, rpn_batch_size_per_image, rpn_positive_fraction)
        keep = ProposalLimits(rpn_pre_nms_top_n, rpn_post_nms_top_n, rpn_nms_threshold, rpn_score_threshold)
        self.rpn = ProposalNetwork(self.backbone.strides, fpn_channels, anchor_sizes, aspect_ratios, rules, draw, keep)
        draw = Sampling(box_fg_iou_threshold, box_bg_iou_threshold, box_batch_size_per_image, box_positive_fraction)
        pooler, kind = create_pooler(self.backbone.strides, roi_output_size, rules), box_head or self.default_box_head
        weights = weight_classes(class_weights, num_classes)
        stages = StageBuilder(
            pooler, kind, fpn_channels, box_head_features, num_classes, rules, self.selection, weights
        )
        self.roi_heads = self.create_roi_heads(stages, draw)

    def create_roi_heads(self, stages: StageBuilder, sampling: Sampling) -> "BoxHeads | CascadeHeads":
        """Build the box heads: one stage."""
        return stages.build(sampling)

    @property
    def compiled_parts(self) -> list[str]:
        """Names of the parts that ``torch.compile`` takes as one graph each: those without boxes."""
        return ["backbone", "rpn.head", *(name for name, _ in self.named_modules() if name.endswith(".box_head"))]

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detection]:
        """Compute the losses in training mode, the detections in evaluation mode.

        Args:
            images: uint8 or float in 0..1, each [C, H, W] of its own size, or stacked [B, C, H, W]; moved to the device
                of the detector.
            targets: the objects of each image, in training; those that are ``iscrowd`` are ignored regions: not
                learned, and no background where a box lies in one for at least half.

        Returns:
            In training the weighted losses ``loss_objectness``, ``loss_rpn_box``, ``loss_classification`` and
            ``loss_box``, float32 scalars whose sum is the objective; else one `Detection` per image.

        Raises:
            DataError: if a target has a box that is not finite or has no area, or a label out of range, or float images
                are not in 0..1.
            TypeError: if an image is not a tensor.
        """
        check_tensors(images)
        device = self.rpn.head.cls_logits.weight.device
        prepared = None
        if self.training:
            if targets is None:
                raise ValueError("a detector in training mode needs targets; call eval() to predict")
            prepared = prepare_targets(images, targets, self.num_classes, device)
        batch, shapes, moved = self.transform([image.to(device) for image in images], prepared)
        sizes = send(shapes, device)
        if moved is None:
            found = split_detections(self.forward_tensors(batch, sizes))
            return self.transform.restore(found, shapes, [(x.shape[-2], x.shape[-1]) for x in images])
        shifted = [target.copy() for target in moved]
        for target in shifted:
            target["labels"] = target["labels"] + 1
        with weight_precision(self.rpn.head.cls_logits.weight):
            features = self.backbone(batch)
            proposals, losses = self.rpn(features, (batch.shape[-2], batch.shape[-1]), sizes, shifted)
            boxes, counts = list(proposals.boxes), proposals.count
            if device.type == "cpu":
                boxes = [own[:count] for own, count in zip(boxes, counts.tolist(), strict=True)]
            return {**losses, **self.roi_heads(features, boxes, shapes, shifted, counts)}

    def forward_tensors(self, images: Tensor, sizes: Tensor | None = None) -> TensorDetections:
        """Detect objects in a batch that `ImageTransform` has made, with results of fixed shape; for evaluation mode.

        ``forward`` in evaluation mode consists of the image transform, this, and the way back to the images given. It
        can be exported, but for soft NMS, by ``torch.export`` and, with opset 18 or later,
        ``torch.onnx.export(dynamo=True)``; RoIAlign and NMS become operators of torchvision or of ONNX. Batch, height
        and width can be free: ``torch.export.Dim("batch")`` with an example of two images or more, and
        ``32 * torch.export.Dim("rows", min=3)``, since torch.export fixes a pooled level with one row. An exported
        graph computes all ``rpn_post_nms_top_n`` proposals, used or not, and its order among equal scores may differ.

        >>> import torch
        >>> detector = FasterRCNN(3, backbone="test_convnext", box_head_features=64, score_threshold=0.0).eval()
        >>> with torch.no_grad():
        ...     boxes, scores, labels, count = detector.forward_tensors(torch.randn(2, 3, 64, 96))
        >>> boxes.shape, scores.shape, labels.shape, count.shape
        (torch.Size([2, 100, 4]), torch.Size([2, 100]), torch.Size([2, 100]), torch.Size([2]))

        Args:
            images: normalised images, zero on padding, float32 [B, C, H, W].
            sizes: height and width of each image without padding, int64 [B, 2]; None if no image is padded.
        """
        height, width = images.shape[-2:]
        if sizes is None:
            sizes = torch.stack(
                [torch.full((images.shape[0],), side, device=images.device) for side in (height, width)], 1
            )
        with weight_precision(self.rpn.head.cls_logits.weight):
            features = self.backbone(images)
            proposals, _ = self.rpn(features, (height, width), sizes)
            return self.roi_heads.detect(features, _as_regions(proposals, height, sizes))


def _as_regions(proposals: Proposals, padded_height: int, sizes: Tensor) -> Regions:
    """Join the proposals of all images; only an exported graph, whose shapes are fixed, keeps the unused rows."""
    num_images, length = proposals.scores.shape
    rows = torch.arange(length, device=sizes.device).expand(num_images, length)
    used = rows < proposals.count[:, None]
    images = torch.arange(num_images, device=sizes.device)[:, None].expand(num_images, length)
    regions = Regions(proposals.boxes.flatten(0, 1), images.flatten(), used.flatten(), padded_height, sizes)
    if is_recording():
        return regions
    chosen = torch.where(regions.used)[0]
    boxes, images, used = (x[chosen] for x in regions[:3])
    return regions._replace(boxes=boxes, images=images, used=used)
