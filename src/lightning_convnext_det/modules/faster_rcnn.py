"""Faster R-CNN as a LightningModule."""

from typing import Any

from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.zoo import check_keywords
from lightning_convnext_det.modules.detection import DetectionModule


class FasterRCNNModule(DetectionModule):
    """Trains and evaluates `FasterRCNN`."""

    def build_detector(self, num_classes: int, **options: Any) -> FasterRCNN:  # the keywords of FasterRCNN
        """Build the network from `FasterRCNN`'s arguments."""
        check_keywords(FasterRCNN, "FasterRCNNModule", options)
        return FasterRCNN(num_classes, **options)
