"""Anchors of a feature pyramid, as torchvision or MMDetection places them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

from lightning_convnext_det.models.rcnn.conventions import Convention


def create_anchors(
    strides: Sequence[int], sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float], convention: Convention
) -> "PyramidAnchors":
    """Build the anchors of a pyramid with maps at these strides and a pooled level on top.

    Raises:
        ValueError: if there is not one group of sizes for each level.
    """
    levels = [*strides, 2 * strides[-1]]  # the pooled level
    if len(sizes) != len(levels):
        raise ValueError(f"anchor_sizes has {len(sizes)} groups; expected one for each of {len(levels)} levels")
    return PyramidAnchors(
        sizes, aspect_ratios, convention.anchor_rounding, levels if convention.fixed_strides else None
    )


class PyramidAnchors(AnchorGenerator):
    """Anchors over every position of every feature map, float32 whatever the maps' dtype.

    >>> anchors = PyramidAnchors([[32], [64]], [1.0], strides=[8, 16])
    >>> [a.shape for a in anchors((32, 32), [torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 2, 2)])]
    [torch.Size([16, 4]), torch.Size([4, 4])]

    Args:
        sizes: side lengths of the anchors of each level in pixels of the resized image.
        aspect_ratios: height over width, at every level.
        rounded: round the corners of the anchors around the origin to whole pixels, as torchvision does.
        strides: pixels between neighbouring anchors of each level; if None, the padded image's side divided by the
            map's, rounded down, as torchvision does. On a pooled level of 13 rows over 800 pixels that is 61, not 64.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float],
        rounded: bool = True,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__(tuple(map(tuple, sizes)), (tuple(aspect_ratios),) * len(sizes))
        self.strides = strides
        if not rounded:
            self.cell_anchors = [_cell_anchors(group, aspect_ratios) for group in sizes]

    def forward(self, padded_size: tuple[int, int], feature_maps: list[Tensor]) -> list[Tensor]:
        """Place the anchors of an image; those of all images of a batch are the same.

        Args:
            padded_size: height and width of the padded batch.
            feature_maps: one [B, C, H, W] for each group of sizes; their values are not read.

        Returns:
            For each map the corners (x1, y1, x2, y2) of its anchors in pixels of the padded batch, row by row, float32
            [H * W * anchors per position, 4].
        """
        placed = []
        for i, (features, cell) in enumerate(zip(feature_maps, self.cell_anchors, strict=True)):
            ys, xs = (
                torch.arange(cells, dtype=torch.int32, device=features.device)
                * (self.strides[i] if self.strides else side // cells)
                for cells, side in zip(features.shape[-2:], padded_size, strict=True)
            )
            y, x = torch.meshgrid(ys, xs, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=-1)[:, :, None]  # [H, W, 1, 4]
            placed.append((shifts + cell.to(features.device, non_blocking=True)).reshape(-1, 4))
        return placed


def _cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Corners of the anchors around the origin, [ratios * sizes, 4], ratio by ratio."""
    size, root = torch.tensor(sizes, dtype=torch.float32), torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()
    # multiplied and halved in the order in which MMDetection rounds
    half_width, half_height = ((x.flatten() / 2) for x in (size * (1 / root)[:, None], size * root[:, None]))
    return torch.stack((-half_width, -half_height, half_width, half_height), dim=1)
