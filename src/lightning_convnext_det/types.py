"""The input and the output of a detector: targets and detections, by torchvision's conventions."""

import operator
from collections.abc import Mapping
from typing import NamedTuple, NotRequired, TypedDict

from torch import Tensor


class Target(TypedDict):
    """The annotated objects of one image; a detector in training takes one for each image.

    Training needs ``boxes`` and ``labels``; the other keys serve evaluation and messages. Labels count from 0 and the
    background has none, unlike torchvision's, which begin at 1.

    >>> import torch
    >>> target = Target(boxes=torch.tensor([[10.0, 20.0, 50.0, 60.0]]), labels=torch.tensor([0]))
    >>> nothing = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    """

    boxes: Tensor
    """Corners (x1, y1, x2, y2) in pixels of the image, x1 < x2 and y1 < y2, float32 [N, 4]."""
    labels: Tensor
    """Class indices 0 ... num_classes - 1, int64 [N]."""
    iscrowd: NotRequired[Tensor]
    """Regions that evaluation ignores, by the share of a detection inside, bool or int [N].

    Training learns neither their boxes nor background from predictions that lie in them for at least half.
    """
    ignored: NotRequired[Tensor]
    """Boxes of those regions, in the targets that a detector prepares for its losses, float32 [K, 4]."""
    difficult: NotRequired[Tensor]
    """VOC's difficult objects, which evaluation ignores by their IoU with a detection, bool [N]; absent in training."""
    area: NotRequired[Tensor]
    """Areas in square pixels as annotated, by which evaluation groups objects into sizes, float32 [N]."""
    negative_labels: NotRequired[Tensor]
    """Classes verified to be absent, int64 [K]. A target with this key is evaluated as LVIS does: detections of classes
    that are neither here nor among ``labels`` do not count."""
    not_exhaustive_labels: NotRequired[Tensor]
    """Classes some of whose objects are not annotated, whose unmatched detections evaluation ignores, int64 [K]."""
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
    """The objects that a detector finds in one image, by descending score.

    >>> import torch
    >>> from lightning_convnext_det import FasterRCNN
    >>> detector = FasterRCNN(3, backbone="test_convnext", min_size=64, max_size=96).eval()
    >>> with torch.no_grad():
    ...     detection = detector([torch.rand(3, 64, 80)])[0]
    >>> sorted(detection)
    ['boxes', 'labels', 'scores']
    >>> detection["boxes"].shape[1]
    4
    """

    boxes: Tensor
    """Corners (x1, y1, x2, y2) in pixels of the image, float32 [N, 4]."""
    labels: Tensor
    """Class indices 0 ... num_classes - 1, int64 [N]."""
    scores: Tensor
    """Confidences in [0, 1], float32 [N]."""


class TensorDetections(NamedTuple):
    """The objects that a detector finds in a batch, as tensors of shapes that do not depend on what is found.

    What ``forward_tensors`` of a detector returns; rows are by descending score, and zeros beyond ``count``.
    """

    boxes: Tensor
    """Corners (x1, y1, x2, y2) in pixels of the batch's images, float32 [B, K, 4]; K is ``detections_per_image``."""
    scores: Tensor
    """Confidences in [0, 1], float32 [B, K]."""
    labels: Tensor
    """Class indices 0 ... num_classes - 1, int64 [B, K]."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    """How many rows of each image are detections, int64 [B]."""
