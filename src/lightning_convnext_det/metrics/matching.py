"""Matching of detections with annotated objects, as COCO's evaluation does it: greedily, the highest score first.

Precision, recall, F1, score thresholds and reports are computed from it. Unlike pycocotools, one pass gives flat arrays
over all images and classes, and VOC's ``difficult`` objects are ignored by VOC's rule (see `coco_map`).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_ALL_AREAS = (0.0, 1e10)  # square pixels; pycocotools' range "all"
_BELOW_ONE = 1 - 1e-10  # pycocotools' greatest threshold, so that an IoU of 1 passes a threshold of 1


class Matches(NamedTuple):
    """Detections of a dataset, [N] over all images, and which of them are right at each of [T] IoU thresholds.

    Images come in the order given; within an image, detections by descending score, equal scores in the detector's
    order. A stable sort by descending score therefore gives pycocotools' order. A detection that is neither a true
    positive nor ignored is a false positive.
    """

    image: NDArray[np.int64]
    """Position of the image among those given, [N]."""
    label: NDArray[np.int64]
    """Class index, [N]."""
    score: NDArray[np.float32]
    """Confidence in [0, 1], [N]."""
    detection: NDArray[np.int64]
    """Position in its image's detections as given, [N]."""
    object: NDArray[np.int64]
    """Position of the matched object in its image's target, -1 for none, [T, N]."""
    is_true_positive: NDArray[np.bool_]
    """Matched with an object that counts, [T, N]."""
    is_ignored: NDArray[np.bool_]
    """Matched with an ignored object, or unmatched and outside of the range of areas, [T, N]."""
    num_objects: NDArray[np.int64]
    """Objects of each class that count, [C]: neither crowd nor difficult, inside the range of areas."""


def match_detections(
    detections: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    num_classes: int,
    iou_thresholds: Sequence[float] = (0.5,),
    max_detections: int = 100,
    area_range: tuple[float, float] = _ALL_AREAS,
) -> Matches:
    """Match the detections of each image with its objects of the same class.

    >>> import torch
    >>> boxes, labels = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]), torch.tensor([0, 0])
    >>> detection = {"boxes": boxes, "labels": labels, "scores": torch.tensor([0.4, 0.9])}
    >>> matches = match_detections([detection], [{"boxes": boxes[:1], "labels": labels[:1]}], num_classes=1)
    >>> matches.score.tolist() == [torch.tensor(0.9).item(), torch.tensor(0.4).item()]
    True
    >>> matches.is_true_positive.tolist(), matches.num_objects.tolist()
    ([[False, True]], [1])

    Args:
        detections: ``boxes`` [D, 4], corners in pixels, ``labels`` [D] and ``scores`` [D] of each image, on the CPU.
        targets: ``boxes`` [G, 4] and ``labels`` [G] of each image; ``iscrowd``, ``difficult`` and ``area`` [G] where
            there are any.
        num_classes: foreground classes.
        iou_thresholds: least IoU of a match; T of them.
        max_detections: how many detections of a class in an image count, the best by score.
        area_range: objects with a smaller or larger area in square pixels are ignored.

    Reference:
        ``COCOeval.evaluateImg`` of pycocotools: objects that count are preferred to ignored ones; a crowd region, or a
        difficult object, takes any number of detections; IoU with a crowd is the share of the detection inside it.
    """
    parts = [
        _match_image(position, detection, target, iou_thresholds, max_detections, area_range)
        for position, (detection, target) in enumerate(zip(detections, targets, strict=True))
    ]
    parts = [*parts, _match_image(0, *_nothing(), iou_thresholds, max_detections, area_range)]  # at least one
    *arrays, labels = (np.concatenate(column, axis=-1) for column in zip(*parts, strict=True))
    return Matches._make([*arrays, np.bincount(labels, minlength=num_classes).astype(np.int64)])


def pairwise_iou(
    boxes: NDArray[np.float64], others: NDArray[np.float64], is_crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """IoU of boxes [D, 4] with objects [G, 4], corners; for a crowd, the share of the box inside it.

    Returns:
        In [0, 1], float64 [D, G]; 0 where both areas are 0.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (high - low).clip(min=0).prod(-1)  # [D, G]
    own, theirs = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, others))
    union = np.where(is_crowd[None], own[:, None], own[:, None] + theirs[None] - common)
    ious: NDArray[np.float64] = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return ious


def _match_image(
    position: int,
    detection: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    iou_thresholds: Sequence[float],
    max_detections: int,
    area_range: tuple[float, float],
) -> Matches:
    """The matches of one image; ``num_objects`` holds the labels of the objects that count instead."""
    scores, labels = detection["scores"].numpy(), detection["labels"].numpy()
    order = np.argsort(-scores, kind="stable")
    order = order[_rank_in_class(labels[order]) < max_detections]
    scores, labels = scores[order], labels[order]
    boxes = detection["boxes"].numpy().astype(np.float64)[order]
    objects, classes = target["boxes"].numpy().astype(np.float64).reshape(-1, 4), target["labels"].numpy()
    is_crowd, is_difficult = (_flag(target, name, len(objects)) for name in ("iscrowd", "difficult"))
    area = target["area"].numpy() if "area" in target else (objects[:, 2:] - objects[:, :2]).prod(-1)
    ignored = is_crowd | is_difficult | (area < area_range[0]) | (area > area_range[1])
    ious = np.where(labels[:, None] == classes[None], pairwise_iou(boxes, objects, is_crowd), -1.0)
    size = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    outside = (size < area_range[0]) | (size > area_range[1])
    matched = np.stack([_assign(ious, ignored, is_crowd | is_difficult, limit) for limit in iou_thresholds])  # [T, D]
    has_object = matched >= 0
    on_ignored = has_object & np.append(ignored, False)[matched]
    return Matches(
        image=np.full(len(order), position, np.int64),
        label=labels.astype(np.int64),
        score=scores.astype(np.float32),
        detection=order.astype(np.int64),
        object=matched,
        is_true_positive=has_object & ~on_ignored,
        is_ignored=on_ignored | (~has_object & outside),
        num_objects=classes[~ignored].astype(np.int64),
    )


def _assign(
    ious: NDArray[np.float64], ignored: NDArray[np.bool_], repeats: NDArray[np.bool_], threshold: float
) -> NDArray[np.int64]:
    """Give each detection, in order, the free object of highest IoU; those that count before ignored ones."""
    matched = np.full(len(ious), -1, np.int64)
    rows, columns = np.nonzero(ious >= min(threshold, _BELOW_ONE))  # few: most detections are near no object
    taken: set[int] = set()
    candidates: dict[int, list[int]] = {}
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        candidates.setdefault(row, []).append(column)
    for row, near in candidates.items():
        free = [column for column in near if column not in taken]
        if free:
            # of equal IoU the last, as in pycocotools
            best = max(free, key=lambda column: (not ignored[column], ious[row, column], column))
            matched[row] = best
            if not repeats[best]:
                taken.add(best)
    return matched


def _rank_in_class(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many earlier entries have the same label, [N]."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - starts
    return ranks


def _flag(target: Mapping[str, Tensor], name: str, length: int) -> NDArray[np.bool_]:
    return target[name].numpy().astype(np.bool_) if name in target else np.zeros(length, np.bool_)


def _nothing() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    boxes, labels = Tensor(0, 4), Tensor(0).long()
    return {"boxes": boxes, "labels": labels, "scores": Tensor(0)}, {"boxes": boxes, "labels": labels}
