"""Faster R-CNN on a timm pyramid, out of torchvision's parts.

Differences from ``torchvision.models.detection.FasterRCNN``: the backbone is any `TimmPyramid`; labels run from 0
outside (only this file knows that torchvision's background is 0); anchors, box deltas, scores and losses are float32
under autocast; targets are checked before they can do harm; suppression of overlapping detections can be chosen. With
the same weights it gives the same boxes.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from lightning_convnext_det.models.backbone import PyramidFPN, TimmPyramid
from lightning_convnext_det.models.image_transform import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from lightning_convnext_det.models.suppression import Suppression, check_suppression, suppress
from lightning_convnext_det.models.targets import check_targets
from lightning_convnext_det.ops.roi_align import MultiScaleRoIAlign
from lightning_convnext_det.types import Detection, Target


class FasterRCNN(nn.Module):
    """Faster R-CNN with a feature pyramid on any timm backbone.

    Args:
        num_classes: foreground classes; labels run from 0 to ``num_classes - 1``.
        backbone: timm name of the backbone, e.g. ``convnext_tiny``, ``convnextv2_atto``, ``resnet50``.
        pretrained_backbone: start from timm's pretrained weights of the backbone.
        backbone_weights: start from a local weight file of the backbone instead.
        drop_path_rate: stochastic depth of the backbone; 0 leaves its default.
        output_norm: LayerNorm on every map of the backbone, as the ConvNeXt authors' detectors have.
        frozen_stages: freeze the backbone up to this stage.
        batch_norm: ``frozen`` or ``train``, for the BatchNorms of the backbone.
        gradient_checkpointing: trade time for memory in the backbone.
        channels_last: memory format of the convolutions.
        fpn_channels: width of the feature pyramid.
        min_size: shorter side of the resized picture in pixels; of several, one is drawn per picture in training and
            the last is used in evaluation.
        max_size: limit of the longer side in pixels.
        image_mean: mean per channel, for pictures in 0..1.
        image_std: standard deviation per channel.
        anchor_sizes: side lengths of the anchors in pixels of the resized picture, one group for each level and one
            for the pooled extra level.
        aspect_ratios: height over width of the anchors, at every level.
        rpn_pre_nms_top_n_train: proposals kept per level before suppression, in training.
        rpn_pre_nms_top_n_test: the same in evaluation.
        rpn_post_nms_top_n_train: proposals kept per picture after suppression, in training.
        rpn_post_nms_top_n_test: the same in evaluation.
        rpn_nms_threshold: IoU above which the weaker of two proposals is dropped.
        rpn_score_threshold: proposals below this objectness are dropped.
        rpn_fg_iou_threshold: IoU from which an anchor is an object.
        rpn_bg_iou_threshold: IoU below which an anchor is background.
        rpn_batch_size_per_image: anchors sampled per picture for the loss.
        rpn_positive_fraction: share of objects among them.
        roi_output_size: bins along each side of a pooled box.
        roi_sampling_ratio: sampling points along each side of a bin.
        box_head_features: width of the two fully connected layers.
        box_fg_iou_threshold: IoU from which a proposal is an object.
        box_bg_iou_threshold: IoU below which a proposal is background.
        box_batch_size_per_image: proposals sampled per picture for the loss.
        box_positive_fraction: share of objects among them.
        score_threshold: detections with a lower score are dropped.
        nms: what happens to overlapping detections of a class: ``hard`` drops the weaker, ``soft`` lowers its score,
            ``none`` keeps all.
        nms_threshold: IoU above which ``hard`` drops the weaker of two detections of a class.
        soft_nms_sigma: width of the Gaussian in IoU by which ``soft`` lowers scores; smaller suppresses more.
        detections_per_image: how many detections are kept per picture.
        in_chans: channels of the pictures.

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
        output_norm: bool = False,
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
        roi_sampling_ratio: int = 2,
        box_head_features: int = 1024,
        box_fg_iou_threshold: float = 0.5,
        box_bg_iou_threshold: float = 0.5,
        box_batch_size_per_image: int = 512,
        box_positive_fraction: float = 0.25,
        score_threshold: float = 0.05,
        nms: Suppression = "hard",
        nms_threshold: float = 0.5,
        soft_nms_sigma: float = 0.5,
        detections_per_image: int = 100,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it counts foreground classes and must be at least 1")
        self.num_classes = num_classes
        self.transform = ImageTransform(min_size, max_size, image_mean, image_std)
        body = TimmPyramid(
            backbone,
            pretrained=pretrained_backbone,
            weights=backbone_weights,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            output_norm=output_norm,
            frozen_stages=frozen_stages,
            batch_norm=batch_norm,
            gradient_checkpointing=gradient_checkpointing,
            channels_last=channels_last,
        )
        self.backbone = PyramidFPN(body, fpn_channels)
        levels = len(body.strides)
        if len(anchor_sizes) != levels + 1:
            raise ValueError(
                f"anchor_sizes has {len(anchor_sizes)} groups; expected one for each of {levels + 1} levels"
            )
        anchors = _Anchors(tuple(map(tuple, anchor_sizes)), (tuple(aspect_ratios),) * (levels + 1))
        self.rpn = RegionProposalNetwork(
            anchors,
            _RPNHead(fpn_channels, anchors.num_anchors_per_location()[0]),
            rpn_fg_iou_threshold,
            rpn_bg_iou_threshold,
            rpn_batch_size_per_image,
            rpn_positive_fraction,
            {"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test},
            {"training": rpn_post_nms_top_n_train, "testing": rpn_post_nms_top_n_test},
            rpn_nms_threshold,
            rpn_score_threshold,
        )
        pooler = MultiScaleRoIAlign([str(i) for i in range(levels)], roi_output_size, roi_sampling_ratio)
        self.roi_heads = _RoIHeads(
            pooler,
            TwoMLPHead(fpn_channels * roi_output_size**2, box_head_features),
            _BoxPredictor(box_head_features, num_classes + 1),  # torchvision's background is class 0
            box_fg_iou_threshold,
            box_bg_iou_threshold,
            box_batch_size_per_image,
            box_positive_fraction,
            None,
            score_threshold,
            nms_threshold,
            detections_per_image,
        )
        self.nms = nms
        self.roi_heads.soft_nms_sigma = soft_nms_sigma

    @property
    def nms(self) -> Suppression:
        """What happens to overlapping detections of a class; can be changed at any time."""
        return self.roi_heads.nms

    @nms.setter
    def nms(self, method: Suppression) -> None:
        check_suppression(method)
        self.roi_heads.nms = method

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> dict[str, Tensor] | list[Detection]:
        """Compute the losses in training mode, the detections in evaluation mode.

        Args:
            images: uint8 or float in 0..1, each [C, H, W] of its own size.
            targets: the objects of each picture, in training.

        Returns:
            In training the weighted losses ``loss_objectness``, ``loss_rpn_box_reg``, ``loss_classifier`` and
            ``loss_box_reg``, float32 scalars whose sum is the objective; else one `Detection` per picture.

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


class _RoIHeads(RoIHeads):
    """torchvision's heads with a choice of suppression."""

    nms: Suppression = "hard"
    soft_nms_sigma = 0.5

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Choose the detections of each picture; as torchvision does, but for the suppression."""
        counts = [len(p) for p in proposals]
        all_boxes = torch.split(self.box_coder.decode(box_regression, proposals), counts)  # [R, classes + 1, 4]
        all_scores = torch.split(class_logits.softmax(-1), counts)  # [R, classes + 1]
        kept = []
        for boxes, scores, shape in zip(all_boxes, all_scores, image_shapes, strict=True):
            row, column = torch.where(scores[:, 1:] > self.score_thresh)  # column 0 is the background
            boxes, scores = clip_boxes_to_image(boxes[row, column + 1], shape), scores[row, column + 1]
            large = remove_small_boxes(boxes, min_size=1e-2)
            each = boxes[large], scores[large], column[large] + 1
            each = suppress(*each, self.nms, self.nms_thresh, self.soft_nms_sigma)
            kept.append([values[: self.detections_per_img] for values in each])
        return [k[0] for k in kept], [k[1] for k in kept], [k[2] for k in kept]


class _Anchors(AnchorGenerator):
    """torchvision's anchors in float32, whatever the features are."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        # only shape, dtype and device of the maps are used: a view of one element stands for each
        maps = [x.new_empty(1, dtype=torch.float32).expand(x.shape) for x in feature_maps]
        anchors: list[Tensor] = super().forward(image_list, maps)
        return anchors


class _RPNHead(RPNHead):
    """torchvision's head; boxes decoded from bfloat16 deltas would be off by pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [o.float() for o in objectness], [d.float() for d in deltas]


class _BoxPredictor(FastRCNNPredictor):
    """torchvision's predictor with float32 scores and deltas."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()
