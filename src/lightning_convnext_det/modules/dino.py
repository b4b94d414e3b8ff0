"""DINO as a LightningModule."""

from typing import Any

from lightning_convnext_det.models.deformable_detr.dino import DINO
from lightning_convnext_det.models.zoo import check_keywords
from lightning_convnext_det.modules.detection import DetectionModule


class DINOModule(DetectionModule):
    """Trains and evaluates `DINO`, by default with the learning rates and the clipping of detrex.

    Batches, losses and metrics are those of `DetectionModule`. The layers that say where to look learn as fast as the
    rest, unlike in `DeformableDETRModule`.

    >>> small = {"hidden_dim": 32, "num_heads": 2, "num_queries": 8, "encoder_layers": 1, "decoder_layers": 1}
    >>> module = DINOModule(2, ["cat", "dog"], backbone="test_convnext", min_size=64, max_size=96, **small)
    >>> module.learning_rate_factor("backbone.net.stem_0.weight")
    0.1
    """

    # detrex, projects/dino/configs/dino-convnext and configs/common/optim.py: backbone 1e-5 of 1e-4, clipped at 0.1
    default_backbone_lr_factor = 0.1
    default_gradient_clip = 0.1

    def build_detector(self, num_classes: int, **options: Any) -> DINO:  # the keywords of DINO
        """Build the network from `DINO`'s arguments."""
        check_keywords(DINO, "DINOModule", options)
        return DINO(num_classes, **options)
