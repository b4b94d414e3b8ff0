import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.ops import box_iou

from lightning_convnext_det.models.rcnn import matcher as matching
from lightning_convnext_det.models.rcnn.matcher import (
    BestOverlapMatcher,
    BoxPairs,
    ChunkedMatcher,
    OverlapMatcher,
    Sampling,
    count_samples,
    draw_samples,
)

# IoU of three objects (rows) with five boxes
TABLE = torch.tensor([[0.8, 0.2, 0.0, 0.5, 0.1], [0.0, 0.35, 0.1, 0.0, 0.35], [0.1, 0.2, 0.2, 0.0, 0.0]])


def test_own_matcher__best_boxes_from_a_minimum_on() -> None:
    # the second object's best boxes, two that tie, reach 0.3; the third's do not
    assert BestOverlapMatcher(0.7, 0.3, 0.3)(TABLE).tolist() == [0, 1, -1, -2, 1]
    # from 0.2 on the third object takes its best boxes from the second and from the background
    assert BestOverlapMatcher(0.7, 0.3, 0.2)(TABLE).tolist() == [0, 2, 2, -2, 1]


def test_own_matcher__an_object_takes_its_best_box_from_a_better_match() -> None:
    table = torch.tensor([[0.9, 0.6], [0.8, 0.1]])
    # box 0 overlaps object 0 more, but is the best that object 1 has; torchvision would leave it to object 0
    assert BestOverlapMatcher(0.7, 0.3, 0.3)(table).tolist() == [1, -2]


@pytest.mark.parametrize("thresholds", [(0.7, 0.3, True), (0.5, 0.5, False), (0.5, 0.5, True)])
def test_overlap_matcher__as_torchvision(thresholds: tuple[float, float, bool]) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randint(0, 11, (4, 30), generator=generator) / 10  # tenths: ties, and overlaps at the thresholds
        assert torch.equal(OverlapMatcher(*thresholds)(table), Matcher(*thresholds)(table))
    assert torch.equal(OverlapMatcher(*thresholds)(TABLE), Matcher(*thresholds)(TABLE))


@pytest.mark.parametrize("matcher", [BestOverlapMatcher(0.7, 0.3, 0.3), OverlapMatcher(0.7, 0.3, True)])
@pytest.mark.parametrize("limit", [2**24, 20])
def test_chunked_matcher__as_if_boxes_that_are_not_usable_were_not_there(
    matcher: OverlapMatcher, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_PAIRS", limit)
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 20, (44, 2), generator=generator).float()
    boxes = torch.cat([corner, corner + torch.randint(4, 20, (44, 2), generator=generator)], 1)
    objects, boxes, usable = boxes[:4], boxes[4:], torch.rand(40, generator=generator) < 0.6
    found = ChunkedMatcher(matcher)(BoxPairs(objects, boxes), usable)
    expected = matcher(box_iou(objects, boxes[usable]))
    assert (expected >= 0).any()
    assert torch.equal(found[usable], expected)


@pytest.mark.parametrize(("size", "share"), [(8, 0.5), (8, 0.25), (5, 0.5), (100, 0.5), (1, 0.0)])
def test_draw_samples__as_many_as_torchvision_draws(size: int, share: float) -> None:
    labels = torch.tensor([[1, 0, 3, -1, 0, 2, 0, 0, 0, 1], [0] * 10, [-1] * 10, [5] * 9 + [0], [0, 1] + [-1] * 8])
    positive, negative = BalancedPositiveNegativeSampler(size, share)(list(labels))
    drawn = draw_samples(labels, Sampling(0.5, 0.5, size, share))
    assert drawn.has_object.sum(1).tolist() == [int(x.sum()) for x in positive]
    assert drawn.is_background.sum(1).tolist() == [int(x.sum()) for x in negative]
    for own, objects, background in zip(
        labels, masked(drawn.objects, drawn.has_object), masked(*drawn[2:]), strict=True
    ):
        assert (own[objects] > 0).all()
        assert (own[background] == 0).all()
        assert len({*objects.tolist(), *background.tolist()}) == len(objects) + len(background)  # each once


def masked(rows: Tensor, used: Tensor) -> list[Tensor]:
    return [row[mask] for row, mask in zip(rows, used, strict=True)]


def test_draw_samples__every_pair_is_as_likely() -> None:
    """Chi-squared test over the 10 pairs of 5 objects and the 6 of 4 boxes of background, as randperm draws them."""
    labels = torch.tensor([1, 2, 1, 3, 1, 0, 0, 0, 0, -1]).expand(6000, -1)
    drawn = draw_samples(labels, Sampling(0.5, 0.5, 4, 0.5))
    assert drawn.has_object.all()
    assert drawn.is_background.sum(1).eq(2).all()
    for rows, pairs, limit in ((drawn.objects, 10, 27.9), (drawn.background[:, :2], 6, 20.5)):  # p = 0.001
        first, second = rows.sort(dim=1).values.unbind(1)
        counts = torch.unique(first * 10 + second, return_counts=True)[1].double()
        assert len(counts) == pairs
        assert float(((counts - 6000 / pairs) ** 2 / (6000 / pairs)).sum()) < limit


@pytest.mark.parametrize(("least", "expected"), [(0, 4), (1, 5)])
def test_count_samples__at_least_so_many_of_each(least: int, expected: int) -> None:
    labels = torch.tensor([[2, 1, 0], [0, -1, -1]])
    assert int(count_samples(draw_samples(labels, Sampling(0.5, 0.5, 4, 0.5)), least)) == expected
