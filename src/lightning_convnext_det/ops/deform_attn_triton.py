"""Multi-scale deformable attention as a Triton kernel, forward and backward, for CUDA.

Imported only where Triton is installed. One program takes a block of (query, head) pairs, called bags as in
``deform_attn_gather``, with all channels of their heads; the width of a head need not be a power of two. Sums are
accumulated in float32, in float64 for float64. The gradient of the maps is added atomically: its last bits may change
from run to run.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_convnext_det.ops.attention_operator import attention_operator, contiguous_like

_TILE = 512  # bags x channels of a program: four warps of one 16-byte load per thread and pixel, 64 registers backward


def attention_by_triton(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Deformable attention by a GPU kernel, an opaque operator for ``torch.compile``.

    Takes CPU tensors only under Triton's interpreter (``TRITON_INTERPRET=1``), which is for tests.
    """
    sizes = [size for shape in spatial_shapes for size in shape]
    output: Tensor = _forward_op(value, sizes, sampling_locations, attention_weights)
    return output


# the arguments of a kernel have no Python types: they are pointers and numbers on the device
@triton.jit
def _corner(image, x, y, width, height, stride, channels):  # type: ignore[no-untyped-def]
    """Pointers to the pixels (x, y), whole numbers [bags], and whether they are inside; NaN is outside."""
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return image + ((y * width + x).to(tl.int64) * stride)[:, None], inside[:, None] & channels


@triton.jit
def _load_level(levels, level):  # type: ignore[no-untyped-def]
    """Height, width and first position of a level."""
    return tl.load(levels + level * 3), tl.load(levels + level * 3 + 1), tl.load(levels + level * 3 + 2)


