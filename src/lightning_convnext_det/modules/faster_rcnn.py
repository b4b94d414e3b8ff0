"""Faster R-CNN as a LightningModule."""

from typing import Any

from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.zoo import check_keywords
from lightning_convnext_det.modules.detection import DetectionModule


class FasterRCNNModule(DetectionModule):
    """Trains and evaluates `FasterRCNN`; batches, losses and metrics are those of `DetectionModule`.

    >>> module = FasterRCNNModule(2, ["cat", "dog"], backbone="test_convnext", min_size=64, max_size=96)
    >>> type(module.detector).__name__
    'FasterRCNN'
    """

    def build_detector(self, num_classes: int, **options: Any) -> FasterRCNN:  # the keywords of FasterRCNN
        """Build the network from `FasterRCNN`'s arguments."""
        check_keywords(FasterRCNN, "FasterRCNNModule", options)
        return FasterRCNN(num_classes, **options)
