"""RoIAlign on the CPU by a weighted gather, with its gradient.

The map is read as a table [pixels, channels], channels last, and each bin is a weighted sum of its rows. The samples of
a bin form a grid, so its weights are products of a few numbers per axis: n samples per axis touch 2n rows and 2n
columns. Where samples lie at most a pixel apart, as they do when their number follows from the size of the box, they
share pixels, and n + 1 suffice.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_convnext_det.ops.weighted_gather import gather_rows, scatter_rows

_PAIRS_PER_CHUNK = 2**22  # bounds the memory for indices and weights to 32 MB
# samples per bin for which boxes are treated together; each group costs a quarter of a millisecond, each place time too
_PLACES = [0, 1, 2, 3, 4, *(n * 2**k for k in range(1, 13) for n in (3, 4))]


def roi_align_by_gather(
    input: Tensor, rois: Tensor, output_size: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Compute `roi_align.roi_align` on the CPU for ``rois`` [K, 5]; ``sampling_ratio`` 0 follows the size of the box.

    An opaque operator for ``torch.compile``. The gradient reaches ``input`` only and is the same in every run. In half
    precision weights are rounded to the input's dtype, as its values are; sums are accumulated in float32.
    """
    pooled: Tensor = _forward_op(input, rois, *output_size, spatial_scale, sampling_ratio, aligned)
    return pooled.permute(0, 3, 1, 2)


class _Grid(NamedTuple):
    """Parameters of the pooling."""

    map_size: tuple[int, int, int]  # images, height, width
    bins: tuple[int, int]  # rows and columns of bins in a box
    spatial_scale: float
    sampling_ratio: int
    aligned: bool


class _Bags(NamedTuple):
    """Pixels and weights of the bins of some boxes, one bag per bin."""

    boxes: Tensor  # which boxes these are, int64 [k]
    rows: Tensor  # pixels of a bin, int32 [k * bins, pixels]
    weights: Tensor  # [k * bins, pixels]


