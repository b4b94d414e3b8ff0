"""Multi-scale deformable attention from elementary operators of fixed shapes, for compilers such as XLA and for files.

XLA computes ``grid_sample`` on the host, forward and backward, and some runtimes compute it wrongly. Here
``index_select`` reads the four pixels around each position of every level; gradients are autograd's.
"""

import torch
from torch import Tensor

from lightning_convnext_det.ops.tracing import is_recording


def attention_by_indexing(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Deformable attention by ``index_select`` of whole rows; no shape depends on a value."""
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    batch, positions, heads, head_dim = value.shape
    table = value.to(dtype).reshape(-1, head_dim)  # row (image * S + position) * heads + head
    locations, weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    image = torch.arange(batch, device=value.device)[:, None, None] * (positions * heads)
    first = image + torch.arange(
        heads, device=value.device
    )  # row of each image's and head's first position [B, 1, heads]
    output = value.new_zeros(batch, locations.shape[1], heads, head_dim, dtype=dtype)
    for level, shape in enumerate(spatial_shapes):
        rows, shares = _neighbours(locations[:, :, :, level], weights[:, :, :, level], shape)
        rows = rows * heads + first[..., None]
        values = table.index_select(0, rows.flatten()).view(*rows.shape, head_dim)
        if (
            is_recording()
        ):  # a third of the time of a product and a sum in onnxruntime; XLA computes products in bfloat16
            output = output + (shares[..., None, :] @ values)[..., 0, :]
        else:
            output = output + (values * shares[..., None]).sum(3)
        first = first + shape[0] * shape[1] * heads
    return output.flatten(2).to(value.dtype)


def _neighbours(locations: Tensor, weights: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The pixels around points [B, Q, heads, points, 2] of a level, int64, and their shares, [B, Q, heads, 4 * points].

    One tensor for each of the four, joined at the end: runtimes are slow on axes of two.
    """
    rows, columns = _both_sides(locations[..., 1], shape[0]), _both_sides(locations[..., 0], shape[1])
    index = torch.cat([row * shape[1] + column for row, _ in rows for column, _ in columns], -1)
    shares = [weights * share for _, share in rows]
    return index.to(torch.int64), torch.cat([y * x for y in shares for _, x in columns], -1)


def _both_sides(locations: Tensor, length: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The pixels before and after positions 0 ... 1 along one axis: number and share, which is 0 outside of the map."""
    position = locations * length - 0.5
    lower = position.detach().floor()
    upper, distance = lower + 1, position - lower
    before = torch.where((lower >= 0) & (lower < length), 1 - distance, 0.0)
    after = torch.where((upper >= 0) & (upper < length), distance, 0.0)
    return (lower.clamp(0, length - 1), before), (upper.clamp(0, length - 1), after)
