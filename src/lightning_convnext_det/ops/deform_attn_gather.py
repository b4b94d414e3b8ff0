"""Multi-scale deformable attention on the CPU by a weighted gather, with closed-form gradients.

Each (query, head) is one sum of levels x points x 4 rows of the value table, weighted by bilinear weight times
attention weight. Index and weight arithmetic costs more than the sum, so queries are processed in chunks whose buffers
stay in the cache; the backward pass recomputes them and keeps only the arguments.

Below, a bag is one (query, head), and its samples are its levels x points positions.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_convnext_det.ops.attention_operator import attention_operator, contiguous_like
from lightning_convnext_det.ops.weighted_gather import dot_rows, gather_rows, scatter_rows

_SAMPLES_PER_CHUNK = 2**16  # buffers of a quarter megabyte each, which stay in a core's second-level cache


def attention_by_gather(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Compute `deform_attn.multi_scale_deformable_attention` on the CPU; every level must be at least 2 x 2 pixels.

    An opaque operator for ``torch.compile``. Gradients are of the first order, and the same in every run.
    """
    sizes = [size for shape in spatial_shapes for size in shape]
    output: Tensor = _forward_op(value, sizes, sampling_locations, attention_weights)
    return output


class _Lattice(NamedTuple):
    """Sizes of the level of every sample of a chunk, each [bags, samples]."""

    width: Tensor  # of the level, in pixels, floating
    height: Tensor
    last_left: Tensor  # the last column, and row, of pixels that have a right, and lower, neighbour
    last_top: Tensor
    row_step: Tensor  # rows of the table from a pixel to the one below it, int32
    start: Tensor  # row of the table of the level's first pixel, for this head, int32


class _Samples(NamedTuple):
    """Positions of the samples of a chunk: four neighbouring pixels each, and the distances from the upper left one."""

    lattice: _Lattice
    attention: Tensor  # [bags, samples]
    x: Tensor  # columns right of the upper left pixel's centre, within 0 ... 1 unless outside the map, [bags, samples]
    y: Tensor
    rows: Tensor  # of the table: upper left, upper right, lower left, lower right; int32 [bags, 4, samples]


