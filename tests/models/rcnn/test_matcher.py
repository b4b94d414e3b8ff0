import pytest
import torch

from lightning_convnext_det.models.rcnn.matcher import BestOverlapMatcher, count_samples

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


@pytest.mark.parametrize(("least", "expected"), [(0, 5), (1, 6)])
def test_count_samples__at_least_so_many_of_each(least: int, expected: int) -> None:
    positive, negative = [torch.tensor([1, 0, 1]), torch.tensor([0, 0, 0])], [torch.tensor([0, 1, 0]), torch.ones(2)]
    assert count_samples(positive, negative, least) == expected
