"""Matching of detections with annotated objects, as COCO's evaluation does it: greedily, the highest score first.

Precision, recall, F1, score thresholds and reports are computed from it. Unlike pycocotools, one pass matches all
images, classes, IoU thresholds and ranges of areas: what a detection is at each of them is a bit of one number, so the
greedy loop visits each pair of a detection and an object that overlap once. Two rules are not pycocotools':

- VOC's ``difficult`` objects are ignored by VOC's rule (see `coco_map`).
- In an image that is annotated as LVIS's are (``negative_labels``), detections of classes that were neither found nor
  verified as absent do not count, and unmatched ones of ``not_exhaustive_labels`` are ignored (lvis-api, ``LVISEval``).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_convnext_det.metrics.iou import paired_iou
from lightning_convnext_det.metrics.objects import Objects, flatten_targets, join_arrays

_ALL_AREAS = (0.0, 1e10)  # square pixels; pycocotools' range "all"
_BELOW_ONE = 1 - 1e-10  # pycocotools' greatest threshold, so that an IoU of 1 passes a threshold of 1
_CHUNK = 500_000  # pairs of boxes compared at once

Range = tuple[float, float]


class ScoredDetections(Protocol):
    """What precision and recall are computed from: `Matches`, or the same without boxes and objects."""

    @property
    def image(self) -> NDArray[np.int64]:
        """Position of the image, [N]."""

    @property
    def label(self) -> NDArray[np.int64]:
        """Class index, [N]."""

    @property
    def score(self) -> NDArray[np.float32]:
        """Confidence in [0, 1], [N]."""

    @property
    def is_true_positive(self) -> NDArray[np.bool_]:
        """Matched with an object that counts, [T, N]."""

    @property
    def is_ignored(self) -> NDArray[np.bool_]:
        """Neither right nor wrong, [T, N]."""

    @property
    def num_objects(self) -> NDArray[np.int64]:
        """Objects of each class that count, [C]."""


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


class AreaMatches(NamedTuple):
    """Detections matched at T IoU thresholds in A ranges of areas; bit ``a * T + t`` tells of range a and threshold t.

    The order of the detections is that of `Matches`.
    """

    image: NDArray[np.int64]
    """Position of the image among those given, [N]."""
    label: NDArray[np.int64]
    """Class index, [N]."""
    score: NDArray[np.float32]
    """Confidence in [0, 1], [N]."""
    detection: NDArray[np.int64]
    """Position in its image's detections as given, [N]."""
    rank: NDArray[np.int64]
    """How many detections of the class in the image come before, [N]."""
    right: NDArray[np.int64]
    """Bits: matched with an object that counts, [N]."""
    ignored: NDArray[np.int64]
    """Bits: neither right nor wrong, [N]."""
    objects: Objects
    counted: NDArray[np.bool_]
    """Which objects count in each range, [A, M]."""
    taken: NDArray[np.int64]
    """Row of a detection, row of an object and the bits in which they are matched, [3, K]."""


