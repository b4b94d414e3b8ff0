import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from lightning_convnext_det.planning.anchors import (
    DEFAULT_RATIOS,
    DEFAULT_SIZES,
    STRIDES,
    choose_anchors,
    measure_coverage,
)
from tests.planning.sets import SETS

SIDES = st.floats(2, 900)


@settings(max_examples=25)
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=40))
def test_choose_anchors__coverage_never_falls_below_cocos(sides: list[tuple[float, float]]) -> None:
    boxes = np.array(sides)
    found = measure_coverage(boxes, *choose_anchors(boxes))
    before = measure_coverage(boxes, DEFAULT_SIZES, DEFAULT_RATIOS)
    assert found.at_50 >= before.at_50
    assert found.at_70 >= before.at_70


def test_measure_coverage__equals_torchvisions_iou_at_that_distance() -> None:
    generator = np.random.default_rng(0)
    boxes = np.exp(generator.uniform(1, 6, (200, 2)))
    best = torch.zeros(200, dtype=torch.float64)
    for stride, (size,) in zip(STRIDES, DEFAULT_SIZES, strict=True):
        for ratio in DEFAULT_RATIOS:
            half = torch.tensor([size / ratio**0.5, size * ratio**0.5]).double() / 2
            anchor = torch.cat([-half, half])[None]
            corners = torch.from_numpy(boxes) / 2
            shifted = torch.cat([stride / 4 - corners, stride / 4 + corners], dim=1)
            best = torch.maximum(best, box_iou(shifted, anchor)[:, 0])

    found = measure_coverage(boxes, DEFAULT_SIZES, DEFAULT_RATIOS)

    assert found.at_50 == pytest.approx(float((best >= 0.5).double().mean()))
    assert found.at_70 == pytest.approx(float((best >= 0.7).double().mean()))


def test_choose_anchors__small_objects_are_covered() -> None:
    """Objects of 8 to 40 pixels, of which COCO's smallest anchor of 32 covers few."""
    generator = np.random.default_rng(0)
    boxes = np.exp(generator.uniform(np.log(8), np.log(40), (500, 1))) * np.exp(generator.uniform(-0.3, 0.3, (500, 2)))
    before = measure_coverage(boxes, DEFAULT_SIZES, DEFAULT_RATIOS)
    after = measure_coverage(boxes, *choose_anchors(boxes))
    assert before.at_50 < 0.5
    assert after.at_50 > 0.9


def test_choose_anchors__levels_keep_their_order() -> None:
    for name, fingerprint in SETS.items():
        if fingerprint.objects:
            sizes, ratios = choose_anchors(fingerprint.boxes[:, :2])
            flat = [group[0] for group in sizes]
            assert flat == sorted(flat), name
            assert 1 <= len(ratios) <= 5


def test_choose_anchors__of_boxes_too_small_to_be_covered_are_the_nearest() -> None:
    boxes = np.full((20, 2), 2.0)
    sizes, ratios = choose_anchors(boxes)
    assert measure_coverage(boxes, sizes, ratios).at_50 == 0
    assert sizes[0][0] <= 5


def test_choose_anchors__of_boxes_that_cocos_anchors_cover_best_stays() -> None:
    exact = [(s / r**0.5, s * r**0.5) for (s,) in DEFAULT_SIZES[:3] for r in DEFAULT_RATIOS]
    assert choose_anchors(np.array(exact * 10)) == (DEFAULT_SIZES, DEFAULT_RATIOS)
