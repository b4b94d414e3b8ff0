"""Several detectors as one: ensembles, test-time augmentation, and both in the windows of large images."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_convnext_det.arguments import Count, Fraction, check_arguments
from lightning_convnext_det.models.tiling import Overlap, TiledDetector
from lightning_convnext_det.models.views import ViewDetector, parse_views
from lightning_convnext_det.ops.box_fusion import weighted_box_fusion
from lightning_convnext_det.ops.window_merging import TileMerge
from lightning_convnext_det.types import Detection


class FusedDetector(nn.Module):
    """Finds objects with several detectors of the same classes, and fuses what they find by weighted box fusion.

    Takes images [C, H, W] of any sizes and gives one `Detection` for each, as each of the detectors does. An object
    that only some find gets a lower score.

    >>> import torch
    >>> from lightning_convnext_det import FasterRCNN
    >>> detectors = [FasterRCNN(2, backbone="test_convnext", min_size=64, max_size=96).eval() for _ in range(2)]
    >>> with torch.no_grad():
    ...     detections = FusedDetector(detectors)([torch.rand(3, 48, 64)])
    >>> sorted(detections[0])
    ['boxes', 'labels', 'scores']

    Args:
        detectors: in evaluation mode; they follow the first to its device.
        iou_threshold: IoU above which boxes of several detectors are one object.

    Raises:
        ValueError: if there is no detector, or they differ in ``num_classes``.
    """

    def __init__(self, detectors: Sequence[nn.Module], iou_threshold: Fraction = 0.55) -> None:
        super().__init__()
        check_arguments(FusedDetector.__init__, locals())
        if not detectors:
            raise ValueError("detectors is empty; give at least one")
        counts = {getattr(detector, "num_classes", None) for detector in detectors}
        if len(counts) > 1:
            raise ValueError(f"the detectors have {counts} classes; fuse detectors of the same classes")
        self.detectors = nn.ModuleList(detectors)
        self.iou_threshold = iou_threshold

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if the detectors do not tell."""
        return getattr(self.detectors[0], "num_classes", None)

    def forward(self, images: Sequence[Tensor] | Tensor) -> list[Detection]:
        """Find objects in images, uint8 or float in 0..1, each [C, H, W] of its own size, or stacked [B, C, H, W]."""
        self._gather()
        found: list[list[Detection]] = [detector(images) for detector in self.detectors]
        if len(found) == 1:
            return found[0]
        return [self._fuse(of_image) for of_image in zip(*found, strict=True)]

    def _fuse(self, detections: Sequence[Detection]) -> Detection:
        boxes, scores, labels = weighted_box_fusion(
            [d["boxes"] for d in detections],
            [d["scores"] for d in detections],
            [d["labels"] for d in detections],
            self.iou_threshold,
        )
        return Detection(boxes=boxes, labels=labels, scores=scores)

    def _gather(self) -> None:
        """Move the detectors to the device of the first: a trainer moves only that of its module."""
        device = next((p.device for p in self.detectors[0].parameters()), None)
        for detector in self.detectors[1:]:
            first = next(detector.parameters(), None)
            if device is not None and first is not None and first.device != device:
                detector.to(device)


def augment_detector(
    detector: nn.Module,
    tiles: Count | None = None,
    tile_overlap: Overlap = 0.2,
    tile_merge: TileMerge = "nmm",
    tta: str | None = None,
    batch_size: Count = 8,
) -> nn.Module:
    """Put test-time augmentation and windows around a detector, or around each detector of a `FusedDetector`.

    All views by all detectors are fused at once, in each window; windows are merged last.

    >>> from lightning_convnext_det import FasterRCNN
    >>> detector = FasterRCNN(2, backbone="test_convnext").eval()
    >>> type(augment_detector(detector, tiles=640, tta="flip")).__name__
    'TiledDetector'
    >>> augment_detector(detector) is detector
    True

    Args:
        detector: in evaluation mode.
        tiles: side of the windows in pixels (default: none).
        tile_overlap: share of a window that the next one covers at least.
        tile_merge: box of an object that several windows see: ``nmm``, ``nms`` or ``wbf``.
        tta: views of test-time augmentation, e.g. ``flip,scales=0.8:1.0:1.25`` (default: none).
        batch_size: windows that go through the detector at once.

    Raises:
        ValueError: if an argument is out of range or cannot be read.
    """
    if tta is not None:
        members = list(detector.detectors) if isinstance(detector, FusedDetector) else [detector]
        iou_threshold = detector.iou_threshold if isinstance(detector, FusedDetector) else 0.55
        views = parse_views(tta)
        detector = FusedDetector([ViewDetector(m, view) for m in members for view in views], iou_threshold)
    if tiles is not None:
        detector = TiledDetector(detector, tiles, tile_overlap, tile_merge, batch_size=batch_size)
    return detector
