"""Cascade R-CNN (arXiv:1712.00726) on any timm backbone: Faster R-CNN with several box heads, one after the other.

Each stage is trained on the boxes of the one before, with a higher IoU threshold for what is an object, so that the
last one still has objects to learn from at an IoU of 0.7. The network and its training are those of the ConvNeXt
authors' detectors (Cascade Mask R-CNN of MMDetection without the mask branch); with their weights it gives their boxes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from lightning_convnext_det.arguments import Count, Fraction, NonNegative, check_arguments
from lightning_convnext_det.models.rcnn.conventions import MMDETECTION, TORCHVISION, Convention, ConventionName
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.rcnn.matcher import Sampling
from lightning_convnext_det.models.rcnn.roi_heads import BoxHeadKind, CascadeHeads, StageBuilder

# arXiv:1712.00726, section 4.2, as rounded in the configurations of MMDetection; later stages move boxes less
_STAGE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


class CascadeRCNN(FasterRCNN):
    """Cascade R-CNN with a feature pyramid on any timm backbone.

    Images, targets and detections are those of `FasterRCNN`; the losses of the box heads are numbered by stage.

    >>> import torch
    >>> detector = CascadeRCNN(3, backbone="test_convnext", min_size=64, fpn_channels=32)
    >>> target = {"boxes": torch.tensor([[4.0, 8.0, 30.0, 40.0]]), "labels": torch.tensor([2])}
    >>> losses = detector([torch.rand(3, 48, 64)], [target])
    >>> sorted(losses)  # doctest: +NORMALIZE_WHITESPACE
    ['loss_box_1', 'loss_box_2', 'loss_box_3', 'loss_classification_1', 'loss_classification_2',
     'loss_classification_3', 'loss_objectness', 'loss_rpn_box']
    >>> with torch.no_grad():
    ...     detections = detector.eval()([torch.rand(3, 48, 64)])
    >>> sorted(detections[0])
    ['boxes', 'labels', 'scores']

    Args:
        num_classes: foreground classes; labels run from 0 to ``num_classes - 1``.
        backbone: timm name of the backbone, e.g. ``convnext_tiny``, ``swin_tiny_patch4_window7_224``, ``resnet50``.
        stage_iou_thresholds: IoU from which a box is an object, for each of up to three stages.
        stage_loss_weights: factor of the losses of each stage.
        shared: the arguments of `FasterRCNN` but for ``box_fg_iou_threshold`` and ``box_bg_iou_threshold``; the default
            of ``box_head`` is ``four_conv`` and that of ``convention`` ``mmdetection``.

    Raises:
        TypeError: if an argument is unknown.
        ValueError: if the stages do not fit together, or an argument is out of range.

    Reference:
        Cai and Vasconcelos, "Cascade R-CNN", arXiv:1712.00726; Liu et al., "A ConvNet for the 2020s",
        arXiv:2201.03545, whose detectors have these defaults.
    """

    # the losses are those of the ConvNeXt authors' Cascade Mask R-CNN, whatever the other details
    conventions: ClassVar[dict[ConventionName, Convention]] = {
        "torchvision": replace(TORCHVISION, box_loss="giou", box_smooth_l1_beta=1.0),
        "mmdetection": replace(
            MMDETECTION, rpn_box_loss="smooth_l1", rpn_skip_crossing=True, box_loss="giou", box_smooth_l1_beta=1.0
        ),
    }
    default_convention: ClassVar[ConventionName] = "mmdetection"
    default_box_head: ClassVar[BoxHeadKind] = "four_conv"
    replaced: ClassVar[tuple[str, ...]] = ("box_fg_iou_threshold", "box_bg_iou_threshold")
    """Arguments of `FasterRCNN` that this class gives itself."""

    def __init__(
        self,
        num_classes: Count,
        backbone: str = "convnext_tiny",
        stage_iou_thresholds: Sequence[Fraction] = (0.5, 0.6, 0.7),
        stage_loss_weights: Sequence[NonNegative] = (1.0, 0.5, 0.25),
        **shared: Any,  # the keywords of FasterRCNN
    ) -> None:
        check_arguments(CascadeRCNN.__init__, locals())
        stages = len(stage_iou_thresholds)
        if not 1 <= stages <= len(_STAGE_STDS) or len(stage_loss_weights) != stages:
            raise ValueError(
                f"stage_iou_thresholds has {stages} stages, stage_loss_weights {len(stage_loss_weights)}; "
                f"expected the same, at most {len(_STAGE_STDS)}"
            )
        if wrong := [name for name in self.replaced if name in shared]:
            raise TypeError(f"{wrong[0]} is for Faster R-CNN; give stage_iou_thresholds")
        # create_roi_heads, which FasterRCNN calls, needs them
        self.stage_iou_thresholds, self.stage_loss_weights = tuple(stage_iou_thresholds), tuple(stage_loss_weights)
        first = stage_iou_thresholds[0]
        super().__init__(num_classes, backbone, box_fg_iou_threshold=first, box_bg_iou_threshold=first, **shared)

    def create_roi_heads(self, stages: StageBuilder, sampling: Sampling) -> CascadeHeads:
        """Build the box heads: one for each stage, whose thresholds rise."""
        built = [
            stages.build(sampling._replace(fg_iou_threshold=iou, bg_iou_threshold=iou), stds, match_best=False)
            for iou, stds in zip(self.stage_iou_thresholds, _STAGE_STDS, strict=False)
        ]
        return CascadeHeads(built, self.stage_loss_weights)
