"""Test-time augmentation: a detector looks at flipped and rescaled views of an image."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.models.image_transform import ImageTransform
from lightning_convnext_det.types import Detection

_FORM = "give 'flip', 'scales=0.8:1.0:1.25' or both, separated by a comma"


class View(NamedTuple):
    """How a detector looks at an image."""

    scale: float = 1.0
    """Factor of the detector's ``min_size`` and ``max_size``."""
    flip: bool = False
    """Whether the image is flipped horizontally."""


def parse_views(text: str) -> list[View]:
    """Read the views of test-time augmentation.

    >>> parse_views("flip,scales=0.8:1")
    [View(scale=0.8, flip=False), View(scale=0.8, flip=True), View(scale=1.0, flip=False), View(scale=1.0, flip=True)]

    Args:
        text: ``flip``, ``scales=`` with factors separated by colons, or both, separated by a comma.

    Raises:
        ValueError: if it reads otherwise, or a factor is not above 0.
    """
    flips, scales = [False], [1.0]
    for part in text.split(","):
        name, _, values = part.strip().partition("=")
        if name == "flip" and not values:
            flips = [False, True]
        elif name == "scales":
            scales = [_factor(value, text) for value in values.split(":")]
        else:
            raise ArgumentError(f"tta is '{text}'; {_FORM}")
    return [View(scale, flip) for scale in dict.fromkeys(scales) for flip in flips]


def _factor(value: str, text: str) -> float:
    try:
        factor = float(value)
    except ValueError:
        factor = 0.0
    if not 0 < factor < 100:
        raise ArgumentError(f"tta is '{text}', but '{value}' is no factor above 0; {_FORM}")
    return factor


class ViewDetector(nn.Module):
    """Finds objects in one view of each image; boxes are in pixels of the image that is given.

    >>> import torch
    >>> from lightning_convnext_det import FasterRCNN
    >>> detector = FasterRCNN(2, backbone="test_convnext", min_size=64, max_size=96).eval()
    >>> with torch.no_grad():
    ...     detections = ViewDetector(detector, View(scale=1.25, flip=True))([torch.rand(3, 48, 64)])
    >>> sorted(detections[0])
    ['boxes', 'labels', 'scores']

    Args:
        detector: in evaluation mode; for another scale than 1 it has an `ImageTransform`, as every detector here.
        view: what to look at.

    Raises:
        ValueError: if the detector cannot be rescaled.
    """

    def __init__(self, detector: nn.Module, view: View) -> None:
        super().__init__()
        if view.scale != 1:
            _check_resizable(detector)
        self.detector = detector
        self.view = view

    def forward(self, images: Sequence[Tensor] | Tensor) -> list[Detection]:
        """Find objects in images, uint8 or float in 0..1, each [C, H, W] of its own size, or stacked [B, C, H, W]."""
        seen = [image.flip(-1) for image in images] if self.view.flip else images
        with _rescaled(self.detector, self.view.scale):
            found: list[Detection] = self.detector(seen)
        if not self.view.flip:
            return found
        return [_flipped(detection, image.shape[-1]) for detection, image in zip(found, images, strict=True)]


def _flipped(detection: Detection, width: int) -> Detection:
    """Detections in an image that is flipped horizontally."""
    x1, y1, x2, y2 = detection["boxes"].unbind(1)
    boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    return Detection(boxes=boxes, labels=detection["labels"], scores=detection["scores"])


def _check_resizable(detector: nn.Module) -> None:
    transforms = [part for part in detector.modules() if isinstance(part, ImageTransform)]
    if not transforms:
        raise ArgumentError(f"{type(detector).__name__} has no ImageTransform, which scales images; use tta=flip")
    if any(transform.fixed_size for transform in transforms):
        raise ArgumentError("the detector has a fixed_size, to which it pads, so tta cannot scale images; use tta=flip")


@contextmanager
def _rescaled(detector: nn.Module, scale: float) -> Iterator[None]:
    """Multiply the sizes to which a detector resizes images for the duration of a call."""
    if scale == 1:
        yield
        return
    transforms = [part for part in detector.modules() if isinstance(part, ImageTransform)]
    sizes = [(transform.min_sizes, transform.max_size) for transform in transforms]
    try:
        for transform in transforms:
            transform.min_sizes = [max(1, round(side * scale)) for side in transform.min_sizes]
            transform.max_size = max(1, round(transform.max_size * scale))
        yield
    finally:
        for transform, (min_sizes, max_size) in zip(transforms, sizes, strict=True):
            transform.min_sizes, transform.max_size = min_sizes, max_size
