"""Average precision from matches, and its bootstrap over images.

`average_precision` equals pycocotools' AP to 12 digits. The bootstrap weights images instead of copying them, which
gives the same numbers (but for equal scores within one image, whose copies would come in turns).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.metrics.matching import ScoredDetections

_RECALLS = np.linspace(0.0, 1.0, 101)  # pycocotools' recThrs
_CHUNK = 20_000_000  # entries of [samples, detections] held at once


class _Column(NamedTuple):
    """The detections of one class at one IoU threshold, by descending score."""

    label: int
    threshold: int
    image: NDArray[np.int64]
    """Of each detection that counts, [N]."""
    hits: NDArray[np.int64]
    """Positions of the true positives among them, ascending, [K]."""


def average_precision(matches: ScoredDetections) -> NDArray[np.float64]:
    """AP of each class at each IoU threshold of the matches, [T, C]; nan for a class without objects.

    >>> import torch
    >>> from lightning_convnext_det.metrics.matching import match_detections
    >>> boxes, labels = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([0])
    >>> detection = {"boxes": boxes, "labels": labels, "scores": torch.tensor([0.9])}
    >>> average_precision(match_detections([detection], [{"boxes": boxes, "labels": labels}], num_classes=2))
    array([[ 1., nan]])

    Reference:
        ``COCOeval.accumulate`` of pycocotools: the precision, made monotonic, at 101 recalls.
    """
    result = np.full((len(matches.is_true_positive), len(matches.num_objects)), np.nan)
    order = order_by_class(matches.label, matches.score)
    bounds = np.searchsorted(matches.label[order], np.arange(len(matches.num_objects) + 1))
    for label, num_objects in enumerate(matches.num_objects):
        rows = order[bounds[label] : bounds[label + 1]]
        counts = np.full(len(result), num_objects)
        result[:, label] = precision_areas(matches.is_true_positive[:, rows], matches.is_ignored[:, rows], counts)
    return result


def order_by_class(label: NDArray[np.integer], score: NDArray[np.float32]) -> NDArray[np.int64]:
    """The detections by class and descending score; equal scores in the order given, [N]."""
    return np.lexsort((-score, label))


def precision_areas(
    is_right: NDArray[np.bool_], is_ignored: NDArray[np.bool_], num_objects: NDArray[np.integer]
) -> NDArray[np.float64]:
    """AP of one class, S times.

    Args:
        is_right: true positives among the detections by descending score, [S, N].
        is_ignored: those that are neither right nor wrong, [S, N].
        num_objects: that count, [S].

    Returns:
        [S]; nan without objects.
    """
    areas = np.full(len(is_right), np.nan)
    for row, count in enumerate(num_objects.tolist()):
        if count:
            hits = np.flatnonzero(is_right[row])
            kept = np.cumsum(~is_ignored[row], dtype=np.float64)[hits]
            areas[row] = _area(np.arange(1.0, len(hits) + 1), kept, np.float64(count))
    return areas


def mean_over_classes(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis, classes, of those that have objects; nan where none has."""
    defined = ~np.isnan(values)
    total = np.where(defined, values, 0.0).sum(-1)
    count = defined.sum(-1)
    mean: NDArray[np.float64] = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


class BootstrapSamples(NamedTuple):
    """AP of each of B resamples of the images."""

    map: NDArray[np.float64]
    """Mean over IoU thresholds and classes, [B]."""
    map_50: NDArray[np.float64]
    """At the first IoU threshold, mean over classes, [B]."""
    per_class: NDArray[np.float64]
    """Mean over IoU thresholds, [B, C]; nan where a resample has no object of the class."""


