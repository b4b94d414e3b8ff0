"""Cascade R-CNN as a LightningModule."""

from typing import Any

from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.zoo import check_keywords
from lightning_convnext_det.modules.detection import DetectionModule


class CascadeRCNNModule(DetectionModule):
    """Trains and evaluates `CascadeRCNN`; batches, losses and metrics are those of `DetectionModule`.

    >>> module = CascadeRCNNModule(2, ["cat", "dog"], backbone="test_convnext", min_size=64, max_size=96)
    >>> type(module.detector).__name__
    'CascadeRCNN'
    """

    def build_detector(self, num_classes: int, **options: Any) -> CascadeRCNN:  # the keywords of CascadeRCNN
        """Build the network from `CascadeRCNN`'s arguments."""
        check_keywords(CascadeRCNN, "CascadeRCNNModule", options)
        return CascadeRCNN(num_classes, **options)
