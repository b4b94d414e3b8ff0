"""What goes into a detector and what comes out of it."""

import operator
from collections.abc import Mapping
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
    iscrowd: NotRequired[Tensor]
    """Regions that evaluation ignores, bool or int [N]; absent in training."""
    area: NotRequired[Tensor]
    """Areas in square pixels as the annotation states them, float32 [N]."""
    image_id: NotRequired[int | Tensor]
    """The dataset's own id of the image: an int or, as in torchvision's tutorials, a tensor with one element."""
    file_name: NotRequired[str]
    """The image's file, for messages."""


def image_id_of(target: Mapping[str, object]) -> int | None:
    """The id of a target's image as an int; None if it has none.

    Raises:
        TypeError: if ``image_id`` is neither an int nor a tensor with one integer.
    """
    value = target.get("image_id")
    if value is None:
        return None
    try:
        return operator.index(value.squeeze() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"image_id is {value!r}; give an int or a tensor with one integer") from None


class Detection(TypedDict):
    """What a detector finds in one image, by descending score."""

    boxes: Tensor
    """Corners (x1, y1, x2, y2) in pixels of the image given, float32 [N, 4]."""
    labels: Tensor
    """Class indices 0 ... num_classes - 1, int64 [N]."""
    scores: Tensor
    """Confidences in [0, 1], float32 [N]."""
