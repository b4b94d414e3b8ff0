import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_convnext_det.ops import deform_attn
from lightning_convnext_det.ops.deform_attn import attention_by_grid_sample, multi_scale_deformable_attention
from lightning_convnext_det.ops.deform_attn_gather import attention_by_gather
from lightning_convnext_det.ops.deform_attn_indexed import attention_by_indexing
from tests.ops.samples import Arguments, attend_in_a_loop, attention_arguments

FAST = [attention_by_gather, attention_by_indexing]
PATHS = [attention_by_grid_sample, *FAST]
CASES = {
    "one level": {"shapes": [(5, 7)]},
    "four levels": {"shapes": [(16, 11), (8, 6), (4, 3), (2, 2)], "batch": 2, "heads": 3, "points": 4},
    "odd width of a head": {"shapes": [(9, 4), (3, 2)], "head_dim": 7},
    "one channel": {"shapes": [(6, 6)], "head_dim": 1},
    "one query": {"shapes": [(6, 6)], "queries": 1},
    "more samples than pixels": {"shapes": [(3, 4), (2, 2)], "queries": 90, "batch": 2},
    "several chunks": {"shapes": [(7, 5), (4, 3)], "queries": 5000, "heads": 4, "points": 4, "head_dim": 3},
    "more pixels than int16 holds": {"shapes": [(300, 250)], "queries": 2000, "heads": 1, "head_dim": 2, "points": 160},
    "far outside": {"shapes": [(5, 6), (3, 3)], "margin": 40.0},
}


def _gradients(path: Callable[..., Tensor], arguments: Arguments) -> list[Tensor]:
    output = path(*arguments)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad(output, [a for a in arguments if isinstance(a, Tensor)], direction)]


@pytest.mark.parametrize("path", PATHS)
def test_multi_scale_deformable_attention__equals_a_loop_in_float64(path: Callable[..., Tensor]) -> None:
    arguments = attention_arguments([(5, 4), (2, 3)], batch=2, queries=4, dtype=torch.float64)
    torch.testing.assert_close(path(*arguments), attend_in_a_loop(*arguments), rtol=0, atol=1e-12)


def test_multi_scale_deformable_attention__by_hand() -> None:
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)  # a map of two rows, 1 2 and 3 4
    locations = torch.tensor([[0.25, 0.25], [0.5, 0.5], [0.0, 0.25], [1.5, 0.5]]).view(1, 4, 1, 1, 1, 2)
    output = multi_scale_deformable_attention(value, [(2, 2)], locations, torch.full((1, 4, 1, 1, 1), 2.0))
    # a pixel's centre; the middle; the edge of the map, half outside; wholly outside; all with weight 2
    torch.testing.assert_close(output.flatten(), torch.tensor([2.0, 5.0, 1.0, 0.0]))


@pytest.mark.heavy
@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_multi_scale_deformable_attention__values_and_gradients_equal_the_reference(
    case: dict[str, object], path: Callable[..., Tensor]
) -> None:
    arguments = attention_arguments(**case)
    for ours, reference in zip(
        _gradients(path, arguments), _gradients(attention_by_grid_sample, arguments), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5 * max(1.0, reference.abs().max().item()))


@pytest.mark.parametrize("path", FAST)
def test_multi_scale_deformable_attention__gradients_on_pixel_centres_and_edges(path: Callable[..., Tensor]) -> None:
    # where the derivative jumps, and at the last place that still counts as inside
    x = torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.5, 3.0, 3.5, 4.0]) / 4
    locations = torch.cartesian_prod(x, x).view(1, -1, 1, 1, 1, 2).requires_grad_()
    weights = torch.rand(1, 64, 1, 1, 1).requires_grad_()
    value = torch.randn(1, 16, 1, 3).requires_grad_()
    arguments: Arguments = value, [(4, 4)], locations, weights
    torch.testing.assert_close(_gradients(path, arguments), _gradients(attention_by_grid_sample, arguments))


