import math
import re

import pytest
import torch
from torch import Tensor

from lightning_convnext_det.ops import soft_nms as soft_nms_module
from lightning_convnext_det.ops.soft_nms import batched_soft_nms, soft_nms


def _iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def _loop(
    boxes: Tensor, scores: Tensor, labels: Tensor, method: str = "gaussian", threshold: float = 1e-3, sigma: float = 0.5
) -> tuple[list[int], list[float]]:
    """Figure 2 of the paper, class by class, in float64."""
    corners, final = boxes.double().tolist(), {}
    for label in set(labels.tolist()):
        left = {i: scores[i].double().item() for i in range(len(scores)) if labels[i] == label}
        while left:
            best = max(left, key=lambda i: (left[i], -i))
            final[best] = left.pop(best)
            for i in left:
                iou = _iou(corners[best], corners[i])
                left[i] *= math.exp(-(iou**2) / sigma) if method == "gaussian" else (1 - iou if iou >= 0.3 else 1.0)
    kept = sorted((i for i in final if final[i] > threshold), key=lambda i: (-final[i], i))
    return kept, [final[i] for i in kept]


def _crowd(count: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes in clusters of about ten."""
    centres = torch.rand(max(1, count // 10), 2) * 500
    centre = centres[torch.randint(len(centres), (count,))] + torch.randn(count, 2) * 10
    half = torch.rand(count, 2) * 30 + 20
    return torch.cat((centre - half, centre + half), dim=1), torch.rand(count), torch.randint(classes, (count,))


@pytest.mark.heavy
@pytest.mark.parametrize("method", ["gaussian", "linear"])
@pytest.mark.parametrize(("count", "classes"), [(1, 1), (2, 1), (60, 1), (300, 7), (1000, 80)])
@pytest.mark.parametrize("table", [0, 2**30], ids=["row by row", "all pairs beforehand"])
def test_batched_soft_nms__equals_a_loop_in_float64(
    count: int, classes: int, method: str, table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_nms_module, "_TABLE_SIZE", table)
    boxes, scores, labels = _crowd(count, classes)
    expected, expected_scores = _loop(boxes, scores, labels, method)
    keep, decayed = batched_soft_nms(boxes.double(), scores.double(), labels, method=method)  # type: ignore[arg-type]
    assert keep.tolist() == expected
    torch.testing.assert_close(decayed, torch.tensor(expected_scores, dtype=torch.float64), rtol=1e-12, atol=0)


def test_soft_nms__by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60]])
    keep, decayed = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.1]))
    third = 0.7 * math.exp(-0.5)  # overlaps the first by a half: exp(-0.25 / 0.5)
    # the third is taken next, and lowers the second, which the first, its equal, lowered by exp(-1 / 0.5)
    assert keep.tolist() == [0, 2, 3, 1]
    torch.testing.assert_close(decayed, torch.tensor([0.9, third, 0.1, 0.8 * math.exp(-2.5)]))


def test_soft_nms__linear_begins_at_the_threshold() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 4, 10]])  # overlaps of 0.5 and 0.4 with the first
    keep, decayed = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), method="linear", iou_threshold=0.5)
    assert keep.tolist() == [0, 2, 1]
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.7, 0.4]))


def test_soft_nms__equal_boxes_vanish_under_linear_decay() -> None:
    keep, decayed = soft_nms(torch.tensor([[0.0, 0, 10, 10]] * 4), torch.full((4,), 0.5), method="linear")
    assert keep.tolist() == [0]
    assert decayed.tolist() == [0.5]


def test_soft_nms__among_equal_scores_the_first_box_is_first() -> None:
    generator = torch.Generator().manual_seed(3)
    boxes, _, labels = _crowd(200, 3)
    scores = torch.randint(1, 4, (200,), generator=generator) / 4  # many ties, each decided by position
    expected, _ = _loop(boxes, scores, labels)
    assert batched_soft_nms(boxes, scores, labels)[0].tolist() == expected
    apart = torch.arange(5.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    assert soft_nms(apart, torch.full((5,), 0.5))[0].tolist() == [0, 1, 2, 3, 4]


def test_batched_soft_nms__classes_do_not_affect_each_other() -> None:
    boxes, scores = torch.tensor([[0.0, 0, 10, 10]] * 3), torch.tensor([0.5, 0.9, 0.7])
    keep, decayed = batched_soft_nms(boxes, scores, torch.tensor([7, -2, 1000]))
    assert keep.tolist() == [1, 2, 0]
    assert torch.equal(decayed, scores[keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_soft_nms__no_boxes(dtype: torch.dtype) -> None:
    keep, decayed = soft_nms(torch.zeros(0, 4, dtype=dtype), torch.zeros(0, dtype=dtype))
    assert keep.shape == decayed.shape == (0,)
    assert keep.dtype == torch.int64
    assert decayed.dtype == dtype


@pytest.mark.parametrize("threshold", [1e-3, 0.3, 0.95, -1.0])
def test_soft_nms__drops_what_is_not_above_the_threshold(threshold: float) -> None:
    boxes, scores, labels = _crowd(100, 1)
    expected, _ = _loop(boxes, scores, labels, threshold=threshold)
    keep, decayed = soft_nms(boxes, scores, score_threshold=threshold)
    assert keep.tolist() == expected
    assert (decayed > threshold).all()
    assert (decayed.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_nms__half_precision_is_computed_in_float64(dtype: torch.dtype) -> None:
    boxes, scores, _ = _crowd(100, 1)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    keep, decayed = soft_nms(boxes, scores)
    exact_keep, exact = soft_nms(boxes.double(), scores.double())
    assert torch.equal(keep, exact_keep)
    assert torch.equal(decayed, exact.to(dtype))


def test_soft_nms__boxes_that_are_not_finite_or_have_no_area() -> None:
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[0.0, 0, 10, 10], [nan, 0, 10, 10], [0, 0, inf, 10], [5, 5, 5, 5], [0, 0, 10, 10]])
    keep, decayed = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6, nan]))
    assert keep.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(decayed, torch.tensor([0.9, 0.8, 0.7, 0.6]))


def test_soft_nms__leaves_its_arguments_alone() -> None:
    boxes, scores, labels = _crowd(30, 2)
    copies = boxes.clone(), scores.clone(), labels.clone()
    batched_soft_nms(boxes, scores, labels)
    assert all(torch.equal(a, b) for a, b in zip((boxes, scores, labels), copies, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 5), torch.zeros(3)), "boxes must be [N, 4], but their shape is [3, 5]"),
        ((torch.zeros(3, 4), torch.zeros(2)), "scores must be [3], one for each box, but their shape is [2]"),
        ((torch.zeros(3, 4), torch.zeros(3), 0.0), "sigma is 0.0; it must be above 0"),
        ((torch.zeros(3, 4), torch.zeros(3), 0.5, 0.0, "hard"), "method is 'hard'; choose 'gaussian' or 'linear'"),
    ],
    ids=["five columns", "a score missing", "sigma 0", "unknown method"],
)
def test_soft_nms__wrong_arguments(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        soft_nms(*arguments)


def test_batched_soft_nms__labels_of_another_length() -> None:
    with pytest.raises(ValueError, match=re.escape("labels must be [3], one for each box, but their shape is [1]")):
        batched_soft_nms(torch.zeros(3, 4), torch.zeros(3), torch.zeros(1))


@pytest.mark.parity
def test_batched_soft_nms__equals_birder() -> None:
    theirs = pytest.importorskip("birder.ops.soft_nms")
    boxes, scores, labels = _crowd(500, 20)
    expected_scores, expected = theirs.batched_soft_nms(boxes.double(), scores.double(), labels, 0.5, 0.01)
    keep, decayed = batched_soft_nms(boxes.double(), scores.double(), labels, 0.5, 0.01)
    assert torch.equal(keep, expected)
    torch.testing.assert_close(decayed, expected_scores, rtol=0, atol=1e-9)  # its IoU adds 1e-8 to the union


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_batched_soft_nms__on_a_gpu(method: str) -> None:
    boxes, scores, labels = _crowd(1000, 20)
    expected = batched_soft_nms(boxes, scores, labels, method=method)  # type: ignore[arg-type]
    found = batched_soft_nms(boxes.cuda(), scores.cuda(), labels.cuda(), method=method)  # type: ignore[arg-type]
    assert torch.equal(found[0].cpu(), expected[0])
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-6, atol=0)
