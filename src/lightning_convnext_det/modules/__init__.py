"""LightningModules, one for each detector, and one for classifiers."""

from lightning_convnext_det.modules.cascade_rcnn import CascadeRCNNModule
from lightning_convnext_det.modules.classification import ClassifierModule
from lightning_convnext_det.modules.deformable_detr import DeformableDETRModule
from lightning_convnext_det.modules.detection import DetectionModule
from lightning_convnext_det.modules.dino import DINOModule
from lightning_convnext_det.modules.faster_rcnn import FasterRCNNModule
from lightning_convnext_det.modules.registry import load_classifier, load_module, start_module

__all__ = [
    "CascadeRCNNModule",
    "ClassifierModule",
    "DINOModule",
    "DeformableDETRModule",
    "DetectionModule",
    "FasterRCNNModule",
    "load_classifier",
    "load_module",
    "start_module",
]
