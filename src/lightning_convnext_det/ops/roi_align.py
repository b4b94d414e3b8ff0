"""RoIAlign (Mask R-CNN, arXiv:1703.06870, section 3) as defined by torchvision, and Faster R-CNN's multi-scale pooler.

On the CPU a bin is a weighted sum of rows of the channels-last map (``roi_align_gather``), several times faster than
torchvision's operator forward and backward; other devices, export and ``DISABLE_CUSTOM_KERNELS=1`` use torchvision's.
"""

import math
import os
from collections.abc import Sequence
from typing import Literal

import torch
import torchvision
from torch import Tensor

from lightning_convnext_det.ops.roi_align_gather import roi_align_by_gather
from lightning_convnext_det.ops.tracing import is_recording

_MOST_STEPS = 12  # an image of one row in a batch of 4096


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """RoIAlign: pool a feature map over boxes, by the mean of bilinear samples in each bin.

    Differs from `torchvision.ops.roi_align` in three points: half precision works on every device, with positions
    computed in float32; a box that is not finite gives zeros where torchvision reads out of bounds; and on the CPU the
    result may be channels last. A channels-last map is read there without a copy.

    >>> import torch
    >>> features = torch.arange(16.0).reshape(1, 1, 4, 4)  # each pixel is 8 pixels of the image wide
    >>> box = torch.tensor([[0.0, 0.0, 32.0, 32.0]])
    >>> roi_align(features, [box], 2, spatial_scale=1 / 8, sampling_ratio=2, aligned=True).flatten().tolist()
    [2.5, 4.5, 10.5, 12.5]

    Args:
        input: features, floating [B, C, H, W].
        boxes: corners (x1, y1, x2, y2) in pixels of the image: a tensor [L, 4] per image, or one tensor [K, 5] whose
            first column is the image's index.
        output_size: bins in height and width, or one number for both.
        spatial_scale: pixels of the map per pixel of the image, e.g. 1/16.
        sampling_ratio: samples per bin in each direction; 0 or less takes as many as a bin has pixels, rounded up.
        aligned: shift boxes by half a pixel, so that coordinates refer to the edges of pixels; False is the older
            definition, in which boxes are also at least one pixel of the map wide.

    Returns:
        Pooled features [K, C, height, width] in the dtype of ``input``.

    Raises:
        ValueError: if the shapes do not agree or the image index of a box is out of range.
    """
    size = (output_size, output_size) if isinstance(output_size, int) else (output_size[0], output_size[1])
    rois = _as_rois(input, boxes)
    if is_recording():
        return _roi_align_by_torchvision(input, rois, size, spatial_scale, sampling_ratio, aligned)
    if input.device.type == "cpu":
        _check_images(input, rois)
        # below these sizes the fixed cost of the gather outweighs what it saves; measured on one core
        worth = len(rois) * size[0] * size[1] * input.shape[1] > (2**15 if sampling_ratio > 0 else 2**18)
        if worth and os.environ.get("DISABLE_CUSTOM_KERNELS") != "1":
            return roi_align_by_gather(input, rois, size, spatial_scale, max(sampling_ratio, 0), aligned)
    finite = rois.isfinite().all(dim=1, keepdim=True)
    far_away = rois[:, 1:].masked_fill(~finite, -1e6)  # where samples are 0
    rois = torch.cat((rois[:, :1].masked_fill(~finite, 0.0), far_away), dim=1)
    return _roi_align_by_torchvision(input, rois, size, spatial_scale, sampling_ratio, aligned)


