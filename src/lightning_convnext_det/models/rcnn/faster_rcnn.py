"""Faster R-CNN on a timm pyramid, out of torchvision's parts.

Differences from ``torchvision.models.detection.FasterRCNN``: the backbone is any `TimmPyramid`; labels run from 0
outside (only the two-stage heads know that torchvision's background is 0); anchors, box deltas, scores and losses are
float32 under autocast; targets are checked before they can do harm; suppression of overlapping detections can be
chosen, and MMDetection's conventions instead of torchvision's (``dialect``). With the same weights it gives the same
boxes as the one or the other.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.fpn import PyramidFPN
from lightning_convnext_det.models.image_transform import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from lightning_convnext_det.models.rcnn.anchors import PyramidAnchors
from lightning_convnext_det.models.rcnn.conventions import (
    BoxCoding,
    BoxLoss,
    Conventions,
    Dialect,
    LevelMargin,
    Matching,
    Resize,
    conventions,
)
from lightning_convnext_det.models.rcnn.roi_heads import BoxHeadKind, BoxHeads, BoxPredictor, create_box_head
from lightning_convnext_det.models.rcnn.rpn import FloatRPNHead, ProposalNetwork
from lightning_convnext_det.models.target_check import check_targets
from lightning_convnext_det.ops.nms import NMSMethod, Separation, check_nms_method
from lightning_convnext_det.ops.roi_align import MultiScaleRoIAlign
from lightning_convnext_det.types import Detection, Target

if TYPE_CHECKING:
    from lightning_convnext_det.models.rcnn.roi_heads import CascadeHeads


class FasterRCNN(nn.Module):
    """Faster R-CNN with a feature pyramid on any timm backbone.

    Args:
        num_classes: foreground classes; labels run from 0 to ``num_classes - 1``.
        backbone: timm name of the backbone, e.g. ``convnext_tiny``, ``convnextv2_atto``, ``resnet50``.
        pretrained_backbone: start from timm's pretrained weights of the backbone.
        backbone_weights: start from a local weight file of the backbone instead.
        drop_path_rate: stochastic depth of the backbone; 0 leaves its default.
        out_norm: LayerNorm on every map of the backbone, as the ConvNeXt authors' detectors have.
        frozen_stages: freeze the backbone up to this stage.
        batch_norm: ``frozen`` or ``train``, for the BatchNorms of the backbone.
        gradient_checkpointing: trade time for memory in the backbone.
        channels_last: memory format of the convolutions.
        fpn_channels: width of the feature pyramid.
        min_size: shorter side of the resized image in pixels; of several, one is drawn per image in training and
            the last is used in evaluation.
        max_size: limit of the longer side in pixels.
        image_mean: mean per channel, for images in 0..1.
        image_std: standard deviation per channel.
        anchor_sizes: side lengths of the anchors in pixels of the resized image, one group for each level and one
            for the pooled extra level.
        aspect_ratios: height over width of the anchors, at every level.
        rpn_pre_nms_top_n_train: proposals kept per level before suppression, in training.
        rpn_pre_nms_top_n_test: the same in evaluation.
        rpn_post_nms_top_n_train: proposals kept per image after suppression, in training.
        rpn_post_nms_top_n_test: the same in evaluation.
        rpn_nms_threshold: IoU above which the weaker of two proposals is dropped.
        rpn_score_threshold: proposals below this objectness are dropped.
        rpn_fg_iou_threshold: IoU from which an anchor is an object.
        rpn_bg_iou_threshold: IoU below which an anchor is background.
        rpn_batch_size_per_image: anchors sampled per image for the loss.
        rpn_positive_fraction: share of objects among them.
        roi_output_size: bins along each side of a pooled box.
        roi_sampling_ratio: sampling points along each side of a bin; 0 takes as many as a bin has pixels, rounded up
            (default: 2 for torchvision, 0 for mmdetection).
        box_head: ``two_fc`` layers (default), or ``four_conv`` with BatchNorm and one fully connected layer.
        box_head_features: width of the fully connected layers.
        box_fg_iou_threshold: IoU from which a proposal is an object.
        box_bg_iou_threshold: IoU below which a proposal is background.
        box_batch_size_per_image: proposals sampled per image for the loss.
        box_positive_fraction: share of objects among them.
        score_threshold: detections with a lower score are dropped.
        nms: what happens to overlapping detections of a class: ``hard`` drops the weaker, ``soft`` lowers its score,
            ``none`` keeps all.
        nms_threshold: IoU above which ``hard`` drops the weaker of two detections of a class.
        soft_nms_sigma: width of the Gaussian, in squared IoU, by which ``soft`` lowers scores; smaller suppresses more.
        detections_per_image: how many detections are kept per image.
        in_chans: channels of the images.
        dialect: whose conventions to follow, ``torchvision`` (default) or ``mmdetection``; weights trained under one
            give other boxes under the other. The arguments below change single points of it.
        resize: ``torchvision``, or ``opencv`` as mmdetection does; see `ImageTransform`.
        anchor_rounding: round anchors to whole pixels (default: only torchvision).
        fixed_strides: take the strides of the pyramid for anchors and RoIAlign (mmdetection), instead of deriving them
            from the sizes of maps and images (torchvision).
        roi_aligned: shift boxes by half a pixel in RoIAlign (default: only mmdetection).
        roi_level_margin: what 1e-6 is added to when a box gets its level: ``level`` (torchvision) or ``side``.
        box_coding: whose deltas: ``mmdetection`` also limits how much a side may shrink.
        min_proposal_side: proposals with a shorter side are dropped, in pixels (default: 1e-3 for torchvision, 0 for
            mmdetection); those without area always are.
        min_detection_side: detections with a shorter side are dropped (default: 1e-2 for torchvision, 0 for
            mmdetection).
        nms_separation: how suppression keeps classes and levels apart: as ``torchvision``, or by an ``offset``.
        matching: whose rules to match boxes with objects in training; see `BestOverlapMatcher`.
        rpn_box_loss: ``smooth_l1`` (torchvision) or ``l1``, for proposals.
        rpn_skip_crossing: leave anchors that cross the image's border out of the training (default: no); only with
            matching ``mmdetection``.
        box_loss: ``smooth_l1`` (torchvision), ``l1`` or ``giou``, for detections.
        box_loss_weight: factor of the loss of detections' boxes (default: 1).
        box_smooth_l1_beta: below this difference of deltas, their ``smooth_l1`` is quadratic (default: 1/9).

    Reference:
        Ren et al., "Faster R-CNN", arXiv:1506.01497; parts and defaults are torchvision's.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "convnext_tiny",
        pretrained_backbone: bool = False,
        backbone_weights: str | None = None,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
        frozen_stages: int = 0,
        batch_norm: Literal["frozen", "train"] = "frozen",
        gradient_checkpointing: bool = False,
        channels_last: bool = True,
        fpn_channels: int = 256,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        anchor_sizes: Sequence[Sequence[int]] = ((32,), (64,), (128,), (256,), (512,)),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_train: int = 2000,
        rpn_post_nms_top_n_test: int = 1000,
        rpn_nms_threshold: float = 0.7,
        rpn_score_threshold: float = 0.0,
        rpn_fg_iou_threshold: float = 0.7,
        rpn_bg_iou_threshold: float = 0.3,
        rpn_batch_size_per_image: int = 256,
        rpn_positive_fraction: float = 0.5,
        roi_output_size: int = 7,
        roi_sampling_ratio: int | None = None,
        box_head: BoxHeadKind | None = None,
        box_head_features: int = 1024,
        box_fg_iou_threshold: float = 0.5,
        box_bg_iou_threshold: float = 0.5,
        box_batch_size_per_image: int = 512,
        box_positive_fraction: float = 0.25,
        score_threshold: float = 0.05,
        nms: NMSMethod = "hard",
        nms_threshold: float = 0.5,
        soft_nms_sigma: float = 0.5,
        detections_per_image: int = 100,
        in_chans: int = 3,
        dialect: Dialect | None = None,
        resize: Resize | None = None,
        anchor_rounding: bool | None = None,
        fixed_strides: bool | None = None,
        roi_aligned: bool | None = None,
        roi_level_margin: LevelMargin | None = None,
        box_coding: BoxCoding | None = None,
        min_proposal_side: float | None = None,
        min_detection_side: float | None = None,
        nms_separation: Separation | None = None,
        matching: Matching | None = None,
        rpn_box_loss: BoxLoss | None = None,
        rpn_skip_crossing: bool | None = None,
        box_loss: BoxLoss | None = None,
        box_loss_weight: float | None = None,
        box_smooth_l1_beta: float | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it counts foreground classes and must be at least 1")
        self.num_classes = num_classes
        chosen = conventions(
            dialect or "torchvision",
            resize=resize,
            anchor_rounding=anchor_rounding,
            fixed_strides=fixed_strides,
            roi_aligned=roi_aligned,
            roi_sampling_ratio=roi_sampling_ratio,
            roi_level_margin=roi_level_margin,
            box_coding=box_coding,
            min_proposal_side=min_proposal_side,
            min_detection_side=min_detection_side,
            nms_separation=nms_separation,
            matching=matching,
            rpn_box_loss=rpn_box_loss,
            box_loss=box_loss,
        )
        self.transform = ImageTransform(min_size, max_size, image_mean, image_std, resize=chosen.resize)
        body = TimmPyramid(
            backbone,
            pretrained=pretrained_backbone,
            weights=backbone_weights,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            out_norm=out_norm,
            frozen_stages=frozen_stages,
            batch_norm=batch_norm,
            gradient_checkpointing=gradient_checkpointing,
            channels_last=channels_last,
        )
        self.backbone = PyramidFPN(body, fpn_channels)
        self.rpn = _create_rpn(
            body.strides,
            anchor_sizes,
            aspect_ratios,
            fpn_channels,
            chosen,
            bool(rpn_skip_crossing),
            fg_iou_thresh=rpn_fg_iou_threshold,
            bg_iou_thresh=rpn_bg_iou_threshold,
            batch_size_per_image=rpn_batch_size_per_image,
            positive_fraction=rpn_positive_fraction,
            pre_nms_top_n={"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test},
            post_nms_top_n={"training": rpn_post_nms_top_n_train, "testing": rpn_post_nms_top_n_test},
            nms_thresh=rpn_nms_threshold,
            score_thresh=rpn_score_threshold,
        )
        pooler = _create_pooler(body.strides, roi_output_size, chosen)

        def create_stage(**changes: Any) -> BoxHeads:  # the keywords of BoxHeads
            options = {
                "fg_iou_threshold": box_fg_iou_threshold,
                "bg_iou_threshold": box_bg_iou_threshold,
                "batch_size_per_image": box_batch_size_per_image,
                "positive_fraction": box_positive_fraction,
                "box_loss_weight": 1.0 if box_loss_weight is None else box_loss_weight,
                "smooth_l1_beta": 1 / 9 if box_smooth_l1_beta is None else box_smooth_l1_beta,
                "score_threshold": score_threshold,
                "nms_threshold": nms_threshold,
                "detections_per_image": detections_per_image,
            }
            head = create_box_head(box_head or "two_fc", fpn_channels, roi_output_size, box_head_features)
            predictor = BoxPredictor(box_head_features, num_classes + 1)  # torchvision's background is class 0
            return BoxHeads(pooler, head, predictor, chosen, **{**options, **changes})

        self.roi_heads = self.create_roi_heads(create_stage)
        self.nms = nms
        self.roi_heads.last.soft_nms_sigma = soft_nms_sigma

    def create_roi_heads(self, create_stage: Callable[..., BoxHeads]) -> "BoxHeads | CascadeHeads":
        """Build the second stage; ``create_stage`` takes what differs from the detector's own arguments."""
        return create_stage()

    @property
    def nms(self) -> NMSMethod:
        """What happens to overlapping detections of a class; can be changed at any time."""
        return self.roi_heads.last.nms

    @nms.setter
    def nms(self, method: NMSMethod) -> None:
        check_nms_method(method)
        self.roi_heads.last.nms = method

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> dict[str, Tensor] | list[Detection]:
        """Compute the losses in training mode, the detections in evaluation mode.

        Args:
            images: uint8 or float in 0..1, each [C, H, W] of its own size.
            targets: the objects of each image, in training.

        Returns:
            In training the weighted losses ``loss_objectness``, ``loss_rpn_box``, ``loss_classification`` and
            ``loss_box``, float32 scalars whose sum is the objective; else one `Detection` per image.

        Raises:
            DataError: if a target has a box that is not finite or has no area, or a label out of range.
        """
        if self.training:
            if targets is None:
                raise ValueError("a detector in training mode needs targets; call eval() to predict")
            check_targets(images, targets, self.num_classes)
        batch, sizes, moved = self.transform(images, targets if self.training else None)
        shifted = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in moved] if moved is not None else None
        features = self.backbone(batch)
        image_list = ImageList(batch, sizes)
        proposals, losses = self.rpn(image_list, features, shifted)
        detections, box_losses = self.roi_heads(features, proposals, sizes, shifted)
        if self.training:
            return {**losses, **box_losses}
        found = [Detection(boxes=d["boxes"], labels=d["labels"] - 1, scores=d["scores"]) for d in detections]
        return self.transform.restore(found, sizes, [(x.shape[-2], x.shape[-1]) for x in images])


def _create_rpn(
    strides: Sequence[int],
    sizes: Sequence[Sequence[int]],
    aspect_ratios: Sequence[float],
    channels: int,
    chosen: Conventions,
    skip_crossing: bool,
    **options: Any,  # the keywords of RegionProposalNetwork
) -> ProposalNetwork:
    levels = [*strides, 2 * strides[-1]]  # the pooled level
    if len(sizes) != len(levels):
        raise ValueError(f"anchor_sizes has {len(sizes)} groups; expected one for each of {len(levels)} levels")
    anchors = PyramidAnchors(sizes, aspect_ratios, chosen.anchor_rounding, levels if chosen.fixed_strides else None)
    head = FloatRPNHead(channels, anchors.num_anchors_per_location()[0])
    return ProposalNetwork(anchors, head, chosen, skip_crossing, **options)


def _create_pooler(strides: Sequence[int], output_size: int, chosen: Conventions) -> MultiScaleRoIAlign:
    return MultiScaleRoIAlign(
        [str(i) for i in range(len(strides))],
        output_size,
        chosen.roi_sampling_ratio,
        aligned=chosen.roi_aligned,
        strides=strides if chosen.fixed_strides else None,
        margin=chosen.roi_level_margin,
    )