@triton.jit  # type: ignore[untyped-decorator]
def _locate(locations, length, in_range, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pixel before each location along one axis, and the distance from its centre."""
    position = tl.load(locations, mask=in_range, other=0).to(DTYPE) * length - 0.5
    before = tl.floor(position)
    return before, position - before


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    value,
    levels,
    locations,
    attention,
    output,
    positions,
    queries,
    heads,
    head_dim,
    num_bags,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BAGS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    channel = tl.arange(0, CHANNELS)[None, :]
    in_range = bag < num_bags
    mask = in_range[:, None] & (channel < head_dim)
    image = bag // heads // queries * positions * heads + bag % heads  # row of the table of this head's first pixel
    total = tl.zeros((BAGS, CHANNELS), dtype=DTYPE)
    for level in range(LEVELS):
        height, width, start = _load_level(levels, level)
        level_map = value + ((image + start * heads) * head_dim)[:, None] + channel
        for point in range(POINTS):
            sample = bag * (LEVELS * POINTS) + level * POINTS + point
            weight = tl.load(attention + sample, mask=in_range, other=0).to(DTYPE)
            left, x_part = _locate(locations + sample * 2, width, in_range, DTYPE)
            top, y_part = _locate(locations + sample * 2 + 1, height, in_range, DTYPE)
            stride = heads * head_dim
            at, there = _corner(level_map, left, top, width, height, stride, mask)
            total += (weight * (1 - x_part) * (1 - y_part))[:, None] * tl.load(at, mask=there, other=0).to(DTYPE)
            at, there = _corner(level_map, left + 1, top, width, height, stride, mask)
            total += (weight * x_part * (1 - y_part))[:, None] * tl.load(at, mask=there, other=0).to(DTYPE)
            at, there = _corner(level_map, left, top + 1, width, height, stride, mask)
            total += (weight * (1 - x_part) * y_part)[:, None] * tl.load(at, mask=there, other=0).to(DTYPE)
            at, there = _corner(level_map, left + 1, top + 1, width, height, stride, mask)
            total += (weight * x_part * y_part)[:, None] * tl.load(at, mask=there, other=0).to(DTYPE)
    tl.store(output + bag[:, None] * head_dim + channel, total, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_output,
    value,
    levels,
    locations,
    attention,
    grad_value,
    grad_locations,
    grad_attention,
    positions,
    queries,
    heads,
    head_dim,
    num_bags,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BAGS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    channel = tl.arange(0, CHANNELS)[None, :]
    in_range = bag < num_bags
    mask = in_range[:, None] & (channel < head_dim)
    image = bag // heads // queries * positions * heads + bag % heads
    grad = tl.load(grad_output + bag[:, None] * head_dim + channel, mask=mask, other=0).to(DTYPE)
    for level in range(LEVELS):
        height, width, start = _load_level(levels, level)
        level_map = ((image + start * heads) * head_dim)[:, None] + channel
        for point in range(POINTS):
            sample = bag * (LEVELS * POINTS) + level * POINTS + point
            weight = tl.load(attention + sample, mask=in_range, other=0).to(DTYPE)
            left, x_part = _locate(locations + sample * 2, width, in_range, DTYPE)
            top, y_part = _locate(locations + sample * 2 + 1, height, in_range, DTYPE)
            stride = heads * head_dim
            at, there = _corner(level_map, left, top, width, height, stride, mask)
            upper_left = tl.load(value + at, mask=there, other=0).to(DTYPE)
            share = (weight * (1 - x_part) * (1 - y_part))[:, None] * grad
            tl.atomic_add(grad_value + at, share, mask=there, sem="relaxed")
            at, there = _corner(level_map, left + 1, top, width, height, stride, mask)
            upper_right = tl.load(value + at, mask=there, other=0).to(DTYPE)
            share = (weight * x_part * (1 - y_part))[:, None] * grad
            tl.atomic_add(grad_value + at, share, mask=there, sem="relaxed")
            at, there = _corner(level_map, left, top + 1, width, height, stride, mask)
            lower_left = tl.load(value + at, mask=there, other=0).to(DTYPE)
            share = (weight * (1 - x_part) * y_part)[:, None] * grad
            tl.atomic_add(grad_value + at, share, mask=there, sem="relaxed")
            at, there = _corner(level_map, left + 1, top + 1, width, height, stride, mask)
            lower_right = tl.load(value + at, mask=there, other=0).to(DTYPE)
            share = (weight * x_part * y_part)[:, None] * grad
            tl.atomic_add(grad_value + at, share, mask=there, sem="relaxed")
            above = upper_left + x_part[:, None] * (upper_right - upper_left)
            below = lower_left + x_part[:, None] * (lower_right - lower_left)
            across = (1 - y_part)[:, None] * (upper_right - upper_left) + y_part[:, None] * (lower_right - lower_left)
            along_x = tl.sum(grad * across, axis=1) * weight * width
            along_y = tl.sum(grad * (below - above), axis=1) * weight * height
            read = tl.sum(grad * (above + y_part[:, None] * (below - above)), axis=1)
            tl.store(grad_locations + sample * 2, along_x, mask=in_range)
            tl.store(grad_locations + sample * 2 + 1, along_y, mask=in_range)
            tl.store(grad_attention + sample, read, mask=in_range)


def _forward(value: Tensor, sizes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    output = value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])
    if output.numel() == 0:
        return output
    tensors = value, _level_table(tuple(sizes), value.device), sampling_locations, attention_weights
    _launch(_forward_kernel, [tensor.contiguous() for tensor in tensors] + [output], value, sampling_locations)
    return output


def _backward(
    grad: Tensor, value: Tensor, sizes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)
    grads = contiguous_like(sampling_locations), contiguous_like(attention_weights)
    if grad.numel() > 0:
        tensors = grad, value, _level_table(tuple(sizes), value.device), sampling_locations, attention_weights
        pointers = [tensor.contiguous() for tensor in tensors]
        _launch(_backward_kernel, [*pointers, grad_value, *grads], value, sampling_locations)
    return grad_value.to(value.dtype), *grads


def _launch(kernel: Any, pointers: list[Tensor], value: Tensor, sampling_locations: Tensor) -> None:  # Any: Triton's
    batch, queries, heads, levels, points, _ = sampling_locations.shape
    positions, head_dim = value.shape[1], value.shape[3]
    channels = triton.next_power_of_2(head_dim)
    bags = max(1, _TILE // channels)
    num_bags = batch * queries * heads
    numbers = positions, queries, heads, head_dim, num_bags
    dtype = tl.float64 if value.dtype == torch.float64 else tl.float32
    index = value.device.index if value.is_cuda else -1
    with torch.cuda.device(index):  # Triton launches on the current device; -1 changes nothing
        kernel[(triton.cdiv(num_bags, bags),)](
            *pointers, *numbers, LEVELS=levels, POINTS=points, BAGS=bags, CHANNELS=channels, DTYPE=dtype
        )


@lru_cache(maxsize=64)  # one transfer for each new set of image sizes, not one per layer and step
def _level_table(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Height, width and first position of each level, int32 [levels, 3]."""
    shapes = torch.tensor(sizes, dtype=torch.int32).view(-1, 2)
    areas = shapes.prod(dim=1)
    return torch.cat((shapes, (areas.cumsum(0) - areas)[:, None]), dim=1).to(torch.int32).to(device)


_forward_op = attention_operator("deformable_attention_triton", _forward, _backward)
