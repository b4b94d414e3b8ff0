"""Random arguments of deformable attention, and a loop in float64 that computes it pixel by pixel."""

import math

import torch
from torch import Tensor

Arguments = tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]


def attention_arguments(
    shapes: list[tuple[int, int]],
    batch: int = 1,
    queries: int = 5,
    heads: int = 2,
    head_dim: int = 4,
    points: int = 3,
    dtype: torch.dtype = torch.float32,
    margin: float = 0.3,
) -> Arguments:
    """Locations reach ``margin`` of a map beyond its edges; locations and weights are float32 at least."""
    positions = sum(height * width for height, width in shapes)
    precise = torch.promote_types(dtype, torch.float32)
    value = torch.randn(batch, positions, heads, head_dim, dtype=precise).to(dtype).requires_grad_()
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=precise)
    locations = (locations * (1 + 2 * margin) - margin).requires_grad_()
    weights = torch.rand(batch, queries, heads, len(shapes), points, dtype=precise).requires_grad_()
    return value, shapes, locations, weights


def attend_in_a_loop(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Equation 3 of arXiv:2010.04159, one pixel at a time."""
    batch, queries, heads, levels, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads, value.shape[3], dtype=torch.float64)
    for image, query, head, level, point in torch.cartesian_prod(
        *(torch.arange(n) for n in (batch, queries, heads, levels, points))
    ).tolist():
        height, width = shapes[level]
        start = sum(h * w for h, w in shapes[:level])
        x = locations[image, query, head, level, point, 0].item() * width - 0.5
        y = locations[image, query, head, level, point, 1].item() * height - 0.5
        for column in (math.floor(x), math.floor(x) + 1):
            for row in (math.floor(y), math.floor(y) + 1):
                if 0 <= column < width and 0 <= row < height:
                    share = (
                        (1 - abs(x - column)) * (1 - abs(y - row)) * weights[image, query, head, level, point].item()
                    )
                    output[image, query, head] += share * value[image, start + row * width + column, head].double()
    return output.flatten(2)


def candidates(count: int, images: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes [N, 4], scores of which no two are equal [N], groups [N] and images [N] for NMS."""
    corners = torch.rand(count, 2) * 800
    boxes = torch.cat((corners, corners + torch.rand(count, 2) * 100), dim=1).clamp(max=800)
    return (
        boxes,
        torch.randperm(count) / max(count, 1),
        torch.randint(groups, (count,)),
        torch.randint(images, (count,)),
    )