def match_detections(
    detections: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    num_classes: int,
    iou_thresholds: Sequence[float] = (0.5,),
    max_detections: int = 100,
    area_range: Range = _ALL_AREAS,
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
        targets: ``boxes`` [G, 4] and ``labels`` [G] of each image; ``iscrowd``, ``difficult`` and ``area`` [G], and
            LVIS's ``negative_labels`` and ``not_exhaustive_labels``, where there are any.
        num_classes: foreground classes.
        iou_thresholds: least IoU of a match; T of them, at most 62.
        max_detections: how many detections of a class in an image count, the best by score.
        area_range: objects with a smaller or larger area in square pixels are ignored.

    Reference:
        ``COCOeval.evaluateImg`` of pycocotools: objects that count are preferred to ignored ones; a crowd region, or a
        difficult object, takes any number of detections; IoU with a crowd is the share of the detection inside it.
    """
    found = match_areas(detections, targets, iou_thresholds, max_detections, (area_range,))
    shifts = np.arange(len(iou_thresholds))[:, None]
    matched = np.full((len(iou_thresholds), len(found.score)), -1, np.int64)
    rows, objects, bits = found.taken
    place = objects - found.objects.offset[found.objects.image[objects]]
    for threshold in range(len(iou_thresholds)):
        here = bits >> threshold & 1 > 0
        matched[threshold, rows[here]] = place[here]
    return Matches(
        image=found.image,
        label=found.label,
        score=found.score,
        detection=found.detection,
        object=matched,
        is_true_positive=(found.right >> shifts & 1).astype(np.bool_),
        is_ignored=(found.ignored >> shifts & 1).astype(np.bool_),
        num_objects=np.bincount(found.objects.label[found.counted[0]], minlength=num_classes).astype(np.int64),
    )


def match_areas(
    detections: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    iou_thresholds: Sequence[float],
    max_detections: int,
    area_ranges: Sequence[Range],
) -> AreaMatches:
    """Match at several IoU thresholds and for several ranges of areas in one pass; see `match_detections`."""
    objects = flatten_targets(targets)
    image, label, score, detection, rank, boxes, unknown = _flatten_detections(detections, targets, max_detections)
    limits = np.minimum(np.asarray(iou_thresholds, np.float64), _BELOW_ONE)
    of_range = (1 << len(limits)) - 1  # all thresholds of a range
    first_bits = 1 << len(limits) * np.arange(len(area_ranges))
    counted = np.stack([~objects.is_ignored & _is_inside(objects.area, area) for area in area_ranges])
    size = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    outside = np.stack([~_is_inside(size, area) for area in area_ranges])
    rows, places, iou = _overlapping_pairs((image, label, boxes), objects, limits.min())
    reach = ((iou[:, None] >= limits) << np.arange(len(limits))).sum(1) * first_bits.sum()
    counted_bits = first_bits @ counted * of_range
    taken = _assign(rows, places, iou, reach, counted_bits, objects.is_ignored)
    right, matched = np.zeros(len(score), np.int64), np.zeros(len(score), np.int64)
    np.bitwise_or.at(matched, taken[0], taken[2])
    np.bitwise_or.at(right, taken[0], taken[2] & counted_bits[taken[1]])
    uncounted = np.where(unknown, first_bits.sum(), first_bits @ outside) * of_range
    ignored = matched & ~right | ~matched & uncounted
    return AreaMatches(image, label, score, detection, rank, right, ignored, objects, counted, taken)


class _Flat(NamedTuple):
    """Detections of all images, by image and descending score."""

    image: NDArray[np.int64]
    label: NDArray[np.int64]
    score: NDArray[np.float32]
    detection: NDArray[np.int64]
    rank: NDArray[np.int64]
    boxes: NDArray[np.float64]
    unknown: NDArray[np.bool_]
    """Of a class that is not exhaustively annotated in the image."""


def _flatten_detections(
    detections: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]], max_detections: int
) -> _Flat:
    lengths = np.array([len(d["labels"]) for d, _ in zip(detections, targets, strict=True)], np.int64)
    image = np.repeat(np.arange(len(lengths)), lengths)
    detection = np.arange(len(image)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    label = join_arrays([d["labels"].numpy() for d in detections], (0,)).astype(np.int64)
    score = join_arrays([d["scores"].numpy() for d in detections], (0,)).astype(np.float32)
    order = np.lexsort((-score, image))  # stable: equal scores keep the detector's order
    rank = _rank_in_groups(image[order] * (label.max(initial=0) + 1) + label[order])
    kept = rank < max_detections
    unknown = np.zeros(len(order), np.bool_)
    if any("negative_labels" in target for target in targets):
        is_evaluated, unknown = _federated(image[order], label[order], targets)
        # lvis-api takes the best of an image before it leaves classes out
        kept = is_evaluated & (_rank_in_groups(image[order]) < max_detections)
    boxes = join_arrays([d["boxes"].numpy().reshape(-1, 4) for d in detections], (0, 4)).astype(np.float64)
    order = order[kept]
    return _Flat(image[order], label[order], score[order], detection[order], rank[kept], boxes[order], unknown[kept])


def _federated(
    image: NDArray[np.int64], label: NDArray[np.int64], targets: Sequence[Mapping[str, Tensor]]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which detections are of a class that is annotated in their image, and of one with objects left out, [N] each."""
    evaluated, unknown = np.ones(len(label), np.bool_), np.zeros(len(label), np.bool_)
    bounds = np.searchsorted(image, np.arange(len(targets) + 1))
    for i, target in enumerate(targets):
        if "negative_labels" in target:
            rows = slice(bounds[i], bounds[i + 1])
            known = np.concatenate([target["labels"].numpy(), target["negative_labels"].numpy()])
            evaluated[rows] = np.isin(label[rows], known)
            if "not_exhaustive_labels" in target:
                unknown[rows] = np.isin(label[rows], target["not_exhaustive_labels"].numpy())
    return evaluated, unknown


def _overlapping_pairs(
    found: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]], objects: Objects, least: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Rows of detections and of objects of the same image and class, and their IoU where it is at least ``least``."""
    image, label, boxes = found
    classes = max(label.max(initial=0), objects.label.max(initial=0)) + 1
    group = objects.image * classes + objects.label
    by_group = np.argsort(group, kind="stable")
    wanted = image * classes + label
    first, last = (np.searchsorted(group[by_group], wanted, side=side) for side in ("left", "right"))
    parts = []
    for rows in _chunks(last - first):
        counts = last[rows] - first[rows]
        left = np.repeat(np.arange(rows.start, rows.stop), counts)
        step = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
        right = by_group[np.repeat(first[rows], counts) + step]
        iou = paired_iou(boxes[left], objects.box[right], objects.is_crowd[right])
        near = iou >= least
        parts.append((left[near], right[near], iou[near]))
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    left, right, iou = (np.concatenate(column) for column in zip(*parts, strict=True))
    return left, right, iou


def _chunks(counts: NDArray[np.int64]) -> Iterator[slice]:
    """Slices of rows with about as many pairs each; a row's pairs stay together."""
    total = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + _CHUNK, side="right")))
        yield slice(start, stop)
        start = stop


