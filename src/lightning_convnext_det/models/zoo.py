"""The detectors by name."""

import fnmatch
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from lightning_convnext_det.models.deformable_detr.dino import DINO
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.suggestions import suggest

_CONVNEXT = ("tiny", "small", "base", "large", "xlarge")
_CONVNEXT_V2 = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")

_DETR: dict[str, Callable[..., nn.Module]] = {
    "deformable_detr": partial(DeformableDETR, box_refinement=False),
    "deformable_detr_boxref": DeformableDETR,
    "deformable_detr_two_stage": partial(DeformableDETR, two_stage=True),
}
_DETR_BACKBONES = (
    *(f"convnext_{size}" for size in _CONVNEXT),
    *(f"convnextv2_{size}" for size in _CONVNEXT_V2),
    "resnet50",
)

# name -> detector and its backbone; None where the caller names the backbone
_DETECTORS: dict[str, tuple[Callable[..., nn.Module], str | None]] = {
    "fasterrcnn_fpn": (FasterRCNN, None),
    **{f"fasterrcnn_convnext_{size}_fpn": (FasterRCNN, f"convnext_{size}") for size in _CONVNEXT},
    **{f"fasterrcnn_convnextv2_{size}_fpn": (FasterRCNN, f"convnextv2_{size}") for size in _CONVNEXT_V2},
    "fasterrcnn_resnet50_fpn": (FasterRCNN, "resnet50"),
    "fasterrcnn_resnext50_32x4d_fpn": (FasterRCNN, "resnext50_32x4d"),
    "cascadercnn_fpn": (CascadeRCNN, None),
    **{f"cascadercnn_convnext_{size}_fpn": (CascadeRCNN, f"convnext_{size}") for size in _CONVNEXT},
    **{name: (detector, None) for name, detector in _DETR.items()},
    "dino": (DINO, None),
    **{f"dino_{backbone}": (DINO, backbone) for backbone in _DETR_BACKBONES},
    "dino_resnet50": (partial(DINO, out_norm=False), "resnet50"),  # its maps are not normed, as in detrex
    **{f"{name}_{backbone}": (detector, backbone) for name, detector in _DETR.items() for backbone in _DETR_BACKBONES},
}


def list_detectors(pattern: str = "*") -> list[str]:
    """List the named detectors that match a shell pattern such as ``*convnext*``."""
    return sorted(fnmatch.filter(_DETECTORS, pattern))


def backbone_of(name: str) -> str | None:
    """The timm name of a named detector's backbone; None if the caller names it."""
    return _DETECTORS[name][1]


# the overrides are the keywords of whichever detector is named; an unknown one is refused below
def create_detector(name: str, num_classes: int, pretrained_backbone: bool = False, **overrides: Any) -> nn.Module:
    """Build a named detector.

    Args:
        name: one of `list_detectors`; ``fasterrcnn_fpn`` takes any timm name as ``backbone``.
        num_classes: foreground classes.
        pretrained_backbone: start from timm's pretrained weights of the backbone.
        overrides: any other argument of the detector's constructor.

    Raises:
        ValueError: if the name is unknown; close matches are suggested.
        TypeError: if an override is not an argument of this detector.
    """
    if name not in _DETECTORS:
        raise ValueError(f"no detector is called '{name}'; {suggest(name, list(_DETECTORS))}")
    detector, backbone = _DETECTORS[name]
    if backbone is None and "backbone" not in overrides:
        raise TypeError(f"'{name}' needs the timm name of its backbone, e.g. backbone='convnext_tiny'")
    if backbone is not None:
        overrides.setdefault("backbone", backbone)
    check_keywords(detector, f"'{name}'", overrides)
    return detector(num_classes=num_classes, pretrained_backbone=pretrained_backbone, **overrides)


def check_keywords(callee: Callable[..., nn.Module], name: str, given: Iterable[str]) -> None:
    """Refuse arguments that a constructor does not have.

    Raises:
        TypeError: naming the argument and the closest known ones.
    """
    known = arguments_of(callee)
    for key in given:
        if key not in known:
            raise TypeError(f"{name} has no argument '{key}'; {suggest(key, known)}")


def arguments_of(callee: Callable[..., nn.Module]) -> list[str]:
    """List the arguments of a detector's constructor, those that it hands on to its base class too."""
    parameters = inspect.signature(callee).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if len(names) < len(parameters) and isinstance(callee, type):
        replaced = getattr(callee, "replaced", ())  # what the class gives to its base itself
        names += [name for name in arguments_of(callee.__mro__[1]) if name not in (*names, *replaced)]
    return names
