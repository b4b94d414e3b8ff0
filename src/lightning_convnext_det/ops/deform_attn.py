"""Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159, equation 3) without a compile step.

Four implementations of one operator: `attention_by_grid_sample`, the plain reference, for every device, exporter and
tracer; the weighted gather of ``deform_attn_gather``, several times faster on a CPU, forward and backward; the Triton
kernel of ``deform_attn_triton`` for CUDA; and ``deform_attn_indexed`` for devices and runtimes without ``grid_sample``.
`multi_scale_deformable_attention` takes the fastest that applies.

Positions are those of ``grid_sample(align_corners=False, padding_mode="zeros")``: 0 and 1 are the outer edges of the
map, the centre of pixel i lies at (i + 0.5) / width, and positions outside of the map read zero.
"""

import os

import torch
from torch import Tensor
from torch.nn import functional

from lightning_convnext_det.ops.deform_attn_gather import attention_by_gather
from lightning_convnext_det.ops.deform_attn_indexed import attention_by_indexing
from lightning_convnext_det.ops.tracing import is_recording, recorded_attention
from lightning_convnext_det.ops.triton_kernels import has_triton


def multi_scale_deformable_attention(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Weighted sum of feature vectors sampled at a few positions per query, head and level.

    All implementations agree to about 1e-5 in float32. Half precision is accumulated in float32, and locations and
    attention weights may have another dtype than ``value``: under autocast, keep them in float32, since bfloat16
    rounds positions to 1/256 of the map. ``DISABLE_CUSTOM_KERNELS=1`` in the environment selects the reference.

    >>> import torch
    >>> value = torch.arange(4.0).reshape(1, 4, 1, 1)  # one map of 2 x 2 pixels: 0, 1 above 2, 3
    >>> locations = torch.tensor([[0.25, 0.25], [0.5, 0.5]]).reshape(1, 2, 1, 1, 1, 2)  # first pixel, middle of the map
    >>> multi_scale_deformable_attention(value, [(2, 2)], locations, torch.ones(1, 2, 1, 1, 1)).flatten().tolist()
    [0.0, 1.5]

    Args:
        value: projected feature maps of all levels, flattened row by row and joined, floating
            [B, S, heads, head_dim].
        spatial_shapes: height and width of each level; their products add up to S.
        sampling_locations: positions (x, y) in units of each level's width and height, 0 ... 1 inside the map,
            floating [B, Q, heads, levels, points, 2].
        attention_weights: weight of each position, floating [B, Q, heads, levels, points].

    Returns:
        Attended features [B, Q, heads * head_dim] in the dtype of ``value``.

    Raises:
        ValueError: if the shapes do not agree.

    Reference:
        Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", arXiv:2010.04159.
    """
    if is_recording():
        recorded = attention_by_indexing if recorded_attention() == "gather" else attention_by_grid_sample
        return recorded(value, spatial_shapes, sampling_locations, attention_weights)
    _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    if value.is_meta:  # grid_sample would be a hundred operators
        batch, _, heads, head_dim = value.shape
        return value.new_empty(batch, sampling_locations.shape[1], heads * head_dim)
    if value.device.type == "xla":
        return attention_by_indexing(value, spatial_shapes, sampling_locations, attention_weights)
    if os.environ.get("DISABLE_CUSTOM_KERNELS") != "1":
        has_four_corners = min(min(shape) for shape in spatial_shapes) > 1
        if value.device.type == "cpu" and has_four_corners:
            return attention_by_gather(value, spatial_shapes, sampling_locations, attention_weights)
        # the kernel adds atomically; where determinism is asked for, grid_sample raises PyTorch's own error
        if value.is_cuda and has_triton() and not torch.are_deterministic_algorithms_enabled():
            from lightning_convnext_det.ops.deform_attn_triton import attention_by_triton

            return attention_by_triton(value, spatial_shapes, sampling_locations, attention_weights)
    return attention_by_grid_sample(value, spatial_shapes, sampling_locations, attention_weights)


def attention_by_grid_sample(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Deformable attention by one ``grid_sample`` per level: for any device, export and tracing."""
    batch, _, heads, head_dim = value.shape
    queries = sampling_locations.shape[1]
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)  # [B * heads, D, S]
    grids = (2 * sampling_locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1)  # [B * heads, Q, levels, points, 2]
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1)  # [B * heads, Q, levels, points]
    output = maps.new_zeros(batch * heads, head_dim, queries)
    levels = torch.split(maps, [height * width for height, width in spatial_shapes], dim=-1)
    for level, (features, (height, width)) in enumerate(zip(levels, spatial_shapes, strict=True)):
        features = features.reshape(batch * heads, head_dim, height, width)
        sampled = functional.grid_sample(features, grids[:, :, level], padding_mode="zeros", align_corners=False)
        output = output + (sampled * weights[:, None, :, level]).sum(-1)  # [B * heads, D, Q]
    return output.view(batch, heads * head_dim, queries).transpose(1, 2).to(value.dtype)


def _check_shapes(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    if value.ndim != 4:
        raise ValueError(f"value must be [batch, positions, heads, head_dim], but its shape is {list(value.shape)}")
    batch, positions, heads, _ = value.shape
    if not spatial_shapes or sum(height * width for height, width in spatial_shapes) != positions:
        raise ValueError(
            f"value holds {positions} positions, which spatial_shapes {list(spatial_shapes)} do not add up to; "
            "give the height and width of every level whose map was flattened into value"
        )
    shape = sampling_locations.shape
    if len(shape) != 6 or (shape[0], shape[2], shape[3], shape[5]) != (batch, heads, len(spatial_shapes), 2):
        raise ValueError(
            f"sampling_locations must be [{batch}, queries, {heads}, {len(spatial_shapes)}, points, 2] to go with "
            f"value and spatial_shapes, but its shape is {list(shape)}"
        )
    if attention_weights.shape != shape[:5]:
        raise ValueError(
            f"attention_weights must have the shape of sampling_locations without its last axis, {list(shape[:5])}, "
            f"but its shape is {list(attention_weights.shape)}"
        )
