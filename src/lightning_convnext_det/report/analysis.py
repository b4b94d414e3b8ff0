"""The numbers of a report: metrics with intervals, per class, errors, calibration, groups, images, label errors."""

from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.metrics.average_precision import (
    average_precision,
    bootstrap_ap,
    interval,
    mean_over_classes,
    resampling_weights,
)
from lightning_convnext_det.metrics.calibration import (
    Reliability,
    detection_ece,
    localization_aware_ece,
    optimal_lrp,
    reliability,
)
from lightning_convnext_det.metrics.coco_map import DetectionEvaluator
from lightning_convnext_det.metrics.confusion import confusion_matrix
from lightning_convnext_det.metrics.error_breakdown import ErrorBreakdown, break_down_errors
from lightning_convnext_det.metrics.grouping import group_ap, group_of, image_losses, quantile_edges
from lightning_convnext_det.metrics.label_errors import LabelError, find_label_errors
from lightning_convnext_det.metrics.matching import Matches, match_detections
from lightning_convnext_det.metrics.objects import Objects, flatten_targets
from lightning_convnext_det.metrics.overlaps import detection_boxes, find_overlaps
from lightning_convnext_det.metrics.thresholds import ClassThreshold, ScoreCurve, choose_thresholds
from lightning_convnext_det.report.evaluation import Evaluation
from lightning_convnext_det.types import Detection, Target
from lightning_convnext_det.visualization import SCORE_THRESHOLD

IOUS = (*np.linspace(0.5, 0.95, 10).tolist(),)
SAMPLES = 1000  # resamples of the bootstrap; fewer for large splits, see num_samples
_LAECE_IOU = 0.1  # least IoU of a true positive in LaECE: Oksuz et al., arXiv:2307.00934
_MOST_WORK = 2e8  # detections x resamples


class Group(NamedTuple):
    """AP of one group of objects."""

    name: str
    num_objects: int
    map: float
    map_50: float


class Analysis(NamedTuple):
    """All numbers of a report, and the arrays that its images are chosen by."""

    metrics: dict[str, float]
    """COCO's twelve and AP of each class."""
    intervals: dict[str, tuple[float, float]]
    """95 % of ``map``, ``map_50`` and ``map/<class>``."""
    num_samples: int
    thresholds: list[ClassThreshold]
    limits: list[float]
    """Score threshold of each class that drawings, confusion matrix and label errors use."""
    curves: list[ScoreCurve]
    confusion: NDArray[np.int64]
    breakdown: ErrorBreakdown
    lrp: list[dict[str, float]]
    ece: float
    laece: float
    class_laece: NDArray[np.float64]
    reliability: Reliability
    groups: dict[str, list[Group]]
    losses: NDArray[np.float64]
    label_errors: list[LabelError]
    matches: Matches
    objects: Objects
    boxes: NDArray[np.float64]


def analyse(evaluation: Evaluation, samples: int = SAMPLES, seed: int = 0) -> Analysis:
    """Compute everything from one matching of detections with objects."""
    names = list(evaluation.annotations.class_names)
    detections, targets = evaluation.detections, evaluation.targets
    matches = match_detections(detections, targets, len(names), IOUS)
    objects = flatten_targets(targets)
    boxes = detection_boxes(matches, detections)
    overlaps = find_overlaps(matches, boxes, objects)
    breakdown = break_down_errors(matches, overlaps, objects)
    thresholds = choose_thresholds(matches)
    limits = [SCORE_THRESHOLD if t.threshold is None else t.threshold for t in thresholds]
    metrics = _coco_metrics(evaluation, names)
    intervals, taken = _intervals(matches, objects, names, samples, seed)
    loose = match_detections(detections, targets, len(names), (_LAECE_IOU,))
    laece, class_laece = localization_aware_ece(loose, find_overlaps(loose, boxes, objects).matched_iou)
    table = reliability(matches, overlaps.matched_iou)
    return Analysis(
        metrics=metrics,
        intervals=intervals,
        num_samples=taken,
        thresholds=thresholds,
        limits=limits,
        curves=[_curve(matches, label) for label in range(len(names))],
        confusion=confusion_matrix(detections, targets, len(names), limits),
        breakdown=breakdown,
        lrp=[one._asdict() for one in optimal_lrp(matches, overlaps.matched_iou)],
        ece=detection_ece(table),
        laece=laece,
        class_laece=class_laece,
        reliability=table,
        groups=_groups(matches, objects, boxes),
        losses=image_losses(matches, objects),
        label_errors=find_label_errors(matches, objects, overlaps, breakdown, limits),
        matches=matches,
        objects=objects,
        boxes=boxes,
    )