def _roi_align_by_torchvision(
    input: Tensor, rois: Tensor, size: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32  # half would move boxes by half a pixel
    pooled: Tensor = torchvision.ops.roi_align(
        input.to(dtype), rois.to(dtype), size, spatial_scale, sampling_ratio, aligned
    )
    return pooled.to(input.dtype)


class MultiScaleRoIAlign(torchvision.ops.MultiScaleRoIAlign):
    """Multi-scale RoIAlign: pool each box from the FPN level for its size.

    A box of ``canonical_scale`` pixels is pooled from level ``canonical_level``, one of half the size from the level
    below (arXiv:1612.03144, equation 1). A drop-in for `torchvision.ops.MultiScaleRoIAlign`, with three additions:
    ``aligned`` boxes, the faster `roi_align`, and ``strides`` that are given or derived from every batch, not only from
    the first.

    >>> import torch
    >>> pooler = MultiScaleRoIAlign(["0", "1"], 7, 2, strides=(4, 8))
    >>> maps = {"0": torch.rand(2, 5, 16, 16), "1": torch.rand(2, 5, 8, 8)}
    >>> boxes = [torch.tensor([[0.0, 0, 20, 30], [4, 4, 60, 60]]), torch.zeros(0, 4)]
    >>> pooler(maps, boxes, [(64, 64), (64, 64)]).shape
    torch.Size([2, 5, 7, 7])

    Args:
        featmap_names: names of the maps to pool from, among those given to ``forward``.
        output_size: bins in height and width, or one number for both.
        sampling_ratio: samples per bin in each direction; 0 or less takes as many as a bin has pixels, rounded up.
        canonical_scale: side in pixels of the box that ``canonical_level`` is for.
        canonical_level: level of that box, counted as the binary logarithm of the stride.
        aligned: shift boxes by half a pixel, see `roi_align`.
        strides: pixels of the image per pixel of each map; if None, the powers of two nearest to the ratio of the
            unpadded images' heights to the maps'.
        rounds_stride: take those powers of two although ``strides`` are given, as torchvision does: they differ where
            all images of a batch are much lower than the batch.
        margin: quantity that 1e-6 is added to before rounding down, so that a box of exactly ``canonical_scale`` gets
            ``canonical_level``: the ``level``, as torchvision, or the ratio of the box's ``side`` to the scale of the
            finest level, as MMDetection.
    """

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        aligned: bool = False,
        strides: Sequence[int] | None = None,
        rounds_stride: bool = False,
        margin: Literal["level", "side"] = "level",
    ) -> None:
        super().__init__(
            featmap_names, output_size, sampling_ratio, canonical_scale=canonical_scale, canonical_level=canonical_level
        )
        self.aligned = aligned
        self.strides = strides
        self.rounds_stride = rounds_stride
        self.margin = margin

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool the boxes of all images, in order of the images.

        Args:
            x: maps by name, fine to coarse, floating [B, C, H, W].
            boxes: corners in pixels of the padded images, one float tensor [L, 4] per image.
            image_shapes: height and width of the images before padding to a batch.

        Returns:
            Pooled features [sum of L, C, height, width].

        Raises:
            ValueError: if ``x`` has none of the maps.
        """
        maps = [features for name, features in x.items() if name in self.featmap_names]
        if not maps:
            raise ValueError(f"no map of {self.featmap_names} among those given, {list(x)}")
        if self.strides is not None and not self.rounds_stride:
            scales = [1.0 / stride for stride in self.strides]
        else:
            tallest = max(height for height, _ in image_shapes)
            scales = [2.0 ** round(math.log2(features.shape[-2] / tallest)) for features in maps]
        rois = _as_rois(maps[0], boxes)
        return self._pool(maps, rois, scales, self._assign_levels(rois[:, 1:], scales))

    def pool(self, x: dict[str, Tensor], rois: Tensor, padded_height: int, sizes: Tensor) -> Tensor:
        """Pool the boxes of all images without reading values of the device; needs ``strides``.

        Args:
            x: maps by name, fine to coarse, floating [B, C, H, W].
            rois: image index and corners in pixels of the padded images, float [K, 5].
            padded_height: height of the batch.
            sizes: height and width of the images before padding, int64 [B, 2].

        Returns:
            Pooled features [K, C, height, width], those of ``forward``.
        """
        assert self.strides is not None
        maps = [features for name, features in x.items() if name in self.featmap_names]
        scales = [1.0 / stride for stride in self.strides]
        if not self.rounds_stride:
            return self._pool(maps, rois, scales, self._assign_levels(rois[:, 1:], scales))
        # a zoom of 2 ** n is exact, and spatial_scale can stay a number
        zoom, steps = _find_zoom(padded_height, sizes[:, 0].amax(0))
        levels = self._assign_levels(rois[:, 1:], scales, zoom, steps)
        return self._pool(maps, torch.cat((rois[:, :1], rois[:, 1:] * zoom), dim=1), scales, levels)

    def _pool(self, maps: list[Tensor], rois: Tensor, scales: list[float], levels: Tensor) -> Tensor:
        if len(maps) == 1:
            return roi_align(maps[0], rois, self.output_size, scales[0], self.sampling_ratio, self.aligned)
        # not channels last, since the usual head flattens them: transposing while copying costs half as much as later
        pooled = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], *self.output_size)
        for features, scale, chosen in zip(maps, scales, _split_by_level(levels, len(maps)), strict=True):
            pooled[chosen] = roi_align(
                features, rois[chosen], self.output_size, scale, self.sampling_ratio, self.aligned
            )
        return pooled

    def _assign_levels(
        self, boxes: Tensor, scales: list[float], zoom: Tensor | float = 1.0, steps: Tensor | int = 0
    ) -> Tensor:
        """Index of the map of each box, int64 [K]; each scale is 2 ** ``steps`` = ``zoom`` times as large as given."""
        finest, coarsest = -math.log2(scales[0]), -math.log2(scales[-1])
        boxes = boxes.to(torch.float32)
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        if self.margin == "side":
            finest_scale = self.canonical_scale * 2.0 ** (finest - self.canonical_level)
            level = torch.floor(torch.log2(side * zoom / finest_scale + 1e-6)) + finest
        else:
            level = torch.floor(
                self.canonical_level + torch.log2(side / self.canonical_scale) + 1e-6
            )  # torchvision's margin
            level = level + steps
        return (level.clamp(finest, coarsest) - finest).to(torch.int64)


def _split_by_level(levels: Tensor, count: int) -> Sequence[Tensor]:
    """Return the boxes of each level, ascending, int64 [k] each; the host waits once, not for each level."""
    if is_recording():
        return [torch.where(levels == level)[0] for level in range(count)]
    sizes = (levels[:, None] == torch.arange(count, device=levels.device)).sum(0).tolist()
    return torch.split(levels.argsort(stable=True), sizes)


def _find_zoom(padded_height: int, tallest: Tensor) -> tuple[Tensor, Tensor]:
    """Round padded_height / tallest to 2 ** n, and return it and n; in integers, since a logarithm is not exact."""
    steps = torch.arange(_MOST_STEPS, device=tallest.device)
    # 2 ** (n + 0.5) < ratio, squared, with small numbers only: OpenVINO computes int64 in 32 bits
    squared = torch.full_like(steps, padded_height * padded_height - 1)
    passed = 2 * tallest * tallest <= squared // 4**steps
    return 1 + (passed * 2**steps).sum(), passed.sum()


def _check_images(input: Tensor, rois: Tensor) -> None:
    if len(rois) == 0 or torch.compiler.is_compiling():  # reading values would break a compiled graph
        return
    lowest, highest = (int(image) for image in rois[:, 0].aminmax())
    if lowest < 0 or highest >= len(input):
        raise ValueError(f"boxes name images {lowest} to {highest}, but input holds images 0 to {len(input) - 1}")


def _as_rois(input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """Join the boxes of all images, each preceded by the index of its image, float [K, 5]."""
    if input.ndim != 4:
        raise ValueError(f"input must be [batch, channels, height, width], but its shape is {list(input.shape)}")
    if isinstance(boxes, Tensor):
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            raise ValueError(
                f"boxes as one tensor must be [K, 5], image index first, but the shape is {list(boxes.shape)}"
            )
        return boxes
    if len(boxes) != len(input):
        raise ValueError(f"boxes are given for {len(boxes)} images, but input holds {len(input)}")
    for image, part in enumerate(boxes):
        if part.ndim != 2 or part.shape[1] != 4:
            raise ValueError(f"boxes of image {image} must be [L, 4], but their shape is {list(part.shape)}")
    images = torch.cat([part.new_full((len(part), 1), image) for image, part in enumerate(boxes)])
    return torch.cat((images, torch.cat(list(boxes))), dim=1)