def resampling_weights(num_images: int, samples: int, seed: int = 0) -> NDArray[np.int64]:
    """How often each of the images is drawn in each resample, [B, I]; rows sum to the number of images."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_images, np.full(num_images, 1 / num_images), size=samples).astype(np.int64)


def bootstrap_ap(matches: ScoredDetections, objects: NDArray[np.int64], weights: NDArray[np.int64]) -> BootstrapSamples:
    """Compute AP on resamples of the images.

    Args:
        matches: at COCO's ten IoU thresholds, or others.
        objects: how many objects of each class count in each image, [I, C].
        weights: from `resampling_weights`, [B, I]. Two detectors compared with the same weights are paired.
    """
    num_samples, num_classes = len(weights), objects.shape[1]
    num_thresholds = len(matches.is_true_positive)
    total = np.zeros((num_samples, num_classes))
    first = np.zeros((num_samples, num_classes))
    num_objects = (weights @ objects).astype(np.float64)  # [B, C]
    for column in _columns(matches):
        if len(column.hits) == 0:
            continue
        ap = _resampled_area(column, weights, num_objects[:, column.label])
        total[:, column.label] += ap / num_thresholds
        if column.threshold == 0:
            first[:, column.label] = ap
    total[num_objects == 0] = np.nan
    first[num_objects == 0] = np.nan
    return BootstrapSamples(mean_over_classes(total), mean_over_classes(first), total)


def interval(samples: NDArray[np.float64], estimate: float, confidence: float = 0.95) -> tuple[float, float]:
    """The bias-corrected percentile interval of a bootstrap; (nan, nan) where fewer than half are defined.

    AP of resamples is higher than that of the images on average, as copies are found together. The bias correction
    takes the share of resamples below the estimate for it.

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 14.3, with acceleration 0.
    """
    from scipy.special import ndtr, ndtri

    defined = samples[~np.isnan(samples)]
    if np.isnan(estimate) or len(defined) < max(2, len(samples) / 2):
        return np.nan, np.nan
    below = (np.count_nonzero(defined < estimate) + 0.5 * np.count_nonzero(defined == estimate)) / len(defined)
    correction = ndtri(np.clip(below, 0.5 / len(defined), 1 - 0.5 / len(defined)))
    tail = ndtri((1 - confidence) / 2)
    low, high = np.quantile(defined, [ndtr(2 * correction + tail), ndtr(2 * correction - tail)])
    return float(low), float(high)


def _columns(matches: ScoredDetections) -> Iterator[_Column]:
    """The detections of each class at each threshold, by descending score; ignored ones are left out."""
    order = np.lexsort((np.arange(len(matches.score)), -matches.score.astype(np.float64), matches.label))
    bounds = np.searchsorted(matches.label[order], np.arange(len(matches.num_objects) + 1))
    image = matches.image[order]
    right, ignored = matches.is_true_positive[:, order], matches.is_ignored[:, order]
    for label in range(len(matches.num_objects)):
        rows = slice(bounds[label], bounds[label + 1])
        for threshold in range(len(right)):
            kept = ~ignored[threshold, rows]
            yield _Column(label, threshold, image[rows][kept], np.flatnonzero(right[threshold, rows][kept]))


def _resampled_area(
    column: _Column, weights: NDArray[np.int64], num_objects: NDArray[np.float64]
) -> NDArray[np.float64]:
    """AP of one class and threshold in each resample, [B]."""
    last = column.hits[-1] + 1  # what comes after the last true positive changes nothing
    step = max(1, _CHUNK // int(last))
    parts = []
    for start in range(0, len(weights), step):
        drawn = weights[start : start + step, column.image[:last]].astype(np.float64)  # [B, N]
        kept = np.cumsum(drawn, axis=1)[:, column.hits]
        right = np.cumsum(drawn[:, column.hits], axis=1)
        parts.append(_area(right, kept, num_objects[start : start + step, None]))
    return np.concatenate(parts)


def _area(
    right: NDArray[np.float64], kept: NDArray[np.float64], num_objects: NDArray[np.float64] | np.float64
) -> NDArray[np.float64]:
    """Mean precision at 101 recalls.

    Args:
        right: true positives down to each of K true positives, [..., K].
        kept: detections down to there, [..., K].
        num_objects: of the class, broadcast to ``right``.
    """
    precision = right / (kept + np.spacing(1.0))  # pycocotools adds it, too
    envelope = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    recall = np.divide(right, num_objects, out=np.zeros_like(right), where=num_objects > 0)
    # a threshold of recall takes the precision at the first true positive that reaches it
    reached = np.searchsorted(_RECALLS, recall, side="right")
    # drawn no times, a true positive reaches nothing: also not recall 0
    reached = np.where(right > 0, reached, 0)
    new = np.diff(reached, axis=-1, prepend=0)
    area: NDArray[np.float64] = (envelope * new).sum(-1) / len(_RECALLS)
    return area
