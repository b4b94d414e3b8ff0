"""Multi-scale feature maps as one sequence of tokens with position encodings and padding mask.

Unlike in the authors' implementation (fundamentalvision/Deformable-DETR), a batch without padding carries no mask,
position encodings are computed per row and per column, and images can be projected independently of their batch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.ops.host_numbers import send
from lightning_convnext_det.ops.tracing import is_recording

Frames = Mapping[tuple[int, int], list[int]]
"""The sizes (height, width) that images are cropped to before the backbone, and the images of the batch of each."""


class Levels(NamedTuple):
    """Feature maps of all levels as one sequence of S tokens per image, finest level first, row by row."""

    tokens: Tensor
    """Float [B, S, D]."""
    positions: Tensor
    """Sine encoding plus level embedding, float32 [B, S, D], or [1, S, D] without padding."""
    reference_points: Tensor
    """Centre (x, y) of every token in 0..1 of each map, float32 [B, S, L, 2], or [1, S, 1, 2] without padding."""
    centers: Tensor
    """Centre (x, y) of every token in 0..1 of its image, float32 [B, S, 2], or [1, S, 2] without padding."""
    spatial_shapes: list[tuple[int, int]]
    """Height and width of every level."""
    cells: Tensor
    """Width and height of a cell in 0..1 of each map, float32 [L, 2]."""
    valid_ratios: Tensor | None
    """Share of each level's width and height that the image fills, float32 [B, L, 2]; None without padding."""
    padding: Tensor | None
    """True on tokens outside the image, bool [B, S]; None without padding."""

    def to_maps(self, reference_points: Tensor) -> Tensor:
        """Convert points or boxes [B, Q, 2 or 4] from 0..1 of the image to 0..1 of each map, [B, Q, L or 1, 2 or 4]."""
        if self.valid_ratios is None:
            return reference_points[:, :, None]
        scale = self.valid_ratios.repeat(1, 1, reference_points.shape[-1] // 2)  # [B, L, 2 or 4]
        return reference_points[:, :, None] * scale[:, None]


class MapNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that also takes a map of one cell with one channel a group, of which the bias is left."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise maps [B, D, H, W]."""
        # without the check of torch.nn.functional, which refuses a single value
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class PyramidLevels(nn.Module):
    """Project the backbone's feature maps to one width, add coarser levels, and flatten all into tokens.

    Args:
        backbone: computes the feature maps; not part of this module.
        extra_levels: number of coarser levels, by convolutions of stride 2 on the coarsest map.
        hidden_dim: channels of the tokens.
        position_offset: see `flatten_levels`.
        independent_images: run backbone and projections, whose norms average over whole maps, on every image without
            the padding that its neighbours need; else on the padded batch.
        always_masked: compute the padding mask also where nothing is padded, so that all batches of a size have the
            same graph; images are then never independent.
        position_temperature: see `encode_sine`.
    """

    def __init__(
        self,
        backbone: TimmPyramid,
        extra_levels: int,
        hidden_dim: int,
        position_offset: float,
        independent_images: bool,
        always_masked: bool = False,
        position_temperature: float = 10000.0,
    ) -> None:
        super().__init__()
        channels = backbone.channels
        layers = [nn.Conv2d(c, hidden_dim, 1) for c in channels]
        for i in range(extra_levels):
            layers.append(nn.Conv2d(hidden_dim if i else channels[-1], hidden_dim, 3, stride=2, padding=1))
        self.projections = nn.ModuleList(nn.Sequential(layer, MapNorm(32, hidden_dim)) for layer in layers)
        self.embedding = nn.Parameter(torch.empty(len(layers), hidden_dim))
        self.position_offset, self.position_temperature = position_offset, position_temperature
        self.stride, self.size_divisible = backbone.strides[-1], backbone.size_divisible
        self.independent_images = independent_images and not always_masked
        self.always_masked = always_masked
        nn.init.normal_(self.embedding)
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.to(memory_format=backbone.memory_format)

    def place(self, batch: Tensor, sizes: Sequence[tuple[int, int]] | None) -> tuple[Tensor | None, Frames | None]:
        """Turn the images' sizes (height, width) into the arguments of a call; both are None without padding."""
        full = (batch.shape[-2], batch.shape[-1])
        if sizes is None or (not self.always_masked and all(size == full for size in sizes)):
            return None, None
        groups = None
        if self.independent_images:
            frames = [self._frame(size) for size in sizes]
            groups = {frame: [i for i, f in enumerate(frames) if f == frame] for frame in frames}
        return send(sizes, batch.device), None if groups is None or set(groups) == {full} else groups

    def forward(
        self, backbone: TimmPyramid, batch: Tensor, sizes: Tensor | None = None, frames: Frames | None = None
    ) -> Levels:
        """Compute the tokens of a batch.

        Args:
            backbone: computes the feature maps.
            batch: normalised images, float [B, C, H, W], H and W multiples of ``size_divisible``, zero on padding.
            sizes: (height, width) of every image without its padding, int64 [B, 2]; None if no image is padded.
            frames: groups of images that run through the backbone without the padding that others need (default: the
                batch is one group).
        """
        if frames is None:
            maps = self._project(backbone, batch)
            frame = number_tensor([batch.shape[-2:]], batch)  # [1, 2]
            cells = number_tensor([x.shape[-2:] for x in maps], batch)[None]  # [1, L, 2]
        else:
            seen = {(h, w): self._project(backbone, _take(batch, i)[..., :h, :w]) for (h, w), i in frames.items()}
            maps = [_assemble(list(parts), list(frames.values())) for parts in zip(*seen.values(), strict=True)]
            group = torch.empty(batch.shape[0], dtype=torch.int64)
            for number, images in enumerate(frames.values()):
                group[images] = number
            group = send(group, batch.device)
            frame = number_tensor(list(frames), batch)[group]  # [B, 2]
            cells = torch.stack([number_tensor([x.shape[-2:] for x in part], batch) for part in seen.values()])[group]
        if sizes is None and self.always_masked:
            sizes = frame
        valid = None if sizes is None else _count_covered(sizes, frame, cells)
        return flatten_levels(maps, valid, self.embedding, self.position_offset, self.position_temperature)

    def _frame(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size (height, width) that an image is padded to where it is alone."""
        height, width = (-(-max(n, self.stride) // self.size_divisible) * self.size_divisible for n in size)
        return height, width

    def _project(self, backbone: TimmPyramid, batch: Tensor) -> list[Tensor]:
        maps = backbone(batch)
        levels = [project(x) for project, x in zip(self.projections, maps, strict=False)]
        last = maps[-1]
        for project in list(self.projections)[len(maps) :]:
            last = project(last)
            levels.append(last)
        return levels


def flatten_levels(
    maps: Sequence[Tensor], valid_sizes: Tensor | None, level_embedding: Tensor, position_offset: float,
    temperature: float = 10000.0,
) -> Levels:  # fmt: skip
    """Flatten the feature maps of all levels into one sequence of tokens.

    Args:
        maps: float [B, D, H, W] per level.
        valid_sizes: (height, width) in cells that every image covers of each level, [B, L, 2]; None without padding.
        level_embedding: added to the position encoding of each level, float [L, D].
        position_offset: subtracted from the 1-based cell number before encoding it: 0.5 encodes cell centres, as the
            paper's authors and Hugging Face do; 0.0 encodes far edges, as birder does.
        temperature: see `encode_sine`.
    """
    device, shapes = maps[0].device, [(x.shape[-2], x.shape[-1]) for x in maps]
    tokens = torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], 1)  # [B, S, D]
    whole = number_tensor(shapes, tokens).to(torch.float32)  # [L, 2]
    valid = whole[None] if valid_sizes is None else valid_sizes.to(torch.float32)  # [B or 1, L, 2]
    positions, centers = [], []
    for level, (height, width) in enumerate(shapes):
        row = torch.arange(height, dtype=torch.float32, device=device)[:, None]  # [H, 1]
        column = torch.arange(width, dtype=torch.float32, device=device)[None]  # [1, W]
        valid_height, valid_width = valid[:, level, :1], valid[:, level, 1:]  # [B, 1]
        y = (row[:, 0] + 1 - position_offset) / (valid_height + 1e-6)  # [B, H]
        x = (column[0] + 1 - position_offset) / (valid_width + 1e-6)  # [B, W]
        positions.append(_encode_grid(y, x, tokens.shape[-1], temperature) + level_embedding[level])
        center_y = (row + 0.5) / valid_height[:, :, None]  # [B, H, 1]
        center_x = (column + 0.5) / valid_width[:, :, None]  # [B, 1, W]
        center = torch.stack([center_x.expand(-1, height, -1), center_y.expand(-1, -1, width)], -1)  # [B, H, W, 2]
        centers.append(center.flatten(1, 2))
    center, position = torch.cat(centers, 1), torch.cat(positions, 1)
    cells = 1 / whole.flip(-1)  # [L, 2] as (x, y)
    if valid_sizes is None:
        return Levels(tokens, position, center[:, :, None], center, shapes, cells, None, None)
    ratios = valid.flip(-1) * cells  # [B, L, 2]
    reference_points = center[:, :, None] * ratios[:, None]  # [B, S, L, 2]
    return Levels(tokens, position, reference_points, center, shapes, cells, ratios, (center >= 1).any(-1))


def _encode_grid(y: Tensor, x: Tensor, dim: int, temperature: float) -> Tensor:
    """Encode rows [B, H] and columns [B, W], both in 0..1: half of the channels hold y, half x. [B, H * W, dim]."""
    rows, columns = encode_sine(y, dim // 2, temperature), encode_sine(x, dim // 2, temperature)
    rows = rows[:, :, None].expand(-1, -1, x.shape[1], -1)  # [B, H, W, dim / 2]
    columns = columns[:, None].expand(-1, y.shape[1], -1, -1)
    return torch.cat([rows, columns], -1).flatten(1, 2)


def encode_sine(values: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Sine position encoding of numbers in 0..1, sines and cosines alternating; float32 [..., dim].

    The wavelengths run from 1, the length of the image, to ``temperature``.

    Reference:
        Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872, appendix A.4.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=values.device) / dim
    angles = (values * (2 * math.pi))[..., None] / temperature**exponents
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def _take(batch: Tensor, images: list[int]) -> Tensor:
    return batch if len(images) == batch.shape[0] else batch.index_select(0, send(images, batch.device))


def _assemble(maps: list[Tensor], images: list[list[int]]) -> Tensor:
    """Join the maps [b, D, h, w] of groups of images into one map [B, D, H, W], padded with zeros."""
    if len(maps) == 1:
        return maps[0]
    height, width = max(x.shape[-2] for x in maps), max(x.shape[-1] for x in maps)
    shape = (sum(len(p) for p in images), maps[0].shape[1], height, width)
    whole = maps[0].new_zeros(shape).contiguous(memory_format=torch.channels_last)
    for group, x in zip(images, maps, strict=True):
        whole[send(group, x.device), :, : x.shape[-2], : x.shape[-1]] = x
    return whole


def _count_covered(sizes: Tensor, frames: Tensor, cells: Tensor) -> Tensor:
    """Count the rows and columns of each level that an image covers, those whose first pixel lies in it; [B, L, 2]."""
    return (sizes[:, None] * cells + frames[:, None] - 1) // frames[:, None]


def number_tensor(rows: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """Make a tensor int64 [N, M] of numbers, also of those that an exporter knows by name only."""
    if not is_recording() and not torch.compiler.is_compiling():  # which would compile again for each size
        return send([tuple(row) for row in rows], like.device)
    # of vectors: OpenVINO expands a number without axes to one with an axis
    numbers = [torch.full((1,), n, dtype=torch.int64, device=like.device) for row in rows for n in row]
    return torch.cat(numbers).view(len(rows), -1)
