"""Score thresholds of the classes: those of highest F1, or of a wanted precision or recall.

The single threshold of highest F1 depends on the chance of few images. So the middle of all thresholds whose F1 is
within 0.01 of the highest is taken: with three detectors of BCCD it gives a mean F1 of 0.797 on the test split, the
single one 0.791, and the best that there are 0.804.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.metrics.matching import ScoredDetections

_PLATEAU = 0.01  # 0.005 ... 0.02 of F1 differ by less than the seeds of the training


class ClassThreshold(NamedTuple):
    """The score threshold of a class, and what it gives on the images it was chosen on."""

    threshold: float | None
    """Detections with this score or more are kept; None if the images do not tell: the class has no object, or
    none is found."""
    precision: float
    recall: float
    f1: float
    num_objects: int
    reached: bool = True
    """False if no threshold gives the wanted precision or recall; it is then the one that comes nearest."""


def choose_thresholds(
    matches: ScoredDetections, precision: float | None = None, recall: float | None = None
) -> list[ClassThreshold]:
    """Choose the score threshold of each class, by default that of highest F1.

    >>> import torch
    >>> from lightning_convnext_det.metrics.matching import match_detections
    >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0], [50.0, 50.0, 60.0, 60.0]])
    >>> detection = {"boxes": boxes, "labels": torch.zeros(3).long(), "scores": torch.tensor([0.9, 0.5, 0.25])}
    >>> target = {"boxes": boxes[:2], "labels": torch.zeros(2).long()}
    >>> choose_thresholds(match_detections([detection], [target], num_classes=1))
    [ClassThreshold(threshold=0.375, precision=1.0, recall=1.0, f1=1.0, num_objects=2, reached=True)]

    Args:
        matches: of all images, at one IoU threshold or with the one to go by first.
        precision: choose the threshold of highest recall among those of at least this precision.
        recall: choose the threshold of highest precision among those of at least this recall.

    Returns:
        For each class, in order of label. A threshold of F1 is the middle of all whose F1 is within 0.01 of the
        highest; one of a precision or a recall lies halfway between the scores that it separates.

    Raises:
        ArgumentError: if both a precision and a recall are given.
    """
    if precision is not None and recall is not None:
        raise ArgumentError("give a precision or a recall, not both")
    chosen = []
    for label, num_objects in enumerate(matches.num_objects.tolist()):
        counts = (matches.label == label) & ~matches.is_ignored[0]
        curve = ScoreCurve(matches.score[counts], matches.is_true_positive[0][counts], num_objects)
        chosen.append(curve.choose(precision, recall))
    return chosen


class ScoreCurve:
    """Precision, recall and F1 at every cut between two different scores, by descending score."""

    def __init__(self, scores: NDArray[np.float32], is_right: NDArray[np.bool_], num_objects: int) -> None:
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order].astype(np.float64)
        lower = np.append(ordered[1:], 0.0)
        ends = np.flatnonzero(
            (ordered > lower) | (np.arange(len(ordered)) == len(ordered) - 1)
        )  # equal scores together
        kept = ends + 1.0
        right = np.cumsum(is_right[order])[ends]
        self.num_objects = num_objects
        self.high, self.low = ordered[ends], lower[ends]
        # in float32, as scores are compared; between neighbouring numbers there is none halfway
        halfway = ((self.high + self.low) / 2).astype(np.float32).astype(np.float64)
        self.thresholds = np.where(halfway > self.low, halfway, self.high)
        self.precision = right / np.maximum(kept, 1)
        self.recall = right / max(num_objects, 1)
        self.f1 = 2 * right / (kept + num_objects)

    def choose(self, precision: float | None, recall: float | None) -> ClassThreshold:
        """The threshold of highest F1, or of a wanted precision or recall."""
        if self.num_objects == 0 or not self.recall.any():
            return ClassThreshold(None, np.nan if self.num_objects == 0 else 0.0, 0.0, 0.0, self.num_objects, False)
        if precision is not None:
            return self._best(self.precision, precision, self.recall)
        if recall is not None:
            return self._best(self.recall, recall, self.precision)
        return self._middle_of(np.flatnonzero(self.f1 >= self.f1.max() - _PLATEAU))

    def _middle_of(self, cuts: NDArray[np.int64]) -> ClassThreshold:
        """The threshold that has as many others of these cuts above it as below, by their widths."""
        widths = self.high[cuts] - self.low[cuts]
        above = np.cumsum(widths)
        first = min(int(np.searchsorted(above, above[-1] / 2, side="right")), len(cuts) - 1)
        middle = float(np.float32(self.high[cuts[first]] - (above[-1] / 2 - (above[first] - widths[first]))))
        chosen = self._at(int(cuts[first]))
        is_inside = self.low[cuts[first]] < middle <= self.high[cuts[first]]
        return chosen._replace(threshold=middle) if is_inside else chosen

    def _best(self, values: NDArray[np.float64], wanted: float, others: NDArray[np.float64]) -> ClassThreshold:
        """The cut of highest ``others`` where ``values`` are as wanted; else that of highest ``values``."""
        reached = values >= wanted
        if not reached.any():
            return self._at(int(np.lexsort((others, values))[-1]))._replace(reached=False)
        order = np.lexsort((values, np.where(reached, others, -1.0)))
        return self._at(int(order[-1]))

    def _at(self, cut: int) -> ClassThreshold:
        threshold, precision, recall, f1 = (
            float(column[cut]) for column in (self.thresholds, self.precision, self.recall, self.f1)
        )
        return ClassThreshold(threshold, precision, recall, f1, self.num_objects)
