"""Find annotations that are probably wrong: where a confident detector and the annotation disagree.

The kinds are those of hotcoco and cleanlab: an object that is not annotated, of another class, with a misplaced box,
or annotated where nothing is. The detector must not have been trained on the images.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.metrics.error_breakdown import KINDS, ErrorBreakdown
from lightning_convnext_det.metrics.matching import Matches
from lightning_convnext_det.metrics.objects import Objects
from lightning_convnext_det.metrics.overlaps import Overlaps

LabelErrorKind = Literal["missing", "class", "box", "nothing"]
_CONFIDENT = 0.5  # least score of a detection that speaks against an annotation
_NEAR = 0.3  # IoU; detections with less lie on no annotated object
_SPREAD = 2.0  # boxes whose IoU is this many deviations below the median of their class are misplaced
_DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations


class LabelError(NamedTuple):
    """An annotation that is probably wrong."""

    kind: LabelErrorKind
    """``missing``: an object without annotation; ``class``: annotated as another class; ``box``: misplaced;
    ``nothing``: annotated, but never found."""
    image: int
    """Position of the image."""
    object: int
    """Row of the annotated object, -1 for a missing one."""
    detection: int
    """Row of the detection that speaks against it, -1 for none."""
    suspicion: float
    """In [0, 1], the higher the surer."""


def find_label_errors(
    matches: Matches,
    objects: Objects,
    overlaps: Overlaps,
    breakdown: ErrorBreakdown,
    thresholds: Sequence[float],
) -> list[LabelError]:
    """List the annotations that are probably wrong, the surest first; each object and each detection at most once.

    Args:
        matches: of all images, IoU 0.5 first.
        objects: of the same images.
        overlaps: of the same detections.
        breakdown: of the same detections.
        thresholds: score of each class from which a detection is confident, at least 0.5 is taken, [C].
    """
    confident = matches.score >= np.maximum(np.asarray(thresholds), _CONFIDENT)[matches.label]
    # a detection beside an object of its class says that the box is misplaced, not that another object is missing
    by_kind = (
        _other_classes(matches, overlaps, breakdown, confident),
        _misplaced(matches, objects, overlaps, confident),
        _missing(matches, overlaps, confident),
        _nothing(matches, objects, overlaps),
    )
    used: set[tuple[str, int]] = set()
    kept = []
    for error in (error for found in by_kind for error in sorted(found, key=lambda error: -error.suspicion)):
        names = {("object", error.object), ("detection", error.detection)} - {("object", -1), ("detection", -1)}
        if not names & used:
            used |= names
            kept.append(error)
    return sorted(kept, key=lambda error: -error.suspicion)


def _other_classes(
    matches: Matches, overlaps: Overlaps, breakdown: ErrorBreakdown, confident: NDArray[np.bool_]
) -> list[LabelError]:
    """Objects on which the detector sees another class, with a higher score than for the annotated class."""
    own = np.zeros(int(max(overlaps.same.max(initial=-1), overlaps.other.max(initial=-1))) + 2)
    near = overlaps.same_iou >= 0.5
    np.maximum.at(own, overlaps.same[near], matches.score[near])
    rows = np.flatnonzero(confident & (breakdown.kind == KINDS.index("Cls")))
    return [
        LabelError("class", int(matches.image[i]), int(overlaps.other[i]), int(i), float(surplus))
        for i in rows
        if (surplus := float(matches.score[i]) * (1 - own[overlaps.other[i]])) > 0.25
    ]


def _misplaced(
    matches: Matches, objects: Objects, overlaps: Overlaps, confident: NDArray[np.bool_]
) -> list[LabelError]:
    """Objects whose best box has an IoU far below what is usual for the class."""
    errors = []
    right = matches.is_true_positive[0]
    taken = np.zeros(len(objects.label) + 1, np.bool_)
    rows = objects.offset[matches.image] + matches.object[0]
    taken[rows[right]] = True
    place = np.where(right, rows, overlaps.same)
    iou_of = np.where(right, overlaps.matched_iou, overlaps.same_iou)
    near = confident & (iou_of >= 0.1) & (right | ~taken[place])
    for label in range(len(matches.num_objects)):
        mine = np.flatnonzero(near & (matches.label == label))
        usual = iou_of[mine[right[mine]]]
        if len(usual) == 0:
            continue
        median = float(np.median(usual))
        limit = median - _SPREAD * _DEVIATION * float(np.median(np.abs(usual - median)))
        for i in mine:
            iou = float(iou_of[i])
            if iou < min(max(limit, 0.5), 0.75):
                suspicion = float(matches.score[i]) * (1 - iou / median)
                errors.append(LabelError("box", int(matches.image[i]), int(place[i]), int(i), suspicion))
    return errors


def _missing(matches: Matches, overlaps: Overlaps, confident: NDArray[np.bool_]) -> list[LabelError]:
    """Confident detections on no annotated object, crowds included."""
    nearest = np.maximum(overlaps.same_iou, overlaps.other_iou)
    rows = np.flatnonzero(confident & (nearest < _NEAR) & ~matches.is_ignored[0])
    return [LabelError("missing", int(matches.image[i]), -1, int(i), float(matches.score[i])) for i in rows]


def _nothing(matches: Matches, objects: Objects, overlaps: Overlaps) -> list[LabelError]:
    """Objects that no detection lies on, whatever its class and score; the more suspicious the better the class is."""
    seen = np.zeros(len(objects.label) + 1, np.bool_)
    seen[overlaps.same[overlaps.same_iou >= _NEAR]] = True
    seen[overlaps.other[overlaps.other_iou >= _NEAR]] = True
    counted = ~objects.is_ignored
    errors = []
    for row in np.flatnonzero(counted & ~seen[:-1]):
        of_class = counted & (objects.label == objects.label[row])
        recall = float(seen[:-1][of_class].mean())
        # half: on BCCD, most objects that are never found are there, and the detector missed them
        errors.append(LabelError("nothing", int(objects.image[row]), int(row), -1, recall / 2))
    return errors
