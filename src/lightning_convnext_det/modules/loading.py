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
import numpy as np
import torch

from lightning_convnext_det.errors import CheckpointError

_logger = logging.getLogger(__name__)

NOTHING_TO_FETCH = {"pretrained_backbone": False, "backbone_weights": None}  # where the weights come from a checkpoint


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
        from lightning_convnext_det.modules.checkpoint import build_module

        if hparams_file is not None or strict is False or weights_only is False:
            raise CheckpointError(
                f"[LCD-S011] {checkpoint_path}: checkpoints are read with weights_only=True, strict=True and without "
                "hparams_file; leave these arguments out"
            )
        module = build_module(checkpoint_path, cls, **options)
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
                _plain(self.hparams.get(name), f"argument '{name}' of {type(self).__name__}")

    def stated_arguments(self, facts: dict[str, Any]) -> dict[str, Any]:
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
                stated[name] = _plain(value, f"argument '{name}' of {type(self).__name__}")
            except TypeError as error:
                _logger.warning("[LCD-C001] %s; give it to load_from_checkpoint again", error)
        return stated


def is_own(kind: type) -> bool:
    """Whether a class is this package's, not a user's."""
    return kind.__module__.startswith(f"{__package__}.")


def describe_class(kind: type) -> dict[str, str]:
    """Name a class in a checkpoint: this package's, and the user's that extends it if it is one."""
    own = next(base for base in kind.__mro__ if is_own(base))
    return {"module": own.__name__} | ({} if own is kind else {"subclass": kind.__name__})


def accepted(kind: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that a class's constructor has; all of them if it takes any."""
    parameters = inspect.signature(kind).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


# what a user gives to a constructor, which may be anything
def _plain(value: Any, what: str) -> Any:
    """A value of the kinds that checkpoints are read with: numbers, words, and lists of them."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        entries = [_plain(entry, what) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{what} is a {type(value).__name__}, which a checkpoint cannot hold")
