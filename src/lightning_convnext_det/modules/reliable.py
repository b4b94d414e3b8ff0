"""What every LightningModule of this package does so that no training is lost and no checkpoint runs code.

Lightning's ``load_from_checkpoint`` unpickles without a restriction and imports the classes that a file of
hyper-parameters names (lightning 2.6.6); `ReliableModule` reads tensors and plain data only.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_convnext_det.callbacks.divergence import check_weights
from lightning_convnext_det.callbacks.exact_resume import ExactResume
from lightning_convnext_det.callbacks.final_validation import FinalValidation
from lightning_convnext_det.callbacks.run_guard import RunGuard
from lightning_convnext_det.callbacks.training_mode import TrainingMode
from lightning_convnext_det.checkpoints.build_module import build_module
from lightning_convnext_det.checkpoints.file import AtomicCheckpointIO
from lightning_convnext_det.checkpoints.format import is_own, is_own_name, plain
from lightning_convnext_det.errors import CheckpointError

_logger = logging.getLogger(__name__)

Device = str | torch.device
# what torch.load takes: a device, devices by the names of those in the file, or a function that moves a storage
MapLocation = Device | Mapping[str, Device] | Callable[[torch.UntypedStorage, str], torch.UntypedStorage | None]


class ReliableModule(pl.LightningModule):
    """A LightningModule that guards its runs, writes whole checkpoints, and loads them without running code.

    Guards and writer go into any trainer; those that a trainer has already are left there.
    """

    _argument_names: tuple[str, ...] = ()  # of the outermost constructor, which a subclass may have written
    own_arguments: Mapping[str, Any] = {}
    """Arguments of this package's constructor, which a subclass's may have called with others than its own."""

    # ---- runs

    def configure_callbacks(self) -> list[Callback]:
        """Guard the run, train in training mode, seed each step, and validate after the last one."""
        callbacks: list[Callback] = getattr(self.trainer, "callbacks", [])
        kinds = (ExactResume, TrainingMode, FinalValidation, RunGuard)
        return [kind() for kind in kinds if not any(isinstance(c, kind) for c in callbacks)]

    def setup(self, stage: str) -> None:
        """Put `AtomicCheckpointIO` in the place of Lightning's own, if the trainer has that one."""
        strategy = getattr(self.trainer, "strategy", None)
        if strategy is not None and type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO()

    # ---- checkpoints of a trainer

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
        names = own | given if self.strict_loading else own.keys() & given.keys()
        if given and (unlike := [k for k in names if _shape(own, k) != _shape(given, k)]):
            raise CheckpointError(
                f"[LCD-K014] the checkpoint does not fit the network: '{unlike[0]}' is {_shape(given, unlike[0])}, "
                f"expected {_shape(own, unlike[0])}; leave out --model arguments that make it another network"
            )

    # ---- loading

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's is a method of the class only by a descriptor
        cls,
        checkpoint_path: str | Path,
        map_location: MapLocation | None = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **options: Any,  # arguments of the module, which checks them
    ) -> Self:
        """Build the module that a checkpoint describes, in evaluation mode.

        A subclass of yours reads the checkpoints that it has written, and those of the class that it extends: its
        constructor is given those of its arguments that the checkpoint holds.

        Args:
            checkpoint_path: a local file or an fsspec address such as ``s3://bucket/best.ckpt``.
            map_location: where the module goes, as for ``torch.load``; the CPU if not given.
            hparams_file: not offered: what such a file names would be imported.
            strict: refuse a checkpoint that lacks weights or has more (default); if False, a warning names those.
            weights_only: not offered other than True.
            options: arguments of the module that win over the checkpoint's. With another ``num_classes``, the layers
                that depend on it begin with random weights, and a warning says so.

        Raises:
            CheckpointError: if the file is not a checkpoint of this package, or of another module.
        """
        if hparams_file is not None or weights_only is False:
            raise CheckpointError(
                f"[LCD-S011] {checkpoint_path}: checkpoints are read with weights_only=True and without hparams_file; "
                "leave these arguments out"
            )
        module = build_module(checkpoint_path, _family(cls), cls, strict=strict is not False, **options)
        assert isinstance(module, cls)  # build_module has seen to it
        return module.to(_device(map_location))

    # ---- arguments

    def remember_arguments(self, frame: FrameType | None) -> None:
        """Note the arguments of the constructor that runs in a frame, or of the subclass's constructor that called it.

        Raises:
            TypeError: if one of this package's own arguments is of a kind that no checkpoint can hold.
        """
        self.save_hyperparameters(frame=frame)
        while frame is not None:
            given = inspect.getargvalues(frame)
            if frame.f_code.co_name == "__init__" and given.args and given.locals.get(given.args[0]) is self:
                further = given.locals.get(given.keywords or "", {})
                self._argument_names = (*given.args[1:], *further)
                if is_own_name(str(frame.f_globals.get("__name__"))):
                    self.own_arguments = {**{name: given.locals[name] for name in given.args[1:]}, **further}
            frame = frame.f_back
        if is_own(type(self)):
            for name in self._argument_names:
                plain(self.hparams.get(name), f"argument '{name}' of {type(self).__name__}")

    def declared_arguments(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The arguments with which the constructor makes this module again, those that a checkpoint can hold.

        Args:
            facts: arguments whose values have become known; left out where a subclass's constructor has none of them.
        """
        names = {*inspect.signature(type(self)).parameters, *self._argument_names}
        arguments = {name: self.hparams[name] for name in self._argument_names if name in self.hparams}
        arguments |= {name: value for name, value in facts.items() if name in names}
        declared = {}
        for name, value in arguments.items():
            try:
                declared[name] = plain(value, f"argument '{name}' of {type(self).__name__}")
            except TypeError as error:
                _logger.warning("[LCD-C001] %s; give it to load_from_checkpoint again", error)
        return declared


def _family(kind: type[pl.LightningModule]) -> dict[str, type[pl.LightningModule]]:
    """This package's classes that a class extends and that extend it, by name."""
    family, found = [*kind.__mro__], [kind]
    while found:
        found = [heir for base in found for heir in base.__subclasses__()]
        family += found
    return {base.__name__: base for base in family if is_own(base)}


def _device(map_location: MapLocation | None) -> Device:
    """Where a module goes whose weights are read to the CPU."""
    if isinstance(map_location, Mapping):
        return map_location.get("cpu", next(iter(map_location.values()), "cpu"))
    if callable(map_location):
        moved = map_location(torch.empty(0).untyped_storage(), "cpu")
        return "cpu" if moved is None else moved.device
    return map_location or "cpu"


def _shape(state: dict[str, Tensor], name: str) -> list[int] | str:
    return list(state[name].shape) if name in state else "missing"
