"""Object detection on any timm backbone with PyTorch Lightning.

The names below are imported when they are first used, so that a detector alone does not import Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_convnext_det.callbacks.best_checkpoint import BestCheckpoint
    from lightning_convnext_det.callbacks.prediction_writer import PredictionWriter
    from lightning_convnext_det.callbacks.stage_unfreezing import StageUnfreezing
    from lightning_convnext_det.data.batch import collate
    from lightning_convnext_det.data.datamodule import DetectionDataModule
    from lightning_convnext_det.data.dataset import DetectionDataset
    from lightning_convnext_det.data.image_folder import ImageFolderDataModule
    from lightning_convnext_det.inference.export.export import export
    from lightning_convnext_det.inference.prediction import Prediction
    from lightning_convnext_det.inference.predictor import Predictor
    from lightning_convnext_det.models.classifier import (
        Classifier,
        classify,
        create_classifier,
        extract_features,
        list_classifiers,
    )
    from lightning_convnext_det.models.deformable_detr.dino import DINO
    from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
    from lightning_convnext_det.models.fused import FusedDetector
    from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
    from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
    from lightning_convnext_det.models.tiling import TiledDetector
    from lightning_convnext_det.models.zoo import create_detector, list_detectors
    from lightning_convnext_det.modules import (
        CascadeRCNNModule,
        ClassifierModule,
        DeformableDETRModule,
        DetectionModule,
        DINOModule,
        FasterRCNNModule,
        load_classifier,
        load_module,
        start_module,
    )
    from lightning_convnext_det.types import Detection, Target
    from lightning_convnext_det.visualization import draw_detections

__version__ = "0.2.0"
__all__ = [
    "DINO",
    "BestCheckpoint",
    "CascadeRCNN",
    "CascadeRCNNModule",
    "Classifier",
    "ClassifierModule",
    "DINOModule",
    "DeformableDETR",
    "DeformableDETRModule",
    "Detection",
    "DetectionDataModule",
    "DetectionDataset",
    "DetectionModule",
    "FasterRCNN",
    "FasterRCNNModule",
    "FusedDetector",
    "ImageFolderDataModule",
    "Prediction",
    "PredictionWriter",
    "Predictor",
    "StageUnfreezing",
    "Target",
    "TiledDetector",
    "classify",
    "collate",
    "create_classifier",
    "create_detector",
    "draw_detections",
    "export",
    "extract_features",
    "list_classifiers",
    "list_detectors",
    "load_classifier",
    "load_module",
    "start_module",
]

_HOMES = {
    "BestCheckpoint": "callbacks.best_checkpoint",
    "CascadeRCNN": "models.rcnn.cascade_rcnn",
    "CascadeRCNNModule": "modules",
    "Classifier": "models.classifier",
    "ClassifierModule": "modules",
    "DINO": "models.deformable_detr.dino",
    "DINOModule": "modules",
    "DeformableDETR": "models.deformable_detr.model",
    "DeformableDETRModule": "modules",
    "Detection": "types",
    "DetectionDataModule": "data.datamodule",
    "DetectionDataset": "data.dataset",
    "DetectionModule": "modules",
    "FasterRCNN": "models.rcnn.faster_rcnn",
    "FasterRCNNModule": "modules",
    "FusedDetector": "models.fused",
    "ImageFolderDataModule": "data.image_folder",
    "Prediction": "inference.prediction",
    "PredictionWriter": "callbacks.prediction_writer",
    "Predictor": "inference.predictor",
    "StageUnfreezing": "callbacks.stage_unfreezing",
    "Target": "types",
    "TiledDetector": "models.tiling",
    "classify": "models.classifier",
    "collate": "data.batch",
    "create_classifier": "models.classifier",
    "create_detector": "models.zoo",
    "draw_detections": "visualization",
    "export": "inference.export.export",
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


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
