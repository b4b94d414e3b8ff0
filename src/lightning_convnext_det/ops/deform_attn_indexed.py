"""Multi-scale deformable attention from elementary operators of fixed shapes, for compilers such as XLA.

XLA computes ``grid_sample`` on the host, forward and backward. Here ``gather`` reads the four pixels around each
position of every level; gradients are autograd's.
"""

import torch
from torch import Tensor

_CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))


def attention_by_indexing(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Deformable attention by ``gather``; no shape depends on a value."""
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    tables = torch.split(value.to(dtype).transpose(1, 2), [h * w for h, w in spatial_shapes], dim=2)  # [B, heads, S, D]
    locations = sampling_locations.to(dtype).transpose(1, 2)  # [B, heads, Q, levels, points, 2]
    weights = attention_weights.to(dtype).transpose(1, 2)  # [B, heads, Q, levels, points]
    batch, heads, queries = weights.shape[:3]
    output = value.new_zeros(batch, heads, queries, value.shape[3], dtype=dtype)
    for level, (table, shape) in enumerate(zip(tables, spatial_shapes, strict=True)):
        output = output + _read_level(table, shape, locations[:, :, :, level], weights[:, :, :, level])
    return output.transpose(1, 2).flatten(2).to(value.dtype)


def _read_level(table: Tensor, shape: tuple[int, int], locations: Tensor, weights: Tensor) -> Tensor:
    """Sum over the points [B, heads, Q, points, 2] of a level, whose table is [B, heads, S, D]; [B, heads, Q, D]."""
    height, width = shape
    x, y = locations[..., 0] * width - 0.5, locations[..., 1] * height - 0.5
    left, top = x.detach().floor(), y.detach().floor()
    x, y = x - left, y - top  # distances from the upper left of four neighbours
    total = torch.zeros_like(table[:, :, :1])
    for right, below in _CORNERS:
        column, row = left + right, top + below
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        share = (x if right else 1 - x) * (y if below else 1 - y) * weights
        index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).to(torch.int64)  # [B, heads, Q, points]
        rows = table.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, table.shape[3]))
        total = total + (rows.view(*index.shape, table.shape[3]) * torch.where(inside, share, 0.0)[..., None]).sum(3)
    return total
