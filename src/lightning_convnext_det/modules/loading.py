"""Loading of a module from a checkpoint by Lightning's own method, without what makes that dangerous.

Lightning's method unpickles what lies behind an address without a restriction, and imports the classes that a file of
hyper-parameters names (lightning 2.6.6).
"""

from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import torch

from lightning_convnext_det.errors import CheckpointError


class LoadableModule(pl.LightningModule):
    """A LightningModule whose ``load_from_checkpoint`` takes local files only and runs no code in them."""

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's is a method of the class only by a descriptor
        cls,
        checkpoint_path: str | Path,
        map_location: str | torch.device | None = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **options: Any,  # arguments of the module, which checks them
    ) -> Self:
        """Build the module that a checkpoint describes, in evaluation mode.

        Args:
            checkpoint_path: a local file.
            map_location: where the module goes; the CPU if not given.
            hparams_file: not offered: what such a file names would be imported.
            strict: not offered other than True: a network without some of its weights is none.
            weights_only: not offered other than True.
            options: arguments of the module that win over the checkpoint's.

        Raises:
            CheckpointError: if the file is no checkpoint of this package, or of another module than this.
        """
        from lightning_convnext_det.modules.checkpoint import build_module

        if hparams_file is not None or strict is False or weights_only is False:
            raise CheckpointError(
                f"[LCD-S011] {checkpoint_path}: checkpoints are read with weights_only=True, strict=True and without "
                "hparams_file; leave these arguments out"
            )
        module = build_module(checkpoint_path, **options)
        if not isinstance(module, cls):
            raise CheckpointError(f"[LCD-K001] {checkpoint_path} holds a {type(module).__name__}, no {cls.__name__}")
        return module.to(map_location or "cpu")
