"""Cascade R-CNN as a LightningModule."""

from typing import Any

from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.zoo import check_keywords
from lightning_convnext_det.modules.detection import DetectionModule


class CascadeRCNNModule(DetectionModule):
    """Trains and evaluates `CascadeRCNN`."""

    def build_detector(self, num_classes: int, **options: Any) -> CascadeRCNN:  # the keywords of CascadeRCNN
        """Build the network from `CascadeRCNN`'s arguments."""
        check_keywords(CascadeRCNN, "CascadeRCNNModule", options)
        return CascadeRCNN(num_classes, **options)
