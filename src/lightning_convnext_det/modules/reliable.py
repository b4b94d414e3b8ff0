"""What every LightningModule of this package does so that a training can be neither lost nor taken for a success."""

from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_convnext_det.callbacks.divergence import check_weights
from lightning_convnext_det.callbacks.exact_resume import ExactResume
from lightning_convnext_det.callbacks.run_guard import RunGuard
from lightning_convnext_det.checkpoints.file import AtomicCheckpointIO
from lightning_convnext_det.checkpoints.loadable import LoadableModule
from lightning_convnext_det.errors import CheckpointError


class ReliableModule(LoadableModule):
    """Brings its guards and its way of saving into any trainer; those that a trainer has already are left there."""

    def configure_callbacks(self) -> list[Callback]:
        """Guard the run and seed its steps."""
        callbacks: list[Callback] = getattr(self.trainer, "callbacks", [])
        return [kind() for kind in (ExactResume, RunGuard) if not any(isinstance(c, kind) for c in callbacks)]

    def setup(self, stage: str) -> None:
        """Put `AtomicCheckpointIO` in the place of Lightning's own, if the trainer has that one."""
        strategy = getattr(self.trainer, "strategy", None)
        if strategy is not None and type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite.

        Raises:
            DivergenceError: if a weight is not finite.
        """
        for section in ("state_dict", "current_model_state"):  # the second where the first are averages
            check_weights(checkpoint.get(section, {}), "nothing is saved")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that do not fit the network, in one line.

        Raises:
            CheckpointError: if a weight is missing, superfluous or of another shape.
        """
        own, given = self.state_dict(), checkpoint.get("state_dict", {})
        if given and (unlike := [k for k in own | given if _shape(own, k) != _shape(given, k)]):
            raise CheckpointError(
                f"[LCD-K014] the checkpoint does not fit the network: '{unlike[0]}' is {_shape(given, unlike[0])}, "
                f"expected {_shape(own, unlike[0])}; leave out --model arguments that make it another network"
            )


def _shape(state: dict[str, Tensor], name: str) -> list[int] | str:
    return list(state[name].shape) if name in state else "missing"
