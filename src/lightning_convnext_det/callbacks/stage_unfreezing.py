"""Callback that unfreezes a detector's backbone stage by stage.

Lightning's own ``BackboneFinetuning`` adds a parameter group to the optimizer while it runs, which torch's schedulers
no longer accept (2.15: one base rate for each group), and unfreezes the whole backbone at once. Here the groups are
there from the start, with their learning rates, and only what needs a gradient changes.
"""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.models.backbone import TimmPyramid


class StageUnfreezing(Callback):
    """Freezes the backbone, then unfreezes its stages one after the other, the deepest first.

    >>> callback = StageUnfreezing([2, 4])  # the last stage learns from epoch 2 on, the one before it from epoch 4
    >>> trainer = pl.Trainer(callbacks=[callback], logger=False, accelerator="cpu", enable_checkpointing=False)

    On several ranks the strategy must be ``ddp_find_unused_parameters_true``.

    Args:
        epochs: epoch at which each stage begins to learn, the deepest first, rising; stages that are not listed stay
            frozen. A stage is what the map of a stride adds to those before it; the stem belongs to the first.

    Raises:
        ValueError: if the epochs do not rise.
    """

    def __init__(self, epochs: list[int]) -> None:
        if not epochs or epochs != sorted(epochs) or epochs[0] < 0:
            raise ArgumentError(f"epochs are {epochs}; give one or more, rising, the deepest stage's first")
        self.epochs = epochs
        self._trainable: list[nn.Parameter] = []
        self._frozen = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note which parameters are trainable.

        Raises:
            ValueError: if the network has no backbone with as many stages.
        """
        pyramid = _find_pyramid(pl_module)
        if len(self.epochs) > len(pyramid.strides):
            raise ArgumentError(f"epochs are {self.epochs}, but the backbone has {len(pyramid.strides)} stages")
        self._trainable = [p for p in pyramid.net.parameters() if p.requires_grad]
        self._frozen = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze stages if the training is resumed within an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze the stages that are not trained yet."""
        pyramid = _find_pyramid(pl_module)
        frozen = len(pyramid.strides) - sum(trainer.current_epoch >= epoch for epoch in self.epochs)
        if frozen == self._frozen:
            return
        self._frozen = frozen
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        if frozen:
            pyramid.freeze(frozen)
        learning = sum(p.numel() for p in self._trainable if p.requires_grad)
        rank_zero_info(f"epoch {trainer.current_epoch}: {frozen} stages frozen, {learning:,} parameters learn")


def _find_pyramid(module: pl.LightningModule) -> TimmPyramid:
    pyramid = next((part for part in module.modules() if isinstance(part, TimmPyramid)), None)
    if pyramid is None:
        raise ArgumentError(f"{type(module).__name__} has no TimmPyramid to unfreeze")
    return pyramid
