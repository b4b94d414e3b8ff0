"""Detection in overlapping windows (tiles) of large images, for any detector."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from lightning_convnext_det.arguments import Count, Range, check_arguments
from lightning_convnext_det.data.io.regions import RegionImage
from lightning_convnext_det.models.image_transform import scale_boxes
from lightning_convnext_det.ops.window_merging import TileMerge, merge_windows
from lightning_convnext_det.ops.windows import Window, tile_windows
from lightning_convnext_det.types import Detection

Overlap = Annotated[float, Range(0, 1, below=True)]
"""From 0 to below 1, as the share of a window that the next one covers."""


class TiledDetector(nn.Module):
    """Finds objects in overlapping windows of large images, so that small ones keep their pixels.

    Takes images [C, H, W] of any sizes and gives one `Detection` for each, as the detector in it does, with boxes in
    pixels of the whole image. An object that several windows see, or that a seam cuts, is found once. An image that is
    no larger than a tile goes through the detector as it is.

    >>> from lightning_convnext_det import FasterRCNN
    >>> detector = FasterRCNN(2, backbone="test_convnext", min_size=64, max_size=96).eval()
    >>> tiled = TiledDetector(detector, tile=64)
    >>> with torch.no_grad():
    ...     small, large = tiled([torch.rand(3, 48, 64), torch.rand(3, 150, 200)])
    >>> sorted(large)
    ['boxes', 'labels', 'scores']

    Args:
        detector: in evaluation mode.
        tile: side of a window in pixels of the image; the detector resizes windows as it does images.
        overlap: share of a window that the next one covers at least. Objects up to this size are whole in some window;
            with 0, larger ones can be found in parts.
        merge: box of an object that several windows see: ``nmm``, ``nms`` or ``wbf``, see `merge_windows`.
        whole: also detect in the whole image, for objects larger than a window.
        batch_size: windows that go through the detector at once.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        detector: nn.Module,
        tile: Count = 640,
        overlap: Overlap = 0.2,
        merge: TileMerge = "nmm",
        whole: bool = True,
        batch_size: Count = 8,
    ) -> None:
        super().__init__()
        check_arguments(TiledDetector.__init__, locals())
        self.detector = detector
        self.tile = tile
        self.overlap = overlap
        self.merge = merge
        self.whole = whole
        self.batch_size = batch_size

    def forward(self, images: Sequence[Tensor | RegionImage] | Tensor) -> list[Detection]:
        """Find objects in images, uint8 or float in 0..1, each [C, H, W] of its own size, or stacked [B, C, H, W].

        Of a `RegionImage`, one batch of windows is in memory at a time, and the whole image reduced to 2048 pixels.
        """
        large = [i for i, image in enumerate(images) if max(image.shape[-2:]) > self.tile]
        if not large:
            unchanged: list[Detection] = self.detector(images)
            return unchanged
        found: dict[int, Detection] = {i: self._detect(images[i]) for i in large}
        small = [i for i in range(len(images)) if i not in found]
        if small:
            found |= zip(small, self.detector([images[i] for i in small]), strict=True)
        return [found[i] for i in range(len(images))]

    def _detect(self, image: Tensor | RegionImage) -> Detection:
        """Find objects in the windows of one image."""
        height, width = image.shape[-2:]
        windows = tile_windows(height, width, self.tile, self.overlap)
        detections: list[Detection] = []
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start : start + self.batch_size]
            detections += self.detector([_crop(image, window) for window in batch])
        if self.whole:
            windows = [*windows, Window(0, 0, width, height)]
            detections.append(self._detect_in_whole(image))
        offsets = [d["boxes"].new_tensor([w.left, w.top] * 2) for d, w in zip(detections, windows, strict=True)]
        boxes, scores, labels = merge_windows(
            torch.cat([d["boxes"] + offset for d, offset in zip(detections, offsets, strict=True)]),
            torch.cat([d["scores"] for d in detections]),
            torch.cat([d["labels"] for d in detections]),
            torch.cat([torch.full((len(d["scores"]),), i) for i, d in enumerate(detections)]),
            torch.tensor(windows),
            self.merge,
            margin=max(2.0, 0.01 * self.tile),  # detectors locate borders to about a hundredth of the image
        )
        return Detection(boxes=boxes, labels=labels, scores=scores)

    def _detect_in_whole(self, image: Tensor | RegionImage) -> Detection:
        """Find objects in the whole of one image, reduced where it cannot be in memory."""
        if isinstance(image, Tensor):
            found: Detection = self.detector([image])[0]
            return found
        reduced = image.with_overview().overview
        assert reduced is not None
        found = self.detector([reduced])[0]
        boxes = scale_boxes(found["boxes"], (reduced.shape[-2], reduced.shape[-1]), (image.height, image.width))
        return Detection(boxes=boxes, labels=found["labels"], scores=found["scores"])


def _crop(image: Tensor | RegionImage, window: Window) -> Tensor:
    if isinstance(image, Tensor):
        return image[:, window.top : window.bottom, window.left : window.right]
    return image.read(*window)
