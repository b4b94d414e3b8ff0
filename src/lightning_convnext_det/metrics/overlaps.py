"""IoU of detections with annotated objects, over all images."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_convnext_det.metrics.iou import paired_iou, pairwise_iou
from lightning_convnext_det.metrics.matching import Matches
from lightning_convnext_det.metrics.objects import Objects, join_arrays


def detection_boxes(matches: Matches, detections: Sequence[Mapping[str, Tensor]]) -> NDArray[np.float64]:
    """The boxes of the detections in the order of the matches, [N, 4]."""
    lengths = np.array([len(detection["labels"]) for detection in detections], np.int64)
    boxes = join_arrays(
        [detection["boxes"].numpy().reshape(-1, 4).astype(np.float64) for detection in detections], (0, 4)
    )
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
        ious = pairwise_iou(boxes[mine], objects.box[theirs])
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