def _forward(value: Tensor, sizes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    batch, queries, heads, levels, points, _ = sampling_locations.shape
    dtype = _compute_dtype(value)
    lattice = _build_lattice(sizes, queries, heads, points, dtype)
    output = value.new_empty(batch, queries * heads, value.shape[3])
    for image in range(batch):
        table = value[image].to(dtype).reshape(-1, value.shape[3])  # [S * heads, D]
        locations = sampling_locations[image].to(dtype).reshape(queries * heads, levels * points, 2)
        attention = attention_weights[image].to(dtype).reshape(queries * heads, levels * points)
        for bags, samples in _locate_chunks(locations, attention, lattice, heads):
            output[image, bags] = gather_rows(table, samples.rows.flatten(1), _corner_weights(samples).flatten(1))
    return output.view(batch, queries, heads * value.shape[3])


def _backward(
    grad: Tensor, value: Tensor, sizes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all three tensors: head by head for many samples, as the maps of one fit the cache, else at once."""
    batch, queries, heads, levels, points, _ = sampling_locations.shape
    dtype = _compute_dtype(value)
    grad = grad.to(dtype).view(batch, queries, heads, value.shape[3])
    step = 1 if _has_many_samples(queries * levels * points, value.shape[1]) else heads
    lattice = _build_lattice(sizes, queries, step, points, dtype)
    grads = contiguous_like(value), contiguous_like(sampling_locations), contiguous_like(attention_weights)
    for image in range(batch):
        for head in range(0, heads, step):
            here = image, slice(None), slice(head, head + step)
            table, rows = (features[here].to(dtype).flatten(0, 1).contiguous() for features in (value, grad))
            locations = sampling_locations[here].to(dtype).reshape(queries * step, levels * points, 2)
            attention = attention_weights[here].to(dtype).reshape(queries * step, levels * points)
            parts = _backward_heads(rows, table, sizes, locations, attention, lattice, step)
            for target, part in zip(grads, parts, strict=True):
                target[here] = part.view(target[here].shape)
    return grads


def _backward_heads(
    grad: Tensor,
    table: Tensor,
    sizes: Sequence[int],
    locations: Tensor,
    attention: Tensor,
    lattice: _Lattice,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    is_many = _has_many_samples(attention.numel(), len(table))
    grad_locations, grad_attention = torch.empty_like(locations), torch.empty_like(attention)
    rows = attention.new_empty(1 if is_many else 4, *attention.shape, dtype=torch.int32)
    weights = attention.new_empty(4, *attention.shape)
    for bags, samples in _locate_chunks(locations, attention, lattice, heads):
        dots = dot_rows(grad[bags], table, samples.rows.flatten(1)).view_as(samples.rows)
        grad_locations[bags, :, 0], grad_locations[bags, :, 1], grad_attention[bags] = _differentiate(samples, dots)
        rows[:, bags] = samples.rows[:, : len(rows)].transpose(0, 1)
        weights[:, bags] = _corner_weights(samples).transpose(0, 1)
    if is_many:
        grad_table = _scatter_corners(grad, rows[0], weights, sizes)
    else:
        sources = _repeat_bags(attention, 4)
        grad_table = scatter_rows(grad, sources, rows.flatten(), weights.view(1, -1), len(table))[0]
    return grad_table, grad_locations, grad_attention


def _has_many_samples(samples: int, pixels: int) -> bool:
    """Whether sorting the samples costs more than one pass over the map per corner."""
    return samples > 4 * pixels  # measured for heads 32 wide


def _build_lattice(sizes: Sequence[int], queries: int, heads: int, points: int, dtype: torch.dtype) -> _Lattice:
    """Repeat the levels' sizes for the samples of a chunk: whole queries, at most `_SAMPLES_PER_CHUNK` samples."""
    height, width = torch.tensor(sizes).view(-1, 2).unbind(1)  # [levels]
    queries = min(queries, max(1, _SAMPLES_PER_CHUNK // max(1, heads * len(height) * points)))
    area = height * width
    start = ((area.cumsum(0) - area) * heads).repeat_interleave(points) + torch.arange(heads)[:, None]

    def spread(numbers: Tensor, dtype: torch.dtype) -> Tensor:  # written out, since broadcasting short rows is slow
        return numbers.to(dtype).repeat_interleave(points).repeat(queries * heads, 1)

    return _Lattice(
        spread(width, dtype),
        spread(height, dtype),
        spread(width - 2, dtype),
        spread(height - 2, dtype),
        spread(width * heads, torch.int32),
        start.to(torch.int32).repeat(queries, 1),
    )


def _locate_chunks(
    locations: Tensor, attention: Tensor, lattice: _Lattice, heads: int
) -> Iterator[tuple[slice, _Samples]]:
    """Yield the samples of the bags in chunks of the lattice's size."""
    for begin in range(0, len(locations), max(1, len(lattice.width))):
        bags = slice(begin, min(begin + len(lattice.width), len(locations)))
        part = _Lattice(*(numbers[: bags.stop - begin] for numbers in lattice))
        yield bags, _locate(locations[bags], attention[bags], part, heads)


def _locate(locations: Tensor, attention: Tensor, lattice: _Lattice, heads: int) -> _Samples:
    """Find the four pixels around each sample; outside the map the nearest four, whose weights are then zero."""
    minus_half, zero = locations.new_full((), -0.5), locations.new_zeros(())
    x = torch.addcmul(minus_half, locations[..., 0], lattice.width)
    y = torch.addcmul(minus_half, locations[..., 1], lattice.height)
    left = x.floor().clamp_(zero, lattice.last_left)
    top = y.floor().clamp_(zero, lattice.last_top)
    upper = left.to(torch.int32).mul_(heads).add_(lattice.start)
    upper.add_(top.to(torch.int32).mul_(lattice.row_step))
    upper.clamp_(min=0)  # NaN becomes an arbitrary integer; its weight is NaN, its row must exist
    lower = upper + lattice.row_step
    rows = torch.stack((upper, upper + heads, lower, lower + heads), dim=1)
    return _Samples(lattice, attention, x.sub_(left), y.sub_(top), rows)


def _corner_weights(samples: _Samples) -> Tensor:
    """Bilinear weight times attention weight of the four pixels, [bags, 4, samples]."""
    left, right = _hat(samples.x), _hat(samples.x - 1)
    upper, lower = _hat(samples.y).mul_(samples.attention), _hat(samples.y - 1).mul_(samples.attention)
    return torch.stack((left * upper, right * upper, left * lower, right * lower), dim=1)


def _differentiate(samples: _Samples, dots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x and y in units of the map and in the attention weights, each [bags, samples].

    Args:
        samples: the samples.
        dots: scalar product of the output's gradient with each of the four pixels, [bags, 4, samples].
    """
    left, right = _hat(samples.x), _hat(samples.x - 1)
    upper, lower = _hat(samples.y), _hat(samples.y - 1)
    upper_left, upper_right, lower_left, lower_right = dots.unbind(1)
    above = torch.addcmul(left * upper_left, right, upper_right)
    below = torch.addcmul(left * lower_left, right, lower_right)
    grad_attention = torch.addcmul(upper * above, lower, below)
    grad_y = torch.addcmul(_hat_slope(samples.y) * above, _hat_slope(samples.y - 1), below)
    on_left = torch.addcmul(upper * upper_left, lower, lower_left)
    on_right = torch.addcmul(upper * upper_right, lower, lower_right)
    grad_x = torch.addcmul(_hat_slope(samples.x) * on_left, _hat_slope(samples.x - 1), on_right)
    grad_x.mul_(samples.attention).mul_(samples.lattice.width)
    grad_y.mul_(samples.attention).mul_(samples.lattice.height)
    return grad_x, grad_y, grad_attention


def _scatter_corners(grad_rows: Tensor, pixels: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """Gradient of one head's maps, [S, D].

    The samples are sorted once by their upper left pixel, summed for each of their four corners, and the four maps of
    sums are added with their shifts: a quarter of the sorting that four separate pixels per sample would need.

    Args:
        grad_rows: gradient of the head's output, [Q, D].
        pixels: upper left pixel of each sample, counted through the levels, int32 [Q, samples].
        weights: corner weights, [4, Q, samples].
        sizes: height and width of each level, one after another.
    """
    shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    areas = [height * width for height, width in shapes]
    corners = scatter_rows(grad_rows, _repeat_bags(pixels, 1), pixels.flatten(), weights.flatten(1), sum(areas))
    for level, (upper_left, *others) in enumerate(
        zip(*(torch.split(corner, areas) for corner in corners), strict=True)
    ):
        total, right, below, below_right = (part.view(*shapes[level], -1) for part in (upper_left, *others))
        total[:, 1:] += right[:, :-1]
        total[1:] += below[:-1]
        total[1:, 1:] += below_right[:-1, :-1]
    return corners[0]


def _repeat_bags(samples: Tensor, times: int) -> Tensor:
    """Number of the bag of each sample of [bags, samples], int32, repeated as a whole."""
    bags = torch.arange(len(samples), dtype=torch.int32)[:, None]
    return bags.expand(samples.shape).repeat(times, 1).flatten()


def _hat(distance: Tensor) -> Tensor:
    """Bilinear weight of a pixel at a distance: 1 at 0, descending to 0 at 1 and beyond."""
    return distance.abs().neg_().add_(1).clamp_(min=0)


def _hat_slope(distance: Tensor) -> Tensor:
    """Derivative of `_hat`; where it jumps, the one to the right, as grid_sample has it."""
    cell = distance.floor()
    return (cell + 1).eq_(0).sub_(cell.eq_(0))  # in place, eq_ stays in floating point


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


_forward_op = attention_operator("deformable_attention_gather", _forward, _backward, device_types="cpu")
