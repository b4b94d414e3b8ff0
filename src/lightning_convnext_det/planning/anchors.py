"""Anchors by the boxes after resizing: octaves of a base size and aspect ratios, by their coverage."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.data.fingerprint import Fingerprint
from lightning_convnext_det.planning.draft import Draft
from lightning_convnext_det.planning.resolution import Scale

STRIDES = (4, 8, 16, 32, 64)  # of the pyramid's levels with the pooled one
DEFAULT_SIZES, DEFAULT_RATIOS = ((32,), (64,), (128,), (256,), (512,)), (0.5, 1.0, 2.0)
_BASES = tuple(round(4 * 2 ** (i / 3)) for i in range(16))  # of the finest level: 4 to 128 pixels, 3 to the octave
_STEPS = (1.41, 1.68, 2.0)  # from one level to the next
_SAMPLED = 500  # boxes for the search; coverage is then known to 2 per cent, and that of the result is of all boxes
# what an unusual choice must add to the sum of both coverages: five aspect ratios cost time in every image, and levels
# that are no octaves apart look for objects of nearly one size at several resolutions
FIVE_RATIOS, NO_OCTAVES = 0.1, 0.05
NEARNESS = 0.1  # of the mean IoU, which decides where coverages are equal


class Coverage(NamedTuple):
    """Share of boxes that have an anchor of IoU at least 0.5 and at least 0.7."""

    at_50: float
    at_70: float

    def __str__(self) -> str:
        return f"{self.at_50:.0%} of the boxes at IoU 0.5, {self.at_70:.0%} at 0.7"


def plan_anchors(draft: Draft, fingerprint: Fingerprint, scale: Scale) -> None:
    """Choose anchor sizes and aspect ratios; coverage never falls below the default's."""
    boxes = scale.resize(fingerprint.boxes)
    given = draft.get("model.anchor_sizes"), draft.get("model.aspect_ratios")
    if not len(boxes) or any(value is not None and not value for value in given):
        return
    if given[0] is not None and (len(given[0]) != len(STRIDES) or not all(given[0])):
        return  # of which the detector tells
    sizes, ratios = choose_anchors(boxes, *given)
    before, after = (measure_coverage(boxes, *pair) for pair in ((DEFAULT_SIZES, DEFAULT_RATIOS), (sizes, ratios)))
    why = f"anchors cover {after}; COCO's {before.at_50:.0%} and {before.at_70:.0%}"
    draft.choose("model.anchor_sizes", [list(group) for group in sizes], why)
    draft.choose("model.aspect_ratios", list(ratios), f"boxes are {_spread(boxes)} as high as wide")
    if after.at_50 < 0.8:
        draft.warn(f"anchors cover only {after}: the others are learned from the best anchor that there is")


def choose_anchors(
    boxes: NDArray[np.float64],
    sizes: Sequence[Sequence[int]] | None = None,
    ratios: Sequence[float] | None = None,
) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
    """Choose the octaves and aspect ratios of highest coverage, at IoU 0.5 and 0.7 together.

    Args:
        boxes: widths and heights after resizing, [N, 2].
        sizes: sizes that are given, for which ratios alone are chosen.
        ratios: height over width that are given, for which sizes alone are chosen.

    Returns:
        One group of sizes for each level, and the ratios: COCO's where none of the others covers as much.
    """
    sample = boxes[np.unique(np.linspace(0, len(boxes) - 1, _SAMPLED).astype(np.int64))]
    ladders = _ladders() if sizes is None else [tuple(tuple(map(int, group)) for group in sizes)]
    shapes = _ratio_sets(boxes) if ratios is None else [tuple(ratios)]
    start = (DEFAULT_SIZES if sizes is None else ladders[0], DEFAULT_RATIOS if ratios is None else shapes[0])
    least = measure_coverage(boxes, *start)
    least_score = _score(sample, *start)
    found = [(_score(sample, *pair), pair) for pair in product(ladders, shapes)]
    for score, pair in sorted(found, key=lambda entry: -entry[0]):
        covers = all(a >= b for a, b in zip(measure_coverage(boxes, *pair), least, strict=True))
        if covers and score > least_score + 0.01:
            return pair
    return start


def measure_coverage(boxes: NDArray[np.float64], sizes: Sequence[Sequence[float]], ratios: Sequence[float]) -> Coverage:
    """Share of boxes [N, 2] with an anchor of enough IoU, at the mean distance to the next anchor of its level.

    Positions are taken as random: the centres of box and anchor are a quarter of the level's stride apart.
    """
    best = _best_iou(boxes, sizes, ratios)
    return Coverage(float((best >= 0.5).mean()), float((best >= 0.7).mean())) if len(boxes) else Coverage(0, 0)


def _score(boxes: NDArray[np.float64], sizes: Sequence[Sequence[int]], ratios: Sequence[float]) -> float:
    """Both coverages, less what unusual anchors cost; where nothing is covered, the nearer anchors."""
    costs = FIVE_RATIOS * (len(ratios) > 3) + NO_OCTAVES * (sizes[1][0] < 1.9 * sizes[0][0])
    best = _best_iou(boxes, sizes, ratios)
    return float((best >= 0.5).mean() + (best >= 0.7).mean() + NEARNESS * best.mean()) - costs


def _best_iou(
    boxes: NDArray[np.float64], sizes: Sequence[Sequence[float]], ratios: Sequence[float]
) -> NDArray[np.float64]:
    """For each box [N, 2] the IoU with its best anchor, [N]."""
    best = np.zeros(len(boxes))
    for stride, group in zip(STRIDES, sizes, strict=True):
        for size, ratio in product(group, ratios):
            anchor = size / np.sqrt(ratio), size * np.sqrt(ratio)
            best = np.maximum(best, _iou(boxes, anchor, stride / 4))
    return best


def _iou(boxes: NDArray[np.float64], anchor: tuple[float, float], shift: float) -> NDArray[np.float64]:
    """IoU of boxes [N, 2] with an anchor whose centre is off by ``shift`` along both axes."""
    side = np.array(anchor)
    common = np.minimum(np.minimum(boxes, side), (boxes + side) / 2 - shift).clip(min=0).prod(axis=1)
    return np.asarray(common / (boxes.prod(axis=1) + side.prod() - common))


def _ladders() -> list[tuple[tuple[int, ...], ...]]:
    """Sizes of all levels: each base with each step, no size above twice COCO's largest."""
    found = (tuple((round(base * step**level),) for level in range(len(STRIDES))) for base in _BASES for step in _STEPS)
    return [ladder for ladder in dict.fromkeys(found) if ladder[-1][0] <= 1024]


def _ratio_sets(boxes: NDArray[np.float64]) -> list[tuple[float, ...]]:
    """COCO's ratios, and three and five quantiles of the boxes' height over width."""
    ratio = np.log(boxes[:, 1] / boxes[:, 0])
    sets: list[tuple[float, ...]] = [DEFAULT_RATIOS]
    for shares in ((1 / 6, 1 / 2, 5 / 6), (0.1, 0.3, 0.5, 0.7, 0.9)):
        values = [round(float(np.exp(x)), 2) for x in np.quantile(ratio, shares)]
        sets.append(tuple(dict.fromkeys(max(0.02, value) for value in values)))
    return list(dict.fromkeys(sets))


def _spread(boxes: NDArray[np.float64]) -> str:
    low, high = np.quantile(boxes[:, 1] / boxes[:, 0], (0.1, 0.9))
    return f"{low:.2g} to {high:.2g} times"