def num_samples(num_detections: int, wanted: int) -> int:
    """How many resamples the bootstrap takes: fewer than wanted for many detections, at least 100."""
    return max(100, min(wanted, int(_MOST_WORK / max(1, num_detections))))


def _coco_metrics(evaluation: Evaluation, names: list[str]) -> dict[str, float]:
    federated = evaluation.annotations.federated
    evaluator = DetectionEvaluator(names, frequencies=federated.frequencies or None if federated else None)
    evaluator.update(
        [Detection(boxes=d["boxes"], labels=d["labels"], scores=d["scores"]) for d in evaluation.detections],
        cast(list[Target], evaluation.targets),
    )
    return evaluator.compute()


def _intervals(
    matches: Matches, objects: Objects, names: list[str], samples: int, seed: int
) -> tuple[dict[str, tuple[float, float]], int]:
    num_images = len(objects.offset) - 1
    samples = num_samples(len(matches.score), samples)
    drawn = bootstrap_ap(matches, objects.per_image(len(names)), resampling_weights(max(1, num_images), samples, seed))
    ap = average_precision(matches)
    estimates = {"map": float(mean_over_classes(ap.mean(0))), "map_50": float(mean_over_classes(ap[0]))}
    found = {"map": interval(drawn.map, estimates["map"]), "map_50": interval(drawn.map_50, estimates["map_50"])}
    for label, name in enumerate(names):
        found[f"map/{name}"] = interval(drawn.per_class[:, label], float(ap[:, label].mean()))
    return found, samples


def _curve(matches: Matches, label: int) -> ScoreCurve:
    rows = (matches.label == label) & ~matches.is_ignored[0]
    return ScoreCurve(matches.score[rows], matches.is_true_positive[0][rows], int(matches.num_objects[label]))


def _groups(matches: Matches, objects: Objects, boxes: NDArray[np.float64]) -> dict[str, list[Group]]:
    """AP by size, shape and crowding."""
    own = (boxes[:, 2:] - boxes[:, :2]).clip(min=1e-6)
    theirs = (objects.box[:, 2:] - objects.box[:, :2]).clip(min=1e-6)
    counted = ~objects.is_ignored
    side, found_side = np.sqrt(objects.area), np.sqrt(own.prod(1))
    ratio, found_ratio = np.log2(theirs[:, 0] / theirs[:, 1]), np.log2(own[:, 0] / own[:, 1])
    crowd = np.bincount(objects.image[counted], minlength=len(objects.offset) - 1).astype(np.float64)
    octiles = quantile_edges(side[counted], 8)
    crowds = np.unique(np.ceil(quantile_edges(crowd[crowd > 0], 4)))
    specifications = {
        "size (COCO)": (side, found_side, np.array([32.0, 96.0]), _sizes),
        "size (octiles)": (side, found_side, octiles, _sizes),
        "aspect ratio": (ratio, found_ratio, np.log2([1 / 3, 2 / 3, 1.5, 3]), _ratios),
        "objects in the image": (crowd[objects.image], crowd[matches.image], crowds, _counts),
    }
    result = {}
    for title, (of_objects, of_detections, edges, describe) in specifications.items():
        group = group_of(of_objects, edges)
        table = group_ap(matches, objects, group, group_of(of_detections, edges), len(edges) + 1)
        sizes = np.bincount(group[counted], minlength=len(edges) + 1)
        result[title] = [
            Group(name, int(sizes[i]), float(table[:, i].mean()), float(table[0, i]))
            for i, name in enumerate(describe(edges))
        ]
    return result


def _ranges(edges: NDArray[np.float64], show: Any) -> list[str]:
    texts = [show(edge) for edge in edges]
    if not texts:
        return ["all"]
    return [f"below {texts[0]}", *(f"{a} to {b}" for a, b in pairwise(texts)), f"from {texts[-1]}"]


def _sizes(edges: NDArray[np.float64]) -> list[str]:
    return [f"{text} px" if text != "all" else text for text in _ranges(edges, lambda edge: f"{edge:.0f}")]


def _ratios(edges: NDArray[np.float64]) -> list[str]:
    names = ("1:3", "2:3", "3:2", "3:1")
    return [f"below {names[0]} (tall)", "1:3 to 2:3", "2:3 to 3:2 (square)", "3:2 to 3:1", "from 3:1 (wide)"]


def _counts(edges: NDArray[np.float64]) -> list[str]:
    return _ranges(edges, lambda edge: f"{edge:.0f}")
