"""The annotated objects of a dataset and the overlaps of detections with them, as flat arrays over all images."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_convnext_det.metrics.matching import Matches, pairwise_iou

_Number = TypeVar("_Number", bound=np.generic)


class Objects(NamedTuple):
    """Annotated objects of all images, [M] in the order of images and targets."""

    image: NDArray[np.int64]
    """Position of the image among those given."""
    label: NDArray[np.int64]
    box: NDArray[np.float64]
    """Corners in pixels, [M, 4]."""
    area: NDArray[np.float64]
    """Square pixels, as annotated where it is."""
    is_ignored: NDArray[np.bool_]
    """Crowd regions and VOC's difficult objects."""
    is_crowd: NDArray[np.bool_]
    offset: NDArray[np.int64]
    """Row of the first object of each image, [I + 1]."""

    def per_image(self, num_classes: int) -> NDArray[np.int64]:
        """How many objects of each class count in each image, [I, C]."""
        counts = np.zeros((len(self.offset) - 1, num_classes), np.int64)
        kept = ~self.is_ignored
        np.add.at(counts, (self.image[kept], self.label[kept]), 1)
        return counts


def flatten_targets(targets: Sequence[Mapping[str, Tensor]]) -> Objects:
    """Join the targets of all images.

    >>> import torch
    >>> target = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.tensor([1])}
    >>> flatten_targets([target, target]).per_image(2).tolist()
    [[0, 1], [0, 1]]

    Args:
        targets: ``boxes`` [G, 4] and ``labels`` [G] of each image; ``iscrowd``, ``difficult`` and ``area`` [G] where
            there are any.
    """
    lengths = np.array([len(target["labels"]) for target in targets], np.int64)
    boxes = _joined([target["boxes"].numpy().reshape(-1, 4).astype(np.float64) for target in targets], (0, 4))
    crowd = _joined([_flag(target, "iscrowd") for target in targets], (0,))
    difficult = _joined([_flag(target, "difficult") for target in targets], (0,))
    own = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    area = _joined([_given_area(target) for target in targets], (0,))
    return Objects(
        image=np.repeat(np.arange(len(targets)), lengths),
        label=_joined([target["labels"].numpy() for target in targets], (0,)).astype(np.int64),
        box=boxes,
        area=np.where(np.isnan(area), own, area),
        is_ignored=crowd | difficult,
        is_crowd=crowd,
        offset=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def detection_boxes(matches: Matches, detections: Sequence[Mapping[str, Tensor]]) -> NDArray[np.float64]:
    """The boxes of the detections in the order of the matches, [N, 4]."""
    lengths = np.array([len(detection["labels"]) for detection in detections], np.int64)
    boxes = _joined([detection["boxes"].numpy().reshape(-1, 4).astype(np.float64) for detection in detections], (0, 4))
    start = np.concatenate([[0], np.cumsum(lengths)])
    return boxes[start[matches.image] + matches.detection]


class Overlaps(NamedTuple):
    """The objects that count nearest to each detection, [N]; index -1 and IoU 0 where the image has none."""

    same_iou: NDArray[np.float64]
    """Highest IoU with an object of the detection's class."""
    same: NDArray[np.int64]
    """Row of that object."""
    other_iou: NDArray[np.float64]
    """Highest IoU with an object of another class."""
    other: NDArray[np.int64]
    used_iou: NDArray[np.float64]
    """Highest IoU with an object of the class that a detection is matched with."""
    matched_iou: NDArray[np.float64]
    """IoU with the object that the detection is matched with, 0 for none."""


def find_overlaps(matches: Matches, boxes: NDArray[np.float64], objects: Objects, threshold: int = 0) -> Overlaps:
    """Compare every detection with all objects of its image that count.

    Args:
        matches: of the same images.
        boxes: of the detections in the order of the matches, [N, 4].
        objects: of the same images.
        threshold: index of the IoU threshold by which objects are used.
    """
    count = len(matches.score)
    zeros, nowhere = np.zeros(count), np.full(count, -1, np.int64)
    result = Overlaps(zeros, nowhere, zeros.copy(), nowhere.copy(), zeros.copy(), zeros.copy())
    used = np.zeros(len(objects.label), np.bool_)
    right = matches.is_true_positive[threshold]
    rows = objects.offset[matches.image] + matches.object[threshold]
    used[rows[right]] = True
    starts = np.searchsorted(matches.image, np.arange(len(objects.offset)))
    for image in range(len(objects.offset) - 1):
        mine = slice(starts[image], starts[image + 1])
        theirs = np.arange(objects.offset[image], objects.offset[image + 1])
        theirs = theirs[~objects.is_ignored[theirs]]
        if mine.start == mine.stop or len(theirs) == 0:
            continue
        ious = pairwise_iou(boxes[mine], objects.box[theirs], np.zeros(len(theirs), np.bool_))
        same = matches.label[mine, None] == objects.label[theirs]
        for values, places, mask in (
            (result.same_iou, result.same, same), (result.other_iou, result.other, ~same),
        ):  # fmt: skip
            masked = np.where(mask, ious, 0.0)
            best = masked.argmax(1)
            values[mine] = masked[np.arange(len(best)), best]
            places[mine] = np.where(values[mine] > 0, theirs[best], -1)
        result.used_iou[mine] = np.where(same & used[theirs], ious, 0.0).max(1)
    matched = np.flatnonzero(right)
    result.matched_iou[matched] = paired_iou(boxes[matched], objects.box[rows[matched]])
    return result


def paired_iou(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of each box with the box of the same row, [N]."""
    low, high = np.maximum(boxes[:, :2], others[:, :2]), np.minimum(boxes[:, 2:], others[:, 2:])
    common = (high - low).clip(min=0).prod(-1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(-1) + (others[:, 2:] - others[:, :2]).prod(-1) - common
    iou: NDArray[np.float64] = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return iou


def _flag(target: Mapping[str, Tensor], name: str) -> NDArray[np.bool_]:
    if name not in target:
        return np.zeros(len(target["labels"]), np.bool_)
    return target[name].numpy().astype(np.bool_)


def _given_area(target: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """The areas as annotated, nan where they are not."""
    if "area" not in target:
        return np.full(len(target["labels"]), np.nan)
    return target["area"].numpy().astype(np.float64)


def _joined(arrays: Sequence[NDArray[_Number]], empty: tuple[int, ...]) -> NDArray[_Number]:
    return np.concatenate(arrays) if arrays else np.zeros(empty)  # type: ignore[return-value]  # holds nothing