def _assign(
    rows: NDArray[np.int64], places: NDArray[np.int64], iou: NDArray[np.float64], reach: NDArray[np.int64],
    counted_bits: NDArray[np.int64], repeats: NDArray[np.bool_],
) -> NDArray[np.int64]:  # fmt: skip
    """Give each detection, in order, the free object of highest IoU; those that count before ignored ones.

    Args:
        rows: the detection of each pair, ascending.
        places: the object of each pair.
        iou: of each pair.
        reach: bits in which the IoU of the pair is enough.
        counted_bits: bits in which each object counts.
        repeats: which objects take any number of detections.

    Returns:
        Detection, object and bits of what is matched, [3, K].
    """
    order = np.lexsort((-places, -iou, rows))  # of equal IoU the last object, as in pycocotools
    detections, objects, reached = (column[order].tolist() for column in (rows, places, reach))
    bounds = [*np.flatnonzero(np.diff(rows[order], prepend=-1)).tolist(), len(order)]
    free, counts, endless = dict.fromkeys(objects, -1), counted_bits.tolist(), repeats.tolist()  # -1: all bits
    taken: list[tuple[int, int, int]] = []
    for start, stop in itertools.pairwise(bounds):
        left = -1
        for ignored in (0, -1):
            for pair in range(start, stop):
                place = objects[pair]
                bits = reached[pair] & free[place] & left & (counts[place] ^ ignored)
                if bits:
                    left &= ~bits
                    if not endless[place]:
                        free[place] &= ~bits
                    taken.append((detections[pair], place, bits))
    return np.array(taken, np.int64).reshape(-1, 3).T


def _rank_in_groups(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many earlier entries are of the same group, [N]."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    ranks = np.empty(len(group), np.int64)
    ranks[order] = np.arange(len(group)) - starts
    return ranks


def _is_inside(area: NDArray[np.float64], limits: Range) -> NDArray[np.bool_]:
    return (area >= limits[0]) & (area <= limits[1])
