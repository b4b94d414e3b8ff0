"""TIDE: why detections are wrong and objects missed, and how much AP each kind of error costs.

Reference:
    Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", arXiv:2008.08115.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.metrics.average_precision import average_precision
from lightning_convnext_det.metrics.matching import Matches
from lightning_convnext_det.metrics.objects import Objects
from lightning_convnext_det.metrics.overlaps import Overlaps

ErrorKind = Literal["Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"]
KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)
_CORRECT = -1


class ErrorBreakdown(NamedTuple):
    """The errors of a detector at one IoU threshold."""

    ap: float
    """Mean over the classes with objects, in [0, 1]."""
    loss: dict[str, float]
    """AP that is won if all errors of a kind are mended, in [0, 1], by kind: `KINDS`, and ``FP`` and ``FN``."""
    num_errors: dict[str, int]
    """Errors by kind."""
    kind: NDArray[np.int64]
    """Index into `KINDS` for each detection, -1 for those that are right or ignored, [N]."""
    is_missed: NDArray[np.bool_]
    """Objects that no detection would find even with class or place mended, [M]."""


def break_down_errors(
    matches: Matches, overlaps: Overlaps, objects: Objects, threshold: int = 0,
    iou: float = 0.5, background_iou: float = 0.1,
) -> ErrorBreakdown:  # fmt: skip
    """Sort the errors of a detector into TIDE's kinds.

    A false positive is, in this order: ``Loc``, of the right class with an IoU between the two thresholds; ``Cls``,
    on an object of another class; ``Dupe``, on an object that a better detection has found; ``Bkg``, near no object;
    else ``Both``. An object is ``Miss`` if no ``Loc`` or ``Cls`` error lies on it and no detection finds it.

    Args:
        matches: of all images.
        overlaps: of the same detections, at the same threshold.
        objects: of the same images.
        threshold: index of the IoU threshold in the matches.
        iou: that threshold.
        background_iou: detections with no higher IoU are background.
    """
    right, ignored = matches.is_true_positive[threshold], matches.is_ignored[threshold]
    nearest = np.maximum(overlaps.same_iou, overlaps.other_iou)
    conditions = [
        right | ignored,
        (overlaps.same_iou >= background_iou) & (overlaps.same_iou <= iou),
        overlaps.other_iou >= iou,
        overlaps.used_iou >= iou,
        nearest <= background_iou,
    ]
    kind = np.select(conditions, [_CORRECT, *map(KINDS.index, ("Loc", "Cls", "Dupe", "Bkg"))], KINDS.index("Both"))
    used = np.zeros(len(objects.label), np.bool_)
    used[(objects.offset[matches.image] + matches.object[threshold])[right]] = True
    of_loc, of_cls = kind == KINDS.index("Loc"), kind == KINDS.index("Cls")
    place = np.select([of_loc, of_cls], [overlaps.same, overlaps.other], -1)
    mends = _best_of_object(place, matches.score, used)
    reachable = np.zeros(len(used), np.bool_)
    reachable[place[place >= 0]] = True
    is_missed = ~used & ~objects.is_ignored & ~reachable
    base = _ap(matches, threshold)
    mended: dict[str, float] = {}
    num_errors: dict[str, int] = {}
    for index, name in enumerate(KINDS[:-1]):
        chosen = kind == index
        num_errors[name] = int(chosen.sum())
        mended[name] = _ap(_mended(matches, objects, chosen, mends, place, threshold), 0)
    num_errors["Miss"] = int(is_missed.sum())
    num_missed = np.bincount(objects.label[is_missed], minlength=len(matches.num_objects))
    mended["Miss"] = _ap(matches._replace(num_objects=matches.num_objects - num_missed), threshold, base=matches)
    # below 0 only by the 101 steps of recall; TIDE's own package takes 0, too
    loss = {name: max(0.0, ap - base) for name, ap in mended.items()}
    loss |= {name: ap - base for name, ap in _special(matches, objects, used, threshold).items()}
    return ErrorBreakdown(base, loss, num_errors, kind, is_missed)


def _best_of_object(place: NDArray[np.int64], score: NDArray[np.float32], used: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which errors would find an object that is free if they were mended: the highest score on each, [N]."""
    rows = np.flatnonzero((place >= 0) & ~np.append(used, True)[place])
    rows = rows[np.argsort(-score[rows], kind="stable")]
    _, first = np.unique(place[rows], return_index=True)
    best = np.zeros(len(place), np.bool_)
    best[rows[first]] = True
    return best


def _mended(
    matches: Matches, objects: Objects, chosen: NDArray[np.bool_], mends: NDArray[np.bool_],
    place: NDArray[np.int64], threshold: int,
) -> Matches:  # fmt: skip
    """The matches with some errors mended: the best on a free object becomes right, the others go."""
    becomes_right = chosen & mends
    label = matches.label.copy()
    label[becomes_right] = objects.label[place[becomes_right]]
    right = matches.is_true_positive[threshold] | becomes_right
    ignored = matches.is_ignored[threshold] | (chosen & ~mends)
    return matches._replace(label=label, is_true_positive=right[None], is_ignored=ignored[None])


def _special(matches: Matches, objects: Objects, used: NDArray[np.bool_], threshold: int) -> dict[str, float]:
    """AP without any false positive (FP), and without any object that is not found (FN)."""
    right, ignored = matches.is_true_positive[threshold], matches.is_ignored[threshold]
    perfect = matches._replace(is_true_positive=right[None], is_ignored=(ignored | ~right)[None])
    found = np.bincount(objects.label[used], minlength=len(matches.num_objects))
    complete = matches._replace(num_objects=found.astype(np.int64))
    return {"FP": _ap(perfect, 0), "FN": _ap(complete, threshold, base=matches)}


def _ap(matches: Matches, threshold: int, base: Matches | None = None) -> float:
    """Mean AP of the classes that have objects, in ``base`` where it is given; 0 for one that has none left."""
    flags = matches.is_true_positive[threshold : threshold + 1], matches.is_ignored[threshold : threshold + 1]
    ap = average_precision(matches._replace(is_true_positive=flags[0], is_ignored=flags[1]))[0]
    counted = (base or matches).num_objects > 0
    return float(np.nan_to_num(ap[counted]).mean()) if counted.any() else float("nan")
