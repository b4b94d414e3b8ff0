"""Cascade R-CNN (arXiv:1712.00726) on a timm pyramid: Faster R-CNN with a second stage of several stages.

Each stage is trained on the boxes of the one before, with a stricter idea of what is an object, so that the last one
still has objects to learn from at an IoU of 0.7. The network and its training are those of the ConvNeXt authors'
detectors (Cascade Mask R-CNN of MMDetection without the mask branch); with their weights it gives their boxes.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lightning_convnext_det.models.rcnn.conventions import BoxLoss, Dialect
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.rcnn.roi_heads import BoxHeadKind, BoxHeads, CascadeHeads

# arXiv:1712.00726, section 4.2, as rounded in the configurations of MMDetection; later stages move boxes less
_STAGE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


class CascadeRCNN(FasterRCNN):
    """Cascade R-CNN with a feature pyramid on any timm backbone.

    Args:
        num_classes: foreground classes; labels run from 0 to ``num_classes - 1``.
        stage_iou_thresholds: IoU from which a box is an object, for each of up to three stages.
        stage_loss_weights: factor of the losses of each stage.
        box_head: ``four_conv`` (default) with BatchNorm and one fully connected layer (synchronised between processes
            by the trainer's ``sync_batchnorm``), or ``two_fc`` layers.
        box_loss: ``giou`` of the moved boxes (default), ``l1`` or ``smooth_l1`` of the deltas.
        box_loss_weight: its factor (default: 10 for ``giou``, as the ConvNeXt authors have it, else 1).
        box_smooth_l1_beta: below this difference of deltas, ``smooth_l1`` is quadratic (default: 1).
        rpn_box_loss: ``smooth_l1`` (default) or ``l1``, for proposals.
        rpn_skip_crossing: leave anchors that cross the image's border out of the training (default: yes).
        dialect: whose conventions to follow, ``mmdetection`` (default) or ``torchvision``.
        shared: the other arguments of `FasterRCNN`, but for ``box_fg_iou_threshold``.

    Raises:
        ValueError: if the stages do not fit together, or an argument makes no sense.

    Reference:
        Cai and Vasconcelos, "Cascade R-CNN", arXiv:1712.00726; Liu et al., "A ConvNet for the 2020s",
        arXiv:2201.03545, whose detectors have these defaults.
    """

    def __init__(
        self,
        num_classes: int,
        stage_iou_thresholds: Sequence[float] = (0.5, 0.6, 0.7),
        stage_loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
        box_head: BoxHeadKind | None = None,
        box_loss: BoxLoss | None = None,
        box_loss_weight: float | None = None,
        box_smooth_l1_beta: float | None = None,
        rpn_box_loss: BoxLoss | None = None,
        rpn_skip_crossing: bool | None = None,
        dialect: Dialect | None = None,
        **shared: Any,  # the keywords of FasterRCNN
    ) -> None:
        # None here as in FasterRCNN: the command line hands on the defaults of one detector to the other
        box_loss = box_loss or "giou"
        stages = len(stage_iou_thresholds)
        if not 1 <= stages <= len(_STAGE_STDS) or len(stage_loss_weights) != stages:
            raise ValueError(
                f"stage_iou_thresholds has {stages} stages, stage_loss_weights {len(stage_loss_weights)}; "
                f"expected the same, at most {len(_STAGE_STDS)}"
            )
        if shared.get("box_fg_iou_threshold", 0.5) != 0.5:  # the default, which the command line hands on
            raise ValueError("box_fg_iou_threshold is for Faster R-CNN; give stage_iou_thresholds")
        # create_roi_heads, which FasterRCNN calls, needs them
        self.stage_iou_thresholds, self.stage_loss_weights = tuple(stage_iou_thresholds), tuple(stage_loss_weights)
        super().__init__(
            num_classes,
            box_head=box_head or "four_conv",
            box_loss=box_loss,
            box_loss_weight=(10.0 if box_loss == "giou" else 1.0) if box_loss_weight is None else box_loss_weight,
            box_smooth_l1_beta=1.0 if box_smooth_l1_beta is None else box_smooth_l1_beta,
            rpn_box_loss=rpn_box_loss or "smooth_l1",
            rpn_skip_crossing=True if rpn_skip_crossing is None else rpn_skip_crossing,
            dialect=dialect or "mmdetection",
            **shared,
        )

    def create_roi_heads(self, create_stage: Callable[..., BoxHeads]) -> "CascadeHeads":
        """Build the stages."""
        stages = [
            create_stage(fg_iou_threshold=iou, bg_iou_threshold=iou, stds=stds, match_own=False)
            for iou, stds in zip(self.stage_iou_thresholds, _STAGE_STDS, strict=False)
        ]
        return CascadeHeads(stages, self.stage_loss_weights)
