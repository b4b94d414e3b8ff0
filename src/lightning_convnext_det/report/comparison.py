"""Compare two detectors on the same images by a paired bootstrap: is the difference real?"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.metrics.average_precision import (
    BootstrapSamples,
    average_precision,
    bootstrap_ap,
    interval,
    mean_over_classes,
    resampling_weights,
)
from lightning_convnext_det.metrics.matching import match_detections
from lightning_convnext_det.metrics.objects import flatten_targets
from lightning_convnext_det.report.analysis import IOUS, SAMPLES, num_samples
from lightning_convnext_det.report.evaluation import Evaluation

Verdict = Literal["no difference", "A is better", "B is better", "undefined"]


class Difference(NamedTuple):
    """A metric of two detectors, and the 95 % interval of the second minus the first."""

    name: str
    """``map``, ``map_50`` or ``map/<class>``."""
    a: float
    b: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Whether the interval leaves out 0, and on which side."""
        if np.isnan(self.low):
            return "undefined"
        if self.low > 0:
            return "B is better"
        return "A is better" if self.high < 0 else "no difference"


def compare(a: Evaluation, b: Evaluation, samples: int = SAMPLES, seed: int = 0) -> list[Difference]:
    """Compare mAP, mAP50 and the AP of each class.

    Both are evaluated on the same resamples of the images, so what makes an image hard for both cancels out. The
    intervals tell of these images alone: trained with another seed, either detector would differ by some points, too.

    Args:
        a: results of the first detector.
        b: of the second, on the same split.
        samples: of the bootstrap; large splits get fewer.
        seed: of the bootstrap.

    Raises:
        ArgumentError: if the images differ.
    """
    if not np.array_equal(a.annotations.image_ids, b.annotations.image_ids):
        raise ArgumentError(f"{a.source} and {b.source} are results on different images; compare them on one split")
    names = list(a.annotations.class_names)
    objects = flatten_targets(a.targets)
    per_image = objects.per_image(len(names))
    matches = [match_detections(one.detections, one.targets, len(names), IOUS) for one in (a, b)]
    count = num_samples(max(len(one.score) for one in matches), samples)
    weights = resampling_weights(len(per_image), count, seed)
    first, second = (bootstrap_ap(one, per_image, weights) for one in matches)
    tables = [average_precision(one) for one in matches]
    values = [
        (_overall(tables[0]), _overall(tables[1]), second.map - first.map),
        (_overall(tables[0][:1]), _overall(tables[1][:1]), second.map_50 - first.map_50),
        *_of_classes(tables, first, second),
    ]
    titles = ["map", "map_50", *(f"map/{name}" for name in names)]
    return [
        Difference(title, x, y, *interval(drawn, y - x)) for title, (x, y, drawn) in zip(titles, values, strict=True)
    ]


def comparison_table(differences: Sequence[Difference]) -> str:
    """A line for each metric, in points."""
    width = max(len(one.name) for one in differences)
    head = f"{'':<{width}} {'A':>6} {'B':>6} {'B - A':>7}  {'95 % interval':<16} verdict"
    lines = [
        f"{one.name:<{width}} {100 * one.a:6.1f} {100 * one.b:6.1f} {100 * (one.b - one.a):+7.1f}  "
        f"{f'{100 * one.low:+.1f} to {100 * one.high:+.1f}':<16} {one.verdict}"
        for one in differences
    ]
    return "\n".join([head, *lines])


def _overall(table: NDArray[np.float64]) -> float:
    return float(mean_over_classes(table.mean(0)))


def _of_classes(
    tables: Sequence[NDArray[np.float64]], first: BootstrapSamples, second: BootstrapSamples
) -> list[tuple[float, float, NDArray[np.float64]]]:
    a, b = (table.mean(0) for table in tables)
    drawn = second.per_class - first.per_class
    return [(float(a[label]), float(b[label]), drawn[:, label]) for label in range(len(a))]
