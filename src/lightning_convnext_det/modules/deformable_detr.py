"""Deformable DETR as a LightningModule."""

from typing import Any

from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
from lightning_convnext_det.models.zoo import check_keywords
from lightning_convnext_det.modules.detection import DetectionModule

# arXiv:2010.04159, section 5: learning rates multiplied by 0.1, gradients clipped at 0.1 in the authors' code (main.py)
_SLOW = ("sampling_offsets", "reference_points")


class DeformableDETRModule(DetectionModule):
    """Trains and evaluates `DeformableDETR`, by default with the learning rates and the clipping of its paper.

    Batches, losses and metrics are those of `DetectionModule`.

    >>> small = {"hidden_dim": 32, "num_heads": 2, "num_queries": 8, "encoder_layers": 1, "decoder_layers": 1}
    >>> module = DeformableDETRModule(2, ["cat", "dog"], backbone="test_convnext", min_size=64, max_size=96, **small)
    >>> module.learning_rate_factor("backbone.body.net.stem_0.weight")
    0.1
    """

    default_backbone_lr_factor = 0.1
    default_gradient_clip = 0.1

    def build_detector(self, num_classes: int, **options: Any) -> DeformableDETR:  # the keywords of DeformableDETR
        """Build the network from `DeformableDETR`'s arguments."""
        check_keywords(DeformableDETR, "DeformableDETRModule", options)
        return DeformableDETR(num_classes, **options)

    def learning_rate_factor(self, name: str) -> float:
        """Slow down the backbone, and by the paper's factor the layers that say where to look."""
        if any(part in _SLOW for part in name.split(".")):
            return 0.1
        return super().learning_rate_factor(name)
