"""The conventions in which torchvision's and MMDetection's two-stage detectors differ, as two named sets.

Neither is better, but weights that were trained under one give other boxes under the other: half a pixel of RoIAlign
alone moves all of them.
"""

from typing import Literal, NamedTuple, get_args

from lightning_convnext_det.ops.nms import Separation

Dialect = Literal["torchvision", "mmdetection"]
Resize = Literal["torchvision", "opencv"]
BoxCoding = Literal["torchvision", "mmdetection"]
Matching = Literal["torchvision", "mmdetection"]
LevelMargin = Literal["level", "side"]
BoxLoss = Literal["smooth_l1", "l1", "giou"]


class Conventions(NamedTuple):
    """One choice for each point; the arguments of `FasterRCNN` of the same names explain them."""

    resize: Resize
    anchor_rounding: bool
    fixed_strides: bool
    roi_aligned: bool
    roi_sampling_ratio: int
    roi_level_margin: LevelMargin
    box_coding: BoxCoding
    min_proposal_side: float
    min_detection_side: float
    nms_separation: Separation
    matching: Matching
    rpn_box_loss: BoxLoss
    box_loss: BoxLoss


# torchvision 0.29, FasterRCNN: models/detection/{anchor_utils,_utils,rpn,roi_heads,transform}.py and ops/poolers.py
_TORCHVISION = Conventions(
    resize="torchvision",
    anchor_rounding=True,
    fixed_strides=False,
    roi_aligned=False,
    roi_sampling_ratio=2,
    roi_level_margin="level",
    box_coding="torchvision",
    min_proposal_side=1e-3,
    min_detection_side=1e-2,
    nms_separation="torchvision",
    matching="torchvision",
    rpn_box_loss="smooth_l1",
    box_loss="smooth_l1",
)
# MMDetection 3.3 with the configuration of the ConvNeXt authors' Mask R-CNN
_MMDETECTION = Conventions(
    resize="opencv",
    anchor_rounding=False,
    fixed_strides=True,
    roi_aligned=True,
    roi_sampling_ratio=0,
    roi_level_margin="side",
    box_coding="mmdetection",
    min_proposal_side=0.0,
    min_detection_side=0.0,
    nms_separation="offset",
    matching="mmdetection",
    rpn_box_loss="l1",
    box_loss="l1",
)
DIALECTS: dict[Dialect, Conventions] = {"torchvision": _TORCHVISION, "mmdetection": _MMDETECTION}

_CHOICES = {
    "resize": get_args(Resize),
    "roi_level_margin": get_args(LevelMargin),
    "box_coding": get_args(BoxCoding),
    "nms_separation": get_args(Separation),
    "matching": get_args(Matching),
    "rpn_box_loss": ("smooth_l1", "l1"),
    "box_loss": get_args(BoxLoss),
}


def conventions(dialect: Dialect, **given: object) -> Conventions:
    """Take the conventions of a dialect, but for those that are given and not None.

    Raises:
        ValueError: if there is no such dialect, or no such choice for one of the points.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"dialect is '{dialect}'; choose one of {', '.join(DIALECTS)}")
    chosen = {name: value for name, value in given.items() if value is not None}
    for name, value in chosen.items():
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"{name} is '{value}'; choose one of {', '.join(_CHOICES[name])}")
    return DIALECTS[dialect]._replace(**chosen)  # type: ignore[arg-type]  # names and values are checked above