@pytest.mark.heavy
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("queries", [3, 40])
def test_multi_scale_deformable_attention__gradcheck(path: Callable[..., Tensor], queries: int) -> None:
    value, shapes, locations, weights = attention_arguments([(3, 4), (2, 2)], queries=queries, dtype=torch.float64)
    direction = torch.randn(1, queries, 8, dtype=torch.float64)

    def product(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:  # one number: 40 queries stay fast
        return (path(value, shapes, locations, weights) * direction).sum()

    assert torch.autograd.gradcheck(product, (value, locations, weights), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_multi_scale_deformable_attention__half_precision_is_summed_in_float32(
    path: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    value, shapes, locations, weights = attention_arguments([(16, 16), (8, 8)], queries=50, points=8, dtype=dtype)
    output = path(value, shapes, locations, weights)
    exact = attention_by_grid_sample(value.double(), shapes, locations.double(), weights.double())
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-5)
    output.sum().backward()
    assert value.grad is not None
    assert value.grad.dtype == dtype
    assert locations.grad is not None
    assert locations.grad.dtype == torch.float32


def test_multi_scale_deformable_attention__autocast_changes_nothing() -> None:
    arguments = attention_arguments([(8, 8), (4, 4)], queries=30)
    expected = _gradients(multi_scale_deformable_attention, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(_gradients(multi_scale_deformable_attention, arguments), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("batch", "queries"), [(1, 0), (2, 0), (0, 3)])
def test_multi_scale_deformable_attention__no_queries_or_no_images(
    path: Callable[..., Tensor], batch: int, queries: int
) -> None:
    arguments = attention_arguments([(4, 4), (2, 2)], batch=batch, queries=queries)
    output, *gradients = _gradients(path, arguments)
    assert output.shape == (batch, queries, 8)
    assert [g.shape for g in gradients] == [a.shape for a in arguments if isinstance(a, Tensor)]
    assert all((g == 0).all() for g in gradients)


def test_attention_by_gather__a_location_that_is_not_finite_reads_no_foreign_memory() -> None:
    value, shapes, locations, weights = attention_arguments([(4, 4), (2, 2)], queries=6)
    with torch.no_grad():
        expected = attention_by_gather(value, shapes, locations, weights)
        for query, bad in enumerate((float("nan"), float("inf"), float("-inf"), 1e30)):
            locations[0, query] = bad
        output = attention_by_gather(value, shapes, locations, weights)
    assert output[0, 0].isnan().all()
    assert (output[0, 1:4] == 0).all()
    torch.testing.assert_close(output[0, 4:], expected[0, 4:])
    gradients = _gradients(attention_by_gather, (value, shapes, locations, weights))[1:]
    assert gradients[1][0, 4:].isfinite().all()


@pytest.mark.parametrize("shapes", [[(4, 4), (1, 3)], [(3, 1)], [(1, 1)]], ids=str)
def test_multi_scale_deformable_attention__levels_one_pixel_wide_or_high(shapes: list[tuple[int, int]]) -> None:
    arguments = attention_arguments(shapes, dtype=torch.float64)
    torch.testing.assert_close(multi_scale_deformable_attention(*arguments), attend_in_a_loop(*arguments))


def test_multi_scale_deformable_attention__the_fast_path_is_deterministic() -> None:
    arguments = attention_arguments([(20, 20), (10, 10)], queries=700, heads=8)
    first, second = (_gradients(attention_by_gather, arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_multi_scale_deformable_attention__reads_photos(photos: list[Tensor]) -> None:
    levels = [nn.functional.avg_pool2d(photo[None] / 255, 8) for photo in photos]  # three images as three levels
    value = torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)[:, :, None]  # [1, S, 1, 3]
    shapes = [(level.shape[2], level.shape[3]) for level in levels]
    _, _, locations, weights = attention_arguments(shapes, queries=400, heads=1, points=4, margin=0.05)
    fast = multi_scale_deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(fast, attention_by_grid_sample(value, shapes, locations, weights), rtol=1e-5, atol=1e-5)


def test_multi_scale_deformable_attention__variable_switches_the_fast_path_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the fast path ran")

    monkeypatch.setattr(deform_attn, "attention_by_gather", refuse)
    arguments = attention_arguments([(4, 4)])
    monkeypatch.setenv("DISABLE_CUSTOM_KERNELS", "1")
    multi_scale_deformable_attention(*arguments)
    monkeypatch.setenv("DISABLE_CUSTOM_KERNELS", "0")
    with pytest.raises(AssertionError, match="fast path"):
        multi_scale_deformable_attention(*arguments)


@pytest.mark.heavy
def test_multi_scale_deformable_attention__exports_as_grid_sample() -> None:
    class Attention(nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return multi_scale_deformable_attention(value, [(4, 4), (2, 2)], locations, weights)

    value, _shapes, locations, weights = attention_arguments([(4, 4), (2, 2)], batch=2)
    queries = torch.export.Dim("queries")
    program = torch.export.export(
        Attention(), (value, locations, weights), dynamic_shapes=({}, {1: queries}, {1: queries})
    )
    assert "grid_sampler" in str(program.graph)
    more = attention_arguments([(4, 4), (2, 2)], batch=2, queries=9)
    torch.testing.assert_close(program.module()(more[0], *more[2:]), attention_by_grid_sample(*more))


@pytest.mark.heavy
def test_multi_scale_deformable_attention__compiles_without_a_graph_break() -> None:
    arguments = attention_arguments([(4, 4), (2, 2)], batch=2)
    compiled = torch.compile(multi_scale_deformable_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(_gradients(compiled, arguments), _gradients(multi_scale_deformable_attention, arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s, x, w: (v.flatten(2), s, x, w), "value must be [batch, positions, heads, head_dim]"),
        (lambda v, s, x, w: (v, [(4, 4)], x, w), "value holds 20 positions, which spatial_shapes [(4, 4)] do not"),
        (lambda v, s, x, w: (v, [], x, w), "value holds 20 positions, which spatial_shapes [] do not"),
        (lambda v, s, x, w: (v, s, x[:, :, :1], w), "sampling_locations must be [1, queries, 2, 2, points, 2]"),
        (lambda v, s, x, w: (v, s, x, w[..., :2]), "attention_weights must have the shape of sampling_locations"),
    ],
    ids=["flat value", "level missing", "no level", "heads differ", "points differ"],
)
def test_multi_scale_deformable_attention__shapes_that_do_not_fit(
    change: Callable[..., Arguments], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        multi_scale_deformable_attention(*change(*attention_arguments([(4, 4), (2, 2)])))


@pytest.mark.parity
def test_multi_scale_deformable_attention__equals_birder() -> None:
    msda = pytest.importorskip("birder.ops.msda")
    value, shapes, locations, weights = attention_arguments([(12, 9), (6, 5), (3, 3)], batch=2, queries=30, heads=4)
    sizes = torch.tensor(shapes)
    starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
    theirs = msda.multi_scale_deformable_attention(
        value, sizes, starts, locations, weights, 64, [list(shape) for shape in shapes]
    )
    ours = multi_scale_deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
