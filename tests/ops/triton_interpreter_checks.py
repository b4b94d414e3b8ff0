"""Checks of the Triton kernels on the CPU: `test_deform_attn_triton.py` runs them with TRITON_INTERPRET=1."""

import os

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from lightning_convnext_det.models.rcnn.rpn import _choose_best
from lightning_convnext_det.ops import nms_triton
from lightning_convnext_det.ops.batch_nms import _nms_on_gpu, batch_nms, fill_rows, nms_of_levels
from lightning_convnext_det.ops.deform_attn import attention_by_grid_sample
from lightning_convnext_det.ops.deform_attn_triton import attention_by_triton
from lightning_convnext_det.ops.nms_triton import nms_by_triton
from tests.ops.samples import Arguments, attend_in_a_loop, attention_arguments, candidates

assert os.environ.get("TRITON_INTERPRET") == "1", "start these through test_deform_attn_triton.py"

CASES = {
    "two levels": {"shapes": [(9, 13), (5, 7)], "batch": 2, "heads": 3, "points": 2},
    "odd width of a head": {"shapes": [(9, 4)], "head_dim": 7, "queries": 12},
    "one channel": {"shapes": [(6, 6)], "head_dim": 1},
    "more channels than a tile": {"shapes": [(3, 2)], "head_dim": 600, "heads": 1},
    "levels one pixel wide": {"shapes": [(4, 1), (1, 1), (1, 3)]},
    "far outside": {"shapes": [(5, 6)], "margin": 40.0},
}


def _gradients(output: Tensor, arguments: Arguments) -> list[Tensor]:
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad(output, [a for a in arguments if isinstance(a, Tensor)], direction)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_by_triton__values_and_gradients_equal_the_reference(case: dict[str, object]) -> None:
    arguments = attention_arguments(**case)  # type: ignore[arg-type]
    ours = _gradients(attention_by_triton(*arguments), arguments)
    expected = _gradients(attention_by_grid_sample(*arguments), arguments)
    for tensor, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(tensor, reference, rtol=1e-5, atol=1e-5 * max(1.0, reference.abs().max().item()))


def test_attention_by_triton__equals_a_loop_in_float64() -> None:
    arguments = attention_arguments([(5, 4), (2, 3)], batch=2, queries=4, dtype=torch.float64)
    torch.testing.assert_close(attention_by_triton(*arguments), attend_in_a_loop(*arguments), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_by_triton__half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    arguments = attention_arguments([(8, 8), (4, 4)], points=8, dtype=dtype)
    ours = _gradients(attention_by_triton(*arguments), arguments)
    expected = _gradients(attention_by_grid_sample(*arguments), arguments)
    for tensor, reference in zip(ours, expected, strict=True):
        assert tensor.dtype == reference.dtype
        torch.testing.assert_close(tensor, reference, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_attention_by_triton__gradcheck() -> None:
    value, shapes, locations, weights = attention_arguments([(2, 3)], heads=1, points=2, queries=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v, x, w: attention_by_triton(v, shapes, x, w).square().sum(),
        (value, locations, weights),
        eps=1e-7,
        atol=1e-6,
    )


def test_attention_by_triton__no_queries() -> None:
    arguments = attention_arguments([(3, 3)], queries=0)
    output, *gradients = _gradients(attention_by_triton(*arguments), arguments)
    assert output.shape == (1, 0, 8)
    assert (gradients[0] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's numpy; a GPU does not warn
def test_attention_by_triton__a_location_that_is_not_finite_reads_no_foreign_memory() -> None:
    value, shapes, locations, weights = attention_arguments([(4, 4)], queries=4)
    with torch.no_grad():
        expected = attention_by_triton(value, shapes, locations, weights)
        locations[0, 0], locations[0, 1] = float("nan"), float("inf")
        output = attention_by_triton(value, shapes, locations, weights)
    torch.testing.assert_close(output[0, 2:], expected[0, 2:])


def test_nms_by_triton__equals_torchvision_in_each_group() -> None:
    torch.manual_seed(0)
    sizes = [0, 1, 40, 17, 130]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    corners = torch.rand(sum(sizes), 2) * 60
    boxes = torch.cat((corners, corners + torch.rand(sum(sizes), 2) * 50), dim=1)
    valid = torch.rand(sum(sizes)) > 0.2
    keep = nms_by_triton(boxes, valid, starts, max(sizes), 0.5)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        rows = start + torch.where(valid[start:end])[0]
        expected = rows[nms(boxes[rows], -rows.float(), 0.5)]
        assert torch.where(keep[start:end])[0].tolist() == (expected - start).sort().values.tolist()


def test_nms_by_triton__an_overlap_at_the_threshold_stays() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 5.1]])
    keep = nms_by_triton(boxes, torch.ones(3) > 0, torch.tensor([0, 3]), 3, 0.5)  # IoU 0.5 and 0.51
    assert keep.tolist() == [True, True, False]


@pytest.mark.parametrize(("count", "images", "groups"), [(0, 1, 3), (1, 2, 1), (200, 3, 4)])
@pytest.mark.parametrize("largest", [8192, 8])  # groups that fit into a program, and such as do not
def test_nms_on_gpu__keeps_what_the_loop_over_images_keeps(
    count: int, images: int, groups: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(nms_triton, "LARGEST_GROUP", largest)
    boxes, scores, group, image = candidates(count, images, groups)
    keep = _nms_on_gpu(boxes, scores, group, image, (images, groups), 0.5, None)
    assert torch.equal(keep, batch_nms(boxes, scores, group, image, images, 0.5, num_groups=groups))


@pytest.mark.parametrize("limit", [20, 200])  # fewer than are left, and more than there are
def test_nms_of_levels__and_the_best_are_what_the_loop_over_images_keeps(limit: int) -> None:
    torch.manual_seed(2)
    lengths, images = [60, 40, 3], 3
    ranks = torch.cat([torch.randn(images, n).sort(dim=1, descending=True).values for n in lengths], dim=1)
    boxes = candidates(images * 103, 1, 1)[0].view(images, 103, 4)
    boxes = torch.cat((boxes[..., :2], boxes[..., :2] + 400), dim=2)  # so that many overlap
    used = torch.rand(images, 103) > 0.1
    found = _choose_best(boxes, ranks, nms_of_levels(boxes, used, lengths, 0.5), limit)
    level = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(images, -1)[used]
    image = torch.arange(images)[:, None].expand(-1, 103)[used]
    keep = batch_nms(boxes[used], ranks[used], level, image, images, 0.5, num_groups=3)
    everything = torch.ones_like(keep, dtype=torch.bool)
    values = boxes[used][keep], ranks[used][keep].sigmoid()
    (expected, scores), count = fill_rows(values, image[keep], everything, images, limit)
    assert found.count.tolist() == count.tolist()
    assert torch.equal(found.boxes, expected)
    torch.testing.assert_close(found.scores, scores)
