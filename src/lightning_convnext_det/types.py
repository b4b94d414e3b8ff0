"""What goes into a detector and what comes out of it."""

from typing import NotRequired, TypedDict

from torch import Tensor


class Target(TypedDict):
    """The objects of one image.

    A detector in training needs ``boxes`` and ``labels`` only; the others serve evaluation and messages.
    """

    boxes: Tensor
    """Corners (x1, y1, x2, y2) in pixels of the image given, float32 [N, 4]."""
    labels: Tensor
    """Class indices 0 ... num_classes - 1, int64 [N]."""
    crowd: NotRequired[Tensor]
    """Regions that evaluation ignores, bool [N]; never present in training."""
    area: NotRequired[Tensor]
    """Areas in square pixels as the annotation states them, float32 [N]."""
    image_id: NotRequired[int]
    """The dataset's own id of the image."""
    file_name: NotRequired[str]
    """The image's file, for messages."""


class Detection(TypedDict):
    """What a detector finds in one image, by descending score."""

    boxes: Tensor
    """Corners (x1, y1, x2, y2) in pixels of the image given, float32 [N, 4]."""
    labels: Tensor
    """Class indices 0 ... num_classes - 1, int64 [N]."""
    scores: Tensor
    """Confidences in [0, 1], float32 [N]."""
