"""Object detection on any timm backbone with PyTorch Lightning.

The names below are imported when they are first used, so that a plain detector does not import the trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_convnext_det.callbacks.prediction_writer import PredictionWriter
    from lightning_convnext_det.data.datamodule import DetectionDataModule
    from lightning_convnext_det.data.image_folder import ImageFolderDataModule
    from lightning_convnext_det.inference.predictor import Predictor
    from lightning_convnext_det.models.classifier import (
        Classifier,
        classify,
        create_classifier,
        extract_features,
        list_classifiers,
    )
    from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
    from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
    from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
    from lightning_convnext_det.models.zoo import create_detector, list_detectors
    from lightning_convnext_det.modules import (
        CascadeRCNNModule,
        ClassifierModule,
        DeformableDETRModule,
        DetectionModule,
        FasterRCNNModule,
        load_classifier,
        load_module,
        start_module,
    )

__version__ = "0.1.0"
__all__ = [
    "CascadeRCNN",
    "CascadeRCNNModule",
    "Classifier",
    "ClassifierModule",
    "DeformableDETR",
    "DeformableDETRModule",
    "DetectionDataModule",
    "DetectionModule",
    "FasterRCNN",
    "FasterRCNNModule",
    "ImageFolderDataModule",
    "PredictionWriter",
    "Predictor",
    "classify",
    "create_classifier",
    "create_detector",
    "extract_features",
    "list_classifiers",
    "list_detectors",
    "load_classifier",
    "load_module",
    "start_module",
]

_HOMES = {
    "CascadeRCNN": "models.rcnn.cascade_rcnn",
    "CascadeRCNNModule": "modules",
    "Classifier": "models.classifier",
    "ClassifierModule": "modules",
    "DeformableDETR": "models.deformable_detr.model",
    "DeformableDETRModule": "modules",
    "DetectionDataModule": "data.datamodule",
    "DetectionModule": "modules",
    "FasterRCNN": "models.rcnn.faster_rcnn",
    "FasterRCNNModule": "modules",
    "ImageFolderDataModule": "data.image_folder",
    "PredictionWriter": "callbacks.prediction_writer",
    "Predictor": "inference.predictor",
    "classify": "models.classifier",
    "create_classifier": "models.classifier",
    "create_detector": "models.zoo",
    "extract_features": "models.classifier",
    "list_classifiers": "models.classifier",
    "list_detectors": "models.zoo",
    "load_classifier": "modules",
    "load_module": "modules",
    "start_module": "modules",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
