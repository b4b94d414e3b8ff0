"""Calibration: whether a score of 0.8 means that 8 of 10 detections are right; and optimal LRP.

References:
    Küppers et al., "Multivariate Confidence Calibration for Object Detection", arXiv:2004.13546 (D-ECE).
    Oksuz et al., "Towards Building Self-Aware Object Detectors", arXiv:2307.00934, section 5 (LaECE).
    Oksuz et al., "One Metric to Measure Them All: Localisation Recall Precision (LRP)", arXiv:2011.10772.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.metrics.matching import Matches


class Reliability(NamedTuple):
    """Bins of equal width over the scores, [J]; empty bins hold nan."""

    num_detections: NDArray[np.int64]
    score: NDArray[np.float64]
    """Mean score of a bin's detections."""
    precision: NDArray[np.float64]
    iou: NDArray[np.float64]
    """Mean IoU of a bin's true positives with their objects; 0 for a bin with none."""


def reliability(
    matches: Matches, matched_iou: NDArray[np.float64], label: int | None = None, bins: int = 10, threshold: int = 0
) -> Reliability:
    """Compare scores with what the detections are worth.

    Args:
        matches: of all images.
        matched_iou: IoU of each true positive with its object, [N].
        label: of one class; None for all detections.
        bins: of equal width; bin j holds scores in [j / bins, (j + 1) / bins), the last also 1.
        threshold: index of the IoU threshold in the matches.
    """
    kept = ~matches.is_ignored[threshold]
    if label is not None:
        kept &= matches.label == label
    score, right = matches.score[kept].astype(np.float64), matches.is_true_positive[threshold][kept]
    place = np.minimum((score * bins).astype(np.int64), bins - 1)
    count, hits = (np.bincount(rows, minlength=bins) for rows in (place, place[right]))
    empty = np.where(count > 0, 1.0, np.nan)
    total = np.bincount(place, score, bins)
    ious = np.bincount(place[right], matched_iou[kept][right], bins)
    divisor = np.maximum(count, 1)
    return Reliability(
        count.astype(np.int64), total / divisor * empty, hits / divisor * empty, ious / np.maximum(hits, 1) * empty
    )


def detection_ece(table: Reliability) -> float:
    """D-ECE: the mean difference of score and precision, weighted by the detections of each bin; nan for none."""
    return _weighted(table, table.precision)


def localization_aware_ece(
    matches: Matches, matched_iou: NDArray[np.float64], bins: int = 25, threshold: int = 0
) -> tuple[float, NDArray[np.float64]]:
    """LaECE: the difference of score and precision times IoU, in the mean over classes, and of each class, [C].

    Args:
        matches: of all images.
        matched_iou: IoU of each true positive with its object, [N].
        bins: of equal width; the paper takes 25.
        threshold: index of the IoU threshold in the matches.

    Returns:
        The mean over classes that have detections and objects, and the values of all; nan for the others.
    """
    values = np.full(len(matches.num_objects), np.nan)
    for label in np.flatnonzero(matches.num_objects):
        table = reliability(matches, matched_iou, int(label), bins, threshold)
        values[label] = _weighted(table, table.precision * table.iou)
    return (float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")), values


def _weighted(table: Reliability, worth: NDArray[np.float64]) -> float:
    total = table.num_detections.sum()
    return float(np.nansum(table.num_detections * np.abs(table.score - worth)) / total) if total else float("nan")


class OptimalLRP(NamedTuple):
    """Localisation Recall Precision error at its best score threshold, of one class; 0 is perfect, 1 the worst."""

    error: float
    localization: float
    """Mean of 1 - IoU of the true positives."""
    false_positive: float
    """1 - precision."""
    false_negative: float
    """1 - recall."""
    threshold: float
    """Detections with this score or more are kept."""


def optimal_lrp(
    matches: Matches, matched_iou: NDArray[np.float64], iou: float = 0.5, threshold: int = 0
) -> list[OptimalLRP]:
    """Find the score threshold of lowest LRP error for each class, in order of label.

    ``LRP = (sum over TP of (1 - IoU) / (1 - iou) + FP + FN) / (TP + FP + FN)``; all distinct scores are tried.

    Args:
        matches: of all images.
        matched_iou: IoU of each true positive with its object, [N].
        iou: least IoU of a match, as in the matches.
        threshold: index of it in the matches.
    """
    return [
        _optimal_of_class(
            matches.score[kept].astype(np.float64), matches.is_true_positive[threshold][kept], matched_iou[kept],
            int(matches.num_objects[label]), iou,
        )
        for label in range(len(matches.num_objects))
        for kept in [(matches.label == label) & ~matches.is_ignored[threshold]]
    ]  # fmt: skip


def _optimal_of_class(
    score: NDArray[np.float64], right: NDArray[np.bool_], matched_iou: NDArray[np.float64], num_objects: int, iou: float
) -> OptimalLRP:
    if num_objects == 0:
        return OptimalLRP(*[float("nan")] * 5)
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True)) if len(order) else np.zeros(0, np.int64)
    true = np.cumsum(right[order])[ends]
    false = ends + 1 - true
    distance = np.cumsum(np.where(right, 1 - matched_iou, 0.0)[order])[ends]
    errors = (distance / (1 - iou) + false + num_objects - true) / (num_objects + false)
    if len(errors) == 0 or errors.min() >= 1:
        return OptimalLRP(1.0, float("nan"), float("nan"), 1.0, float("nan"))
    best = int(errors.argmin())
    mean = distance[best] / true[best] if true[best] else float("nan")
    precision, recall = true[best] / (true[best] + false[best]), true[best] / num_objects
    threshold = float(score[order][ends[best]])
    return OptimalLRP(float(errors[best]), float(mean), float(1 - precision), float(1 - recall), threshold)
