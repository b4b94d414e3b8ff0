"""Callback that puts a network into training mode before it is trained."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn


class TrainingMode(Callback):
    """Puts the module into training mode when a fit and each of its epochs begins, except for parts that are frozen.

    Lightning trains a module in the mode in which it finds it: one that was loaded, or that a callback has predicted
    with, is in evaluation mode. A part whose parameters are all frozen keeps its mode.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the module into training mode."""
        enter_training_mode(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the module into training mode."""
        enter_training_mode(pl_module)


def enter_training_mode(module: nn.Module) -> None:
    """Put a module into training mode, but leave parts in evaluation mode whose parameters are all frozen.

    >>> network = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2), nn.Dropout()).eval()
    >>> enter_training_mode(network)
    >>> [part.training for part in network]
    [False, True, True]
    """
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return
    module.training = True
    for part in module.children():
        enter_training_mode(part)
