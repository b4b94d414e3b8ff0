"""Multi-scale feature maps as one sequence of tokens with position encodings and padding mask, for Deformable DETR.

Unlike in the authors' implementation (fundamentalvision/Deformable-DETR), a batch without padding carries no mask,
position encodings are computed per row and per column, and images can be projected independently of their batch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_convnext_det.models.backbone import TimmPyramid


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
    """

    def __init__(
        self,
        backbone: TimmPyramid,
        extra_levels: int,
        hidden_dim: int,
        position_offset: float,
        independent_images: bool,
        always_masked: bool = False,
    ) -> None:
        super().__init__()
        channels = backbone.channels
        layers = [nn.Conv2d(c, hidden_dim, 1) for c in channels]
        for i in range(extra_levels):
            layers.append(nn.Conv2d(hidden_dim if i else channels[-1], hidden_dim, 3, stride=2, padding=1))
        self.projections = nn.ModuleList(nn.Sequential(layer, nn.GroupNorm(32, hidden_dim)) for layer in layers)
        self.embedding = nn.Parameter(torch.empty(len(layers), hidden_dim))
        self.position_offset = position_offset
        self.independent_images = independent_images and not always_masked
        self.always_masked = always_masked
        nn.init.normal_(self.embedding)
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.to(memory_format=backbone.memory_format)

    def forward(self, backbone: TimmPyramid, batch: Tensor, sizes: list[tuple[int, int]] | None) -> Levels:
        """Compute the tokens of a batch.

        Args:
            backbone: computes the feature maps.
            batch: normalised images, float [B, C, H, W], H and W multiples of the largest stride, zero on padding.
            sizes: (height, width) of every image without its padding; None if no image is padded.
        """
        full = (batch.shape[-2], batch.shape[-1])
        sizes = [full] * len(batch) if sizes is None else sizes
        frames = [_round_up(s, backbone.strides[-1]) if self.independent_images else full for s in sizes]
        groups = {frame: [i for i, f in enumerate(frames) if f == frame] for frame in frames}
        seen = {(h, w): self._project(backbone, _take(batch, group)[..., :h, :w]) for (h, w), group in groups.items()}
        by_level = zip(*seen.values(), strict=True)
        maps = [_assemble(list(parts), list(groups.values())) for parts in by_level]
        valid = None
        padded = len(groups) > 1 or any(size != frame for size, frame in zip(sizes, frames, strict=True))
        if padded or self.always_masked:
            valid = [[_fill(s, f, x) for x in seen[f]] for s, f in zip(sizes, frames, strict=True)]
        return flatten_levels(maps, valid, self.embedding, self.position_offset)

    def _project(self, backbone: TimmPyramid, batch: Tensor) -> list[Tensor]:
        maps = backbone(batch)
        levels = [project(x) for project, x in zip(self.projections, maps, strict=False)]
        last = maps[-1]
        for project in list(self.projections)[len(maps) :]:
            last = project(last)
            levels.append(last)
        return levels


def flatten_levels(
    maps: Sequence[Tensor],
    valid_sizes: Sequence[Sequence[tuple[int, int]]] | None,
    level_embedding: Tensor,
    position_offset: float,
) -> Levels:
    """Flatten the feature maps of all levels into one sequence of tokens.

    Args:
        maps: float [B, D, H, W] per level.
        valid_sizes: for every image the (height, width) in cells that it covers of each level; None without padding.
        level_embedding: added to the position encoding of each level, float [L, D].
        position_offset: subtracted from the 1-based cell number before encoding it: 0.5 encodes cell centres, as the
            paper's authors and Hugging Face do; 0.0 encodes far edges, as birder does.
    """
    device, shapes = maps[0].device, [(x.shape[-2], x.shape[-1]) for x in maps]
    tokens = torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], 1)  # [B, S, D]
    per_image = [shapes] if valid_sizes is None else valid_sizes
    valid = torch.tensor([list(sizes) for sizes in per_image], dtype=torch.float32, device=device)  # [B, L, 2]
    positions, centers = [], []
    for level, (height, width) in enumerate(shapes):
        row = torch.arange(height, dtype=torch.float32, device=device)[:, None]  # [H, 1]
        column = torch.arange(width, dtype=torch.float32, device=device)[None]  # [1, W]
        valid_height, valid_width = valid[:, level, :1], valid[:, level, 1:]  # [B, 1]
        y = (row[:, 0] + 1 - position_offset) / (valid_height + 1e-6)  # [B, H]
        x = (column[0] + 1 - position_offset) / (valid_width + 1e-6)  # [B, W]
        positions.append(_encode_grid(y, x, tokens.shape[-1]) + level_embedding[level])
        center_y = (row + 0.5) / valid_height[:, :, None]  # [B, H, 1]
        center_x = (column + 0.5) / valid_width[:, :, None]  # [B, 1, W]
        center = torch.stack([center_x.expand(-1, height, -1), center_y.expand(-1, -1, width)], -1)  # [B, H, W, 2]
        centers.append(center.flatten(1, 2))
    center, position = torch.cat(centers, 1), torch.cat(positions, 1)
    cells = 1 / valid.new_tensor(shapes).flip(-1)  # [L, 2] as (x, y)
    if valid_sizes is None:
        return Levels(tokens, position, center[:, :, None], center, shapes, cells, None, None)
    ratios = valid.flip(-1) * cells  # [B, L, 2]
    reference_points = center[:, :, None] * ratios[:, None]  # [B, S, L, 2]
    return Levels(tokens, position, reference_points, center, shapes, cells, ratios, (center >= 1).any(-1))


def _encode_grid(y: Tensor, x: Tensor, dim: int) -> Tensor:
    """Encode rows [B, H] and columns [B, W], both in 0..1: half of the channels hold y, half x. [B, H * W, dim]."""
    rows, columns = encode_sine(y, dim // 2), encode_sine(x, dim // 2)
    rows = rows[:, :, None].expand(-1, -1, x.shape[1], -1)  # [B, H, W, dim / 2]
    columns = columns[:, None].expand(-1, y.shape[1], -1, -1)
    return torch.cat([rows, columns], -1).flatten(1, 2)


def encode_sine(values: Tensor, dim: int) -> Tensor:
    """Sine position encoding of numbers in 0..1, sines and cosines alternating; float32 [..., dim].

    Reference:
        Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872, appendix A.4; base 10000.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=values.device) / dim
    angles = (values * (2 * math.pi))[..., None] / 10000**exponents
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def _round_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def _take(batch: Tensor, images: list[int]) -> Tensor:
    return batch if len(images) == len(batch) else batch[images]


def _assemble(maps: list[Tensor], images: list[list[int]]) -> Tensor:
    """Join the maps [b, D, h, w] of groups of images into one map [B, D, H, W], padded with zeros."""
    if len(maps) == 1:
        return maps[0]
    height, width = max(x.shape[-2] for x in maps), max(x.shape[-1] for x in maps)
    shape = (sum(len(p) for p in images), maps[0].shape[1], height, width)
    whole = maps[0].new_zeros(shape).contiguous(memory_format=torch.channels_last)
    for group, x in zip(images, maps, strict=True):
        whole[group, :, : x.shape[-2], : x.shape[-1]] = x
    return whole


def _fill(size: tuple[int, int], frame: tuple[int, int], level: Tensor) -> tuple[int, int]:
    """Count the rows and columns of a level that an image covers: those whose first pixel lies in it."""
    height, width = level.shape[-2:]
    return -(-size[0] * height // frame[0]), -(-size[1] * width // frame[1])
