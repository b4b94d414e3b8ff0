"""Score thresholds by hand and against a search over all cuts."""

import math

import numpy as np
import pytest
import torch

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.metrics.matching import Matches, match_detections
from lightning_convnext_det.metrics.thresholds import ClassThreshold, choose_thresholds
from tests.metrics.test_matching import random_dataset


def matches(scores: list[float], is_right: list[bool], num_objects: int, ignored: list[bool] | None = None) -> Matches:
    """Matches of one class."""
    n = len(scores)
    zeros = np.zeros(n, np.int64)
    return Matches(
        zeros, zeros, np.array(scores, np.float32), np.arange(n), np.where([is_right], 0, -1),
        np.array([is_right], bool).reshape(1, n), np.array([ignored or [False] * n], bool).reshape(1, n),
        np.array([num_objects]),
    )  # fmt: skip


def test_choose_thresholds__highest_f1_halfway_between_scores() -> None:
    # F1 at the cuts: 2*1/(1+3), 2*2/(2+3), 2*2/(3+3), 2*3/(4+3) = 0.857
    given = matches([0.875, 0.75, 0.5, 0.25], [True, True, False, True], 3)
    assert choose_thresholds(given) == [ClassThreshold(0.125, 0.75, 1.0, 6 / 7, 3)]


def test_choose_thresholds__the_middle_of_thresholds_that_are_nearly_as_good() -> None:
    # F1 is 1 in (0.5, 0.75], 200/201 in (0.25, 0.5] and 200/202 in (0, 0.25]: 0.75 wide, the middle is 0.375
    given = matches([0.75] * 100 + [0.5, 0.25], [True] * 100 + [False] * 2, 100)
    assert choose_thresholds(given) == [ClassThreshold(0.375, 100 / 101, 1.0, 200 / 201, 100)]
    # 200/203 is not within 0.01
    given = matches([0.75] * 100 + [0.5, 0.25, 0.25], [True] * 100 + [False] * 3, 100)
    assert choose_thresholds(given)[0].threshold == 0.5


def test_choose_thresholds__equal_scores_are_kept_or_left_together() -> None:
    given = matches([0.75, 0.75, 0.75, 0.25], [True, False, False, False], 1)
    assert choose_thresholds(given) == [ClassThreshold(0.5, pytest.approx(1 / 3), 1.0, 0.5, 1)]


def test_choose_thresholds__ignored_detections_do_not_count() -> None:
    given = matches([0.875, 0.75, 0.5], [False, True, False], 1, [True, False, True])
    assert choose_thresholds(given) == [ClassThreshold(0.375, 1.0, 1.0, 1.0, 1)]


@pytest.mark.parametrize(
    ("given", "num_objects"),
    [
        pytest.param(matches([0.5], [False], 0), 0, id="no object"),
        pytest.param(matches([], [], 3), 3, id="no detection"),
        pytest.param(matches([0.5, 0.25], [False, False], 3), 3, id="none right"),
    ],
)
def test_choose_thresholds__none_where_the_images_do_not_tell(given: Matches, num_objects: int) -> None:
    [chosen] = choose_thresholds(given)
    assert chosen.threshold is None
    assert chosen.num_objects == num_objects
    assert math.isnan(chosen.precision) == (num_objects == 0)


def test_choose_thresholds__wanted_precision_and_recall() -> None:
    given = matches([0.875, 0.75, 0.625, 0.5, 0.25], [True, False, True, True, False], 4)
    # precision 1, 1/2, 2/3, 3/4, 3/5; recall 1/4, 1/4, 2/4, 3/4, 3/4
    assert choose_thresholds(given, precision=0.75)[0][:3] == (0.375, 0.75, 0.75)
    assert choose_thresholds(given, precision=0.8)[0][:3] == (0.8125, 1.0, 0.25)
    assert choose_thresholds(given, recall=0.5)[0][:3] == (0.375, 0.75, 0.75)
    assert choose_thresholds(given, recall=0.9)[0] == ClassThreshold(0.375, 0.75, 0.75, 0.75, 4, False)
    wrong_first = matches([0.875, 0.75], [False, True], 1)
    assert choose_thresholds(wrong_first, precision=0.9)[0] == ClassThreshold(0.375, 0.5, 1.0, 2 / 3, 1, False)


def test_choose_thresholds__precision_and_recall_are_one_wish() -> None:
    with pytest.raises(ArgumentError, match="a precision or a recall, not both"):
        choose_thresholds(matches([], [], 0), 0.5, 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_choose_thresholds__no_other_threshold_is_better_by_a_hundredth(seed: int) -> None:
    detections, targets = random_dataset(seed, num_images=20)
    chosen = choose_thresholds(match_detections(detections, targets, 3))
    tried = [f1_at(detections, targets, threshold) for threshold in np.arange(0, 1, 1 / 64)]
    for label, one in enumerate(chosen):
        assert one.f1 >= max(f1[label] for f1 in tried) - 0.01
        assert one.threshold is not None
        assert f1_at(detections, targets, one.threshold)[label] == pytest.approx(one.f1)


def f1_at(detections: list[dict], targets: list[dict], threshold: float) -> list[float]:
    """F1 of the classes where detections below a score are taken away before they are matched."""
    kept = [{k: v[d["scores"] >= threshold] for k, v in d.items()} for d in detections]
    found = match_detections(kept, targets, 3)
    values = []
    for label in range(3):
        own = (found.label == label) & ~found.is_ignored[0]
        right = found.is_true_positive[0, own].sum()
        values.append(float(2 * right / (own.sum() + found.num_objects[label])))
    return values


def test_choose_thresholds__float32_scores_are_on_the_right_side() -> None:
    low, high = torch.tensor(0.5), torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    [chosen] = choose_thresholds(matches([float(high), float(low)], [True, False], 1))
    assert chosen.threshold is not None
    assert bool(high >= chosen.threshold)
    assert not bool(low >= chosen.threshold)
