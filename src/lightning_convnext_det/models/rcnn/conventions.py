"""Where torchvision's and MMDetection's two-stage detectors differ, as one dataclass with two named values.

Neither is better, but weights that were trained under one give other boxes under the other: half a pixel of RoIAlign
alone moves all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from lightning_convnext_det.arguments import NonNegative, NonNegativeInt, check_arguments
from lightning_convnext_det.models.image_transform import Resize
from lightning_convnext_det.ops.nms import Separation
from lightning_convnext_det.suggestions import suggest

ConventionName = Literal["torchvision", "mmdetection"]
BoxCoding = Literal["torchvision", "mmdetection"]
Matching = Literal["torchvision", "mmdetection"]
LevelMargin = Literal["level", "side"]
ProposalLoss = Literal["smooth_l1", "l1"]
BoxLoss = Literal["smooth_l1", "l1", "giou"]


def _check_kind(name: str, value: object, is_switch: bool) -> None:
    if is_switch != isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected {'true or false' if is_switch else 'a number or a word'}")


@dataclass(frozen=True)
class Convention:
    """Details of a two-stage detector that its weights depend on; the defaults are torchvision's.

    >>> Convention().roi_sampling_ratio, MMDETECTION.roi_sampling_ratio
    (2, 0)
    >>> resolve_convention({"base": "mmdetection", "roi_aligned": False}, CONVENTIONS, "torchvision").roi_aligned
    False

    Args:
        resize: ``torchvision`` interpolates normalised images, ``opencv`` 8-bit ones as mmdetection does,
            ``pillow`` 8-bit ones with antialiasing as detectron2 and detrex do.
        anchor_rounding: round anchors to whole pixels.
        fixed_strides: take the strides of the pyramid for anchors and RoIAlign, instead of deriving them from the
            sizes of feature maps and images.
        roi_aligned: shift boxes by half a pixel in RoIAlign, so that their corners mean the edges of pixels.
        roi_sampling_ratio: sampling points along each side of a bin; 0 takes as many as a bin has pixels, rounded up.
        roi_level_margin: what 1e-6 is added to when a box gets its pyramid level: ``level`` or ``side``.
        box_coding: ``torchvision`` limits how much a side may grow, ``mmdetection`` also how much it may shrink.
        min_proposal_side: proposals with a shorter side are dropped, in pixels; those without area always are.
        min_detection_side: detections with a shorter side are dropped, in pixels.
        nms_separation: how NMS keeps classes and levels apart, see `grouped_nms`.
        matching: how boxes are matched with ground truth in training, see `BestOverlapMatcher`. ``mmdetection`` never
            matches an anchor that overlaps its object by less than 0.3.
        rpn_skip_crossing: leave anchors that cross the image's border out of the training; only with matching
            ``mmdetection``.
        rpn_box_loss: ``smooth_l1`` or ``l1`` of the deltas of proposals.
        box_loss: ``smooth_l1`` or ``l1`` of the deltas of detections, or ``giou`` of the decoded boxes.
        box_smooth_l1_beta: below this difference of deltas, the ``smooth_l1`` of detections is quadratic.
        box_loss_weight: factor of the box loss of detections (default: 10 for ``giou``, as in MMDetection, else 1).

    Raises:
        TypeError: if a value is of another type.
        ValueError: if a value is not among the choices or below 0.
    """

    resize: Resize = "torchvision"
    anchor_rounding: bool = True
    fixed_strides: bool = False
    roi_aligned: bool = False
    roi_sampling_ratio: NonNegativeInt = 2
    roi_level_margin: LevelMargin = "level"
    box_coding: BoxCoding = "torchvision"
    min_proposal_side: NonNegative = 1e-3
    min_detection_side: NonNegative = 1e-2
    nms_separation: Separation = "torchvision"
    matching: Matching = "torchvision"
    rpn_skip_crossing: bool = False
    rpn_box_loss: ProposalLoss = "smooth_l1"
    box_loss: BoxLoss = "smooth_l1"
    box_smooth_l1_beta: NonNegative = 1 / 9
    box_loss_weight: NonNegative | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        check_arguments(Convention.__init__, vars(self))
        for field in fields(self):
            _check_kind(field.name, getattr(self, field.name), isinstance(field.default, bool))
        if self.rpn_skip_crossing and self.matching == "torchvision":
            raise ValueError("rpn_skip_crossing=True needs matching='mmdetection'; torchvision trains on every anchor")


# torchvision 0.29, FasterRCNN: models/detection/{anchor_utils,_utils,rpn,roi_heads,transform}.py and ops/poolers.py
TORCHVISION = Convention()
# MMDetection 3.3 with the configuration of the ConvNeXt authors' Mask R-CNN
MMDETECTION = Convention(
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
CONVENTIONS: dict[ConventionName, Convention] = {"torchvision": TORCHVISION, "mmdetection": MMDETECTION}

ConventionSetting = ConventionName | dict[str, bool | int | float | str] | Convention
"""A convention by name, as a mapping of ``base`` and the points that differ from it, or as the dataclass."""


def resolve_convention(
    setting: ConventionSetting | None, named: Mapping[ConventionName, Convention], default: ConventionName
) -> Convention:
    """Build the convention that a detector's argument asks for.

    Args:
        setting: a name, the dataclass, or a mapping such as ``{"base": "mmdetection", "roi_aligned": False}``.
        named: what the names mean for this detector.
        default: the name for None, and for a mapping without ``base``.

    Raises:
        TypeError: if it is none of these, or a value is of another type.
        ValueError: if a name, a point or a choice is unknown.
    """
    if isinstance(setting, Convention):
        return setting
    if setting is not None and not isinstance(setting, str | dict):
        raise TypeError(f"convention is a {type(setting).__name__}; give a name, a mapping or a Convention")
    changes = dict(setting) if isinstance(setting, dict) else {"base": setting or default}
    base = changes.pop("base", default)
    if base not in named:
        raise ValueError(f"convention is '{base}'; choose one of {', '.join(named)}")
    points = [field.name for field in fields(Convention)]
    for name in changes:
        if name not in points:
            raise ValueError(f"convention has no point '{name}'; {suggest(str(name), points)}")
    return replace(named[base], **changes)  # type: ignore[index]  # names and values are checked
