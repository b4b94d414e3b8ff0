# ruff: noqa: E501 - scripts as text
"""Images with thousands of objects: the same matches in parts, and within a limit of memory."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from lightning_convnext_det.models.deformable_detr import criterion
from lightning_convnext_det.models.deformable_detr.criterion import Objects, Predictions, SetCriterion
from lightning_convnext_det.models.rcnn import matcher as matching
from lightning_convnext_det.models.rcnn.matcher import BestOverlapMatcher, BoxPairs, ChunkedMatcher

MATCHERS = {
    "torchvision": Matcher(0.7, 0.3, allow_low_quality_matches=True),
    "torchvision, heads": Matcher(0.5, 0.5, allow_low_quality_matches=False),
    "mmdetection": BestOverlapMatcher(0.7, 0.3, 0.3),
}


def boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 60, (count, 2), generator=generator).float()  # whole numbers: ties
    return torch.cat([corner, corner + torch.randint(1, 30, (count, 2), generator=generator)], 1)


@pytest.mark.heavy
@pytest.mark.parametrize("matcher", MATCHERS.values(), ids=MATCHERS)
@pytest.mark.parametrize(("objects", "limit"), [(40, 4000), (40, 40), (1, 7), (3, 2)])
def test_bounded_matcher__parts_equal_the_whole(
    matcher: Matcher, objects: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_PAIRS", limit)
    pairs = BoxPairs(boxes(objects, 0), boxes(500, 1))
    expected = matcher(box_iou(*pairs))
    assert torch.equal(ChunkedMatcher(matcher)(pairs), expected)
    assert (expected >= 0).any()


def test_set_criterion__parts_of_the_cost_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = Predictions(torch.randn(2, 3, 50, 4), torch.rand(2, 3, 50, 4) * 0.5 + 0.2)
    objects = Objects.from_lists(
        [torch.rand(n, 4) * 0.5 + 0.2 for n in (5, 0, 9)], [torch.arange(n) % 4 for n in (5, 0, 9)]
    )
    whole = SetCriterion().matching_cost(predictions, objects)
    monkeypatch.setattr(criterion, "_PAIRS", 1000)
    torch.testing.assert_close(SetCriterion().matching_cost(predictions, objects), whole, atol=1e-6, rtol=0)


LIMITED = """
import time, torch
from tests.mutations import limit_memory
torch.set_num_threads(1)
from lightning_convnext_det.models.{name}
torch.manual_seed(0)
corner = torch.rand({count}, 2) * 500
target = {{"boxes": torch.cat([corner, corner + 4 + torch.rand({count}, 2) * 40], 1), "labels": torch.zeros({count}).long()}}
detector.train()(images := [torch.rand(3, 64, 64)], [{{k: v[:2] % 50 + (torch.tensor([0, 0, 60, 60.]) if k == "boxes" else 0) for k, v in target.items()}}])
limit_memory()
start = time.perf_counter()
losses = detector([torch.rand(3, 640, 640)], [target])
sum(losses.values()).backward()
print(f"{{time.perf_counter() - start:.1f}} s")
"""
DETECTORS = {
    "Faster R-CNN": 'rcnn.faster_rcnn import FasterRCNN\ndetector = FasterRCNN(1, "test_convnext", min_size=640, max_size=640, fpn_channels=8, box_head_features=8)',
    "Deformable DETR": 'deformable_detr.model import DeformableDETR\ndetector = DeformableDETR(1, "test_convnext", min_size=640, max_size=640, hidden_dim=32, num_heads=4, encoder_layers=1, feedforward_dim=32)',
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("count", [1000, 2000])
@pytest.mark.parametrize("name", DETECTORS)
def test_detectors__thousands_of_objects_in_a_gigabyte(name: str, count: int) -> None:
    """torchvision needs 4.2 GB for a thousand objects."""
    script = LIMITED.format(name=DETECTORS[name], count=count)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-800:]
    print(name, count, result.stdout)
