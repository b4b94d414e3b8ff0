"""AP of groups of objects, such as sizes or shapes, and what each image costs in mAP; both from one matching."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.metrics.average_precision import average_precision, mean_over_classes
from lightning_convnext_det.metrics.matching import Matches
from lightning_convnext_det.metrics.objects import Objects


def group_ap(
    matches: Matches, objects: Objects, object_group: NDArray[np.int64], detection_group: NDArray[np.int64], groups: int
) -> NDArray[np.float64]:
    """AP of each group of objects, mean over the classes that have objects in it.

    A true positive belongs to its object's group, a false positive to that of its own box; those of other groups are
    ignored. COCO's size metrics differ a little: they match anew for each size.

    Args:
        matches: of all images.
        objects: of the same images.
        object_group: of each object, 0 ... groups - 1, [M].
        detection_group: of each detection by its own box, [N].
        groups: how many.

    Returns:
        [T, groups]; nan for a group without objects.
    """
    table = np.full((len(matches.is_true_positive), groups), np.nan)
    right = matches.is_true_positive
    rows = np.where(right, objects.offset[matches.image] + matches.object, -1)
    group = np.where(right, np.append(object_group, -1)[rows], detection_group)  # [T, N]
    num_classes = len(matches.num_objects)
    for index in range(groups):
        counted = (object_group == index) & ~objects.is_ignored
        chosen = matches._replace(
            is_true_positive=right & (group == index),
            is_ignored=matches.is_ignored | (group != index),
            num_objects=np.bincount(objects.label[counted], minlength=num_classes).astype(np.int64),
        )
        table[:, index] = mean_over_classes(average_precision(chosen))
    return table


def quantile_edges(values: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    """Edges between groups of equally many values, ascending and each once, [at most groups - 1]."""
    if len(values) == 0:
        return np.zeros(0)
    edges = np.unique(np.quantile(values, np.arange(1, groups) / groups))
    inner: NDArray[np.float64] = edges[(edges > values.min()) & (edges <= values.max())]
    return inner


def group_of(values: NDArray[np.float64], edges: Sequence[float] | NDArray[np.float64]) -> NDArray[np.int64]:
    """The group of each value: how many edges are not above it, [N]."""
    groups: NDArray[np.int64] = np.searchsorted(np.asarray(edges), values, side="right").astype(np.int64)
    return groups


def image_losses(matches: Matches, objects: Objects) -> NDArray[np.float64]:
    """How much mAP each image costs, to first order: by its false positives, and by its objects that are not found.

    A false positive lowers the precision of all true positives below it; an object that is not found, or only at lower
    IoU thresholds, lowers the recall. The mean over IoU thresholds and classes, as in mAP, [I] in [0, 1].
    """
    num_images, num_classes = len(objects.offset) - 1, len(matches.num_objects)
    lost = np.zeros(num_images)
    order = np.argsort(-matches.score, kind="stable")
    present = np.flatnonzero(matches.num_objects)
    per_image = objects.per_image(num_classes)
    for label in present:
        rows = order[matches.label[order] == label]
        num_objects = matches.num_objects[label]
        for right, ignored in zip(matches.is_true_positive[:, rows], matches.is_ignored[:, rows], strict=True):
            kept, hits, image = rows[~ignored], right[~ignored], matches.image[rows[~ignored]]
            rank = np.arange(1, len(kept) + 1)
            precision = np.cumsum(hits) / rank
            # of each true positive, what one false positive fewer above it would add to its precision
            gain = np.where(hits, precision / np.maximum(rank - 1, 1), 0.0)
            below = gain[::-1].cumsum()[::-1] - gain
            np.add.at(lost, image[~hits], below[~hits] / num_objects)
            missed = per_image[:, label] - np.bincount(image[hits], minlength=num_images)
            lost += missed / num_objects
    mean: NDArray[np.float64] = lost / max(1, len(present) * len(matches.is_true_positive))
    return mean