def _forward(
    input: Tensor, rois: Tensor, height: int, width: int, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    images, channels, *size = input.shape
    table = input.permute(0, 2, 3, 1).contiguous().view(-1, channels)  # [B * H * W, C], no copy if channels last
    grid = _Grid((images, size[0], size[1]), (height, width), spatial_scale, sampling_ratio, aligned)
    pooled: Tensor | None = None
    for bags in _find_bags(rois.to(_compute_dtype(input)), grid):
        sums = gather_rows(table, bags.rows, bags.weights.to(input.dtype)).view(-1, height, width, channels)
        if len(sums) == len(rois):
            return sums  # all boxes at once need no copy, which would take as long as the sums
        if pooled is None:
            pooled = input.new_zeros(len(rois), height, width, channels)
        pooled.index_copy_(0, bags.boxes, sums)
    return input.new_zeros(len(rois), height, width, channels) if pooled is None else pooled


def _backward(
    grad: Tensor, rois: Tensor, map_size: list[int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    _, height, width, channels = grad.shape
    grid = _Grid((map_size[0], map_size[1], map_size[2]), (height, width), spatial_scale, sampling_ratio, aligned)
    nothing = torch.zeros(0)
    sources, rows, weights = [nothing.int()], [nothing.int()], [nothing.to(grad.dtype)]
    for bags in _find_bags(rois.to(_compute_dtype(grad)), grid):
        bag = bags.boxes.int()[:, None] * (height * width) + torch.arange(height * width, dtype=torch.int32)
        sources.append(bag.view(-1, 1).expand_as(bags.rows).flatten())
        rows.append(bags.rows.flatten())
        weights.append(bags.weights.flatten().to(grad.dtype))
    pairs = torch.cat(sources), torch.cat(rows), torch.cat(weights)[None]
    table = scatter_rows(grad.contiguous().view(-1, channels), *pairs, map_size[0] * map_size[1] * map_size[2])[0]
    return table.view(*map_size, channels)


def _find_bags(rois: Tensor, grid: _Grid) -> Iterator[_Bags]:
    """Yield the pixels of all bins, by groups of boxes with about equal numbers of samples."""
    corners = rois[:, 1:] * grid.spatial_scale - (0.5 if grid.aligned else 0.0)
    corners = torch.where(corners.isfinite().all(dim=1, keepdim=True), corners, torch.nan)  # no sample will count
    starts, sides = corners[:, :2], corners[:, 2:] - corners[:, :2]  # x, y
    if not grid.aligned:
        sides = sides.clamp(min=1.0)
    bin_sizes = sides / sides.new_tensor([grid.bins[1], grid.bins[0]])
    images = rois[:, 0].to(torch.int32) * (grid.map_size[1] * grid.map_size[2])
    samples = _count_samples(bin_sizes, grid.sampling_ratio)
    for places, group in _group(samples, grid.sampling_ratio):
        chunk = max(1, _PAIRS_PER_CHUNK // (4 * grid.bins[0] * grid.bins[1] * places[0] * places[1]))
        for boxes in torch.split(group, chunk):
            x, y = (
                _find_pixels(
                    starts[boxes, axis],
                    bin_sizes[boxes, axis],
                    samples[boxes, axis],
                    bins=grid.bins[1 - axis],
                    places=places[axis],
                    limit=grid.map_size[2 - axis],
                    shared=grid.sampling_ratio == 0,
                )
                for axis in (0, 1)
            )
            yield _Bags(boxes, *_cross(x, y, images[boxes], grid.map_size[2]))


def _count_samples(bin_sizes: Tensor, sampling_ratio: int) -> Tensor:
    """Samples per bin along x and y, int64 [K, 2]."""
    if sampling_ratio > 0:
        return torch.full(bin_sizes.shape, sampling_ratio)
    samples = bin_sizes.ceil().nan_to_num(0.0, 0.0, 0.0).clamp(min=0.0)  # a box that is not finite has no samples
    if (samples > _PLACES[-1]).any():
        box = int(samples.amax(dim=1).argmax())
        raise ValueError(
            f"the bins of box {box} are {samples[box].max():.3g} pixels of the map long, too long to sample each pixel "
            "as sampling_ratio 0 asks; clip boxes to the image first"
        )
    return samples.to(torch.int64)


def _group(samples: Tensor, sampling_ratio: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield groups of boxes, int64 [k], with the most samples per bin along x and y among them."""
    boxes = torch.arange(len(samples))
    if sampling_ratio > 0:
        yield [sampling_ratio, sampling_ratio], boxes
        return
    kinds = torch.searchsorted(torch.tensor(_PLACES), samples)
    groups, membership = torch.unique(kinds[:, 0] * len(_PLACES) + kinds[:, 1], return_inverse=True)
    for number, group in enumerate(groups.tolist()):
        places = [_PLACES[group // len(_PLACES)], _PLACES[group % len(_PLACES)]]
        if min(places) > 0:  # an inverted or empty box has no samples, and pools to zero
            yield places, boxes[membership == number]


def _find_pixels(
    start: Tensor, bin_size: Tensor, samples: Tensor, bins: int, places: int, limit: int, shared: bool
) -> tuple[Tensor, Tensor]:
    """Pixels along one axis and their weights, int32 and floating [k, bins, n].

    Args:
        start: left or upper edge of the boxes, in pixels of the map, [k].
        bin_size: length of their bins, [k].
        samples: samples in each of their bins, int64 [k].
        bins: bins per box.
        places: the most samples per bin.
        limit: pixels of the map along the axis.
        shared: whether samples are in ascending order and at most a pixel apart, so that n = places + 1 pixels suffice.
    """
    # the order of operations is torchvision's, so that positions are equal to the last bit
    begin = start[:, None] + torch.arange(bins) * bin_size[:, None]
    step = (torch.arange(places) + 0.5) * bin_size[:, None] / samples[:, None]
    at = begin[:, :, None] + step[:, None]  # [k, bins, places]
    counted = (at >= -1) & (at <= limit) & (torch.arange(places) < samples[:, None])[:, None]
    share = counted.to(at.dtype) / samples[:, None, None]
    at = at.clamp(0, limit - 1).nan_to_num(0.0)  # up to a pixel beyond the outermost, which is repeated
    low = at.floor().clamp_(max=max(limit - 2, 0))
    high_part = at - low
    weights = torch.stack(((1 - high_part) * share, high_part * share), dim=-1).flatten(2)
    low = low.to(torch.int32)
    pixels = torch.stack((low, (low + 1).clamp_(max=limit - 1)), dim=-1).flatten(2)  # [k, bins, 2 * places]
    if not shared:
        return pixels, weights
    first, count = pixels[:, :, :1], min(places + 1, limit)
    slots = (pixels - first).clamp_(max=count - 1)  # rounding may go one pixel too far, with a weight of 1e-6
    weights = weights.new_zeros(*weights.shape[:2], count).scatter_add_(2, slots.to(torch.int64), weights)
    return (first + torch.arange(count, dtype=torch.int32)).clamp_(max=limit - 1), weights


def _cross(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], images: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows of the table and weights of every pair of a column and a row of a bin, [k * bins, pixels]."""
    columns, rows = x[0].shape[2], y[0].shape[2]
    first = (y[0] * width + images[:, None, None]).repeat_interleave(columns, dim=2)[:, :, None]  # [k, bins, 1, pixels]
    pixels = first + x[0].repeat(1, 1, rows)[:, None]
    weights = y[1].repeat_interleave(columns, dim=2)[:, :, None] * x[1].repeat(1, 1, rows)[:, None]
    return pixels.flatten(0, 2), weights.flatten(0, 2)


def _compute_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # Any: torch's untyped context
    features, rois, _, _, *ctx.options = inputs
    ctx.map_size = [features.shape[0], features.shape[2], features.shape[3]]
    ctx.save_for_backward(rois)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # Any: torch's untyped context
    table: Tensor = _backward_op(grad, ctx.saved_tensors[0], ctx.map_size, *ctx.options)
    return table.permute(0, 3, 1, 2), None, None, None, None, None, None


def _fake_forward(
    input: Tensor, rois: Tensor, height: int, width: int, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    return input.new_empty(rois.shape[0], height, width, input.shape[1])


def _fake_backward(
    grad: Tensor, rois: Tensor, map_size: list[int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    return grad.new_empty(*map_size, grad.shape[3])


_forward_op = torch.library.custom_op(
    "lightning_convnext_det::roi_align_gather", _forward, mutates_args=(), device_types="cpu"
)
_backward_op = torch.library.custom_op(
    "lightning_convnext_det::roi_align_gather_backward", _backward, mutates_args=(), device_types="cpu"
)
_forward_op.register_fake(_fake_forward)
_backward_op.register_fake(_fake_backward)
_forward_op.register_autograd(_differentiate, setup_context=_setup_context)
