"""Loading of a module from a checkpoint by Lightning's own method, without what makes that dangerous.

Lightning's method unpickles what lies behind an address without a restriction, and imports the classes that a file of
hyper-parameters names (lightning 2.6.6).
"""

import inspect
import logging
from pathlib import Path
from types import FrameType
from typing import Any, Self

import lightning.pytorch as pl
import torch

from lightning_convnext_det.checkpoints.build import build_module
from lightning_convnext_det.checkpoints.format import is_own, plain
from lightning_convnext_det.errors import CheckpointError

_logger = logging.getLogger(__name__)


class LoadableModule(pl.LightningModule):
    """A LightningModule whose ``load_from_checkpoint`` takes local files only and runs no code in them."""

    _argument_names: tuple[str, ...] = ()  # of the outermost constructor, which a subclass may have written

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

        A subclass of yours reads the checkpoints that it has written, and those of the class that it extends: its
        constructor is given those of its arguments that the checkpoint holds.

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
        if hparams_file is not None or strict is False or weights_only is False:
            raise CheckpointError(
                f"[LCD-S011] {checkpoint_path}: checkpoints are read with weights_only=True, strict=True and without "
                "hparams_file; leave these arguments out"
            )
        module = build_module(checkpoint_path, _family(cls), cls, **options)
        assert isinstance(module, cls)  # build_module has seen to it
        return module.to(map_location or "cpu")

    def remember_arguments(self, frame: FrameType | None) -> None:
        """Note the arguments of the constructor that runs in a frame, or of the subclass's constructor that called it.

        Raises:
            TypeError: if one of this package's own arguments is of a kind that no checkpoint can hold.
        """
        self.save_hyperparameters(frame=frame)
        while frame is not None:
            given = inspect.getargvalues(frame)
            if frame.f_code.co_name == "__init__" and given.args and given.locals.get(given.args[0]) is self:
                self._argument_names = (*given.args[1:], *given.locals.get(given.keywords or "", ()))
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
        stated = {}
        for name, value in arguments.items():
            try:
                stated[name] = plain(value, f"argument '{name}' of {type(self).__name__}")
            except TypeError as error:
                _logger.warning("[LCD-C001] %s; give it to load_from_checkpoint again", error)
        return stated


def _family(kind: type[pl.LightningModule]) -> dict[str, type[pl.LightningModule]]:
    """This package's classes that a class extends and that extend it, by name."""
    family, found = [*kind.__mro__], [kind]
    while found:
        found = [heir for base in found for heir in base.__subclasses__()]
        family += found
    return {base.__name__: base for base in family if is_own(base)}
