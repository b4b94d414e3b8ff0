"""Build the module that a checkpoint describes: the file is hashed once, the network built once."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_convnext_det.checkpoints.file import read_checkpoint_file
from lightning_convnext_det.checkpoints.format import (
    FORMAT,
    NOTHING_TO_FETCH,
    accepted,
    is_own,
    read_grey_range,
    read_score_thresholds,
)
from lightning_convnext_det.checkpoints.validation import bytes_held, find_contradiction, find_misfit
from lightning_convnext_det.checkpoints.weightless import SMALL, allocate_weights, without_weights
from lightning_convnext_det.errors import CheckpointError

_logger = logging.getLogger(__name__)

Classes = Mapping[str, type[pl.LightningModule]]
"""Modules by the names that checkpoints call them, those of this package only."""

_CLASSES = {"num_classes": None, "class_names": None, "category_ids": None}
_COUNTER = ".num_batches_tracked"
_DETECTOR = "detector."  # how the names of a detector's tensors begin in its module


class _Read(NamedTuple):
    """A checkpoint whose sections are of the right kinds."""

    path: str | Path
    content: dict[str, Any]  # unrelated sections of plain data; the ones used are checked before they are used
    build: type[pl.LightningModule]
    parameters: dict[str, Any]
    """Arguments of ``build``."""
    tensors: dict[str, Tensor]
    subclass: str | None = None
    """The user's class that wrote the checkpoint, where only its detector is read."""

    @property
    def length(self) -> int:
        """Bytes that the tensors take in the file."""
        return bytes_held(self.tensors)


def build_module(
    path: str | Path,
    classes: Classes,
    kind: type[pl.LightningModule] | None = None,
    strict: bool = True,
    **options: Any,  # arguments of the module, whose constructor checks them
) -> pl.LightningModule:
    """Build the module that a checkpoint describes, in evaluation mode.

    Args:
        path: a local file or an fsspec address.
        classes: the modules that it may describe.
        kind: what it must be (default: any of them). A user's own subclass is built only if it is given; else a
            checkpoint of one gives the class that it extends, with its detector, and a warning says so.
        strict: refuse a checkpoint that lacks weights or has more; if False, a warning names those.
        options: arguments of the module that win over the checkpoint's. With other classes, the layers that depend on
            them begin with random weights, and a warning says so.

    Raises:
        CheckpointError: as `read_checkpoint`, or if it holds another module than ``kind``.
    """
    read = _read(path, kind, classes)
    if read.subclass:
        _logger.warning(
            "[LCD-K020] %s was written by %s; its detector is read as a %s, without what %s adds",
            path, read.subclass, read.build.__name__, read.subclass,
        )  # fmt: skip
    others = _has_other_classes(read, options)
    build = _build_leniently if not strict else _build_for_other_classes if others else _build_declared
    module: Any = build(read, options)
    names, ids = (read.content[FORMAT].get(name) for name in ("class_names", "category_ids"))
    if not is_own(read.build) and not others and isinstance(names, list) and len(names) == module.num_classes:
        module.set_classes(names, ids)  # its constructor need not have these arguments
    if not others and hasattr(module, "score_thresholds"):
        module.score_thresholds = read_score_thresholds(read.content[FORMAT], module.num_classes)
    if hasattr(module, "grey_range"):
        module.grey_range = read_grey_range(read.content[FORMAT])
    built: pl.LightningModule = module.eval()
    return built


def read_checkpoint(path: str | Path, classes: Classes, kind: type[pl.LightningModule] | None = None) -> dict[str, Any]:
    """Read a checkpoint of this package, running no code in it.

    The network that it describes has exactly the tensors that it holds. Of a user's own subclass that is not given as
    ``kind``, its detector is read: arguments and tensors are those of the class that it extends.

    Args:
        path: a local file or an fsspec address.
        classes: the modules that it may describe.
        kind: the module that it must describe (default: any of them).

    Raises:
        CheckpointError: if it is missing or damaged, was not written by this package, or describes another network
            than it holds.
    """
    read = _read(path, kind, classes)
    _build_weightless(read, {})
    return {**read.content, "hyper_parameters": _arguments(read, {}), "state_dict": read.tensors}


def _read(path: str | Path, kind: type[pl.LightningModule] | None, classes: Classes) -> _Read:
    content = read_checkpoint_file(path)
    section = content.get(FORMAT) if isinstance(content, dict) else None
    name = section.get("module") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(name, str) or (name not in classes and kind is None):
        raise CheckpointError(
            f"[LCD-K001] {path} is not a checkpoint of this package; "
            "third-party weights need convnext-det import-weights"
        )
    parameters, tensors = content.get("hyper_parameters"), content.get("state_dict")
    if not isinstance(parameters, dict) or not isinstance(tensors, dict):
        raise CheckpointError(f"[LCD-K001] {path} is incomplete: it lacks hyper-parameters or weights")
    build = _find_class(section, kind, classes, path)
    subclass = _subclass_of(section) if is_own(build) else None
    if subclass:  # without what it adds
        parameters = section["arguments"]
        tensors = {name: x for name, x in tensors.items() if isinstance(name, str) and name.startswith(_DETECTOR)}
    elif not is_own(build):
        parameters = accepted(build, parameters)
    if reason := find_contradiction(parameters, tensors):
        raise _contradicts(path, reason)
    return _Read(path, content, build, parameters, tensors, subclass)


# the section is the file's own, a mapping of plain data
def _find_class(
    section: dict[str, Any], kind: type[pl.LightningModule] | None, classes: Classes, path: str | Path
) -> type[pl.LightningModule]:
    own, subclass = classes.get(section["module"]), _subclass_of(section)
    kind = kind or pl.LightningModule
    if own is not None and not is_own(kind) and issubclass(kind, own):
        return kind
    can_build = subclass is None or isinstance(section.get("arguments"), dict)
    if own is not None and issubclass(own, kind) and not own.__dict__.get("is_abstract") and can_build:
        return own
    name = subclass or (section["module"][:80] if section["module"].isidentifier() else "module of another package")
    if own is not None and subclass is not None and issubclass(own, kind):
        raise _only_by_itself(path, name, own)
    raise CheckpointError(f"[LCD-K001] {path} holds a {name}, no {kind.__name__}")


# the section is the file's own, a mapping of plain data
def _subclass_of(section: dict[str, Any]) -> str | None:
    """The user's class that wrote a checkpoint; None for this package's own."""
    subclass = section.get("subclass")
    if subclass is None:
        return None
    return subclass[:80] if isinstance(subclass, str) and subclass.isidentifier() else "a subclass"


def check_writer(content: dict[str, Any], kind: type[pl.LightningModule] | None, path: str | Path) -> None:
    """Refuse to go on training a user's subclass as this package's own class.

    Args:
        content: what `read_checkpoint` returns.
        kind: the class that is to train; None for the one that the checkpoint names.
        path: for the message.

    Raises:
        CheckpointError: naming the subclass.
    """
    name = _subclass_of(content[FORMAT])
    if name is not None and (kind is None or is_own(kind)):
        raise CheckpointError(
            f"[LCD-K016] {path} was written by {name}, a subclass of {content[FORMAT]['module']}; "
            f"add --model MODULE.{name} to go on training it, or --start_from for its detector alone"
        )


def _only_by_itself(path: str | Path, name: str, own: type, reason: str = "") -> CheckpointError:
    return CheckpointError(
        f"[LCD-K016] {path} was written by {name}, a subclass of {own.__name__} with a network of its own{reason}; "
        f"add --model MODULE.{name} on the command line, or call {name}.load_from_checkpoint in Python"
    )


def _build_declared(read: _Read, options: dict[str, Any]) -> pl.LightningModule:
    module = _build_weightless(read, options)
    if any(buffer.is_meta for buffer in module.buffers()):  # not of the file, and larger than it
        module = read.build(**_arguments(read, options))
    allocate_weights(module)
    module.load_state_dict(read.tensors)
    return module


def _build_weightless(read: _Read, options: dict[str, Any]) -> pl.LightningModule:
    """Build a module that has the tensors that the checkpoint holds, without memory for its weights."""
    arguments = _arguments(read, options)
    try:
        try:
            with without_weights(read.length):
                module = read.build(**arguments)
        except NotImplementedError:  # timm's Swin V2 computes buffers from its weights; none is larger than the file
            with without_weights(read.length, small=max(SMALL, read.length)):
                module = read.build(**arguments)
    except Exception as error:  # a constructor raises almost anything where its arguments are of other kinds
        if isinstance(error, RuntimeError) and "meta" in str(error) and not is_own(read.build):
            module = read.build(**arguments)  # a user's class may need numbers to be built
        elif options and isinstance(error, TypeError | ValueError):
            raise  # it is about the caller's arguments
        else:
            text = " ".join(str(error).split())[:300]
            raise _misfit(read, text or type(error).__name__) from None
    if reason := find_misfit(module, read.tensors):
        if any(read.parameters.get(name, value) != value for name, value in options.items()):
            raise CheckpointError(f"[LCD-K014] {read.path} does not fit the arguments given: {reason}")
        raise _misfit(read, reason)
    return module


def _build_for_other_classes(read: _Read, options: dict[str, Any]) -> pl.LightningModule:
    _build_weightless(read, {})  # what the file declares must be what it holds before any memory is taken
    module: Any = read.build(**_arguments(read, {**_CLASSES, **options}))
    new = take_weights(module, {"state_dict": read.tensors, "hyper_parameters": read.parameters}, read.path)
    _logger.warning(
        "[LCD-K017] %s has other classes: %d tensors begin with random weights (%s, ...); train them",
        read.path, len(new), new[0],
    )  # fmt: skip
    built: pl.LightningModule = module
    return built


def _build_leniently(read: _Read, options: dict[str, Any]) -> pl.LightningModule:
    module = read.build(**_arguments(read, options))
    try:
        missing, unexpected = module.load_state_dict(read.tensors, strict=False)
    except RuntimeError as error:  # shapes
        raise CheckpointError(f"[LCD-K014] {read.path} does not fit: {' '.join(str(error).split())[:300]}") from None
    for names, what in ((missing, "lacks %d tensors, which keep random weights"), (unexpected, "has %d tensors more")):
        if names:
            _logger.warning(f"[LCD-K018] %s {what}: %s", read.path, len(names), ", ".join(names[:4]))
    return module


def _arguments(read: _Read, options: dict[str, Any]) -> dict[str, Any]:
    nothing_to_fetch = {name: value for name, value in NOTHING_TO_FETCH.items() if name in read.parameters}
    return {**read.parameters, **options, **nothing_to_fetch}


def _has_other_classes(read: _Read, options: dict[str, Any]) -> bool:
    """Whether the caller asks for another number of classes; as many names are taken for new names of the old ones."""
    names = read.content[FORMAT].get("class_names")
    return isinstance(names, list) and options.get("num_classes") not in (None, len(names))


def _misfit(read: _Read, reason: str) -> CheckpointError:
    if read.subclass:
        return _only_by_itself(read.path, read.subclass, read.build, f" ({reason})")
    return _contradicts(read.path, reason)


def _contradicts(path: str | Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"[LCD-K015] {path} does not hold the network that it describes: {reason}; use another copy of it, "
        "or the version of this package that wrote it"
    )


# the module is a detector's, a class that this room does not know; the checkpoint is what read_checkpoint returns
def take_weights(module: Any, content: dict[str, Any], path: str | Path) -> list[str]:
    """Fill a module with the weights of a checkpoint; layers of other classes stay as they are.

    Returns:
        Names of the tensors that are left to be trained from the start: those whose shape depends on the number of
        classes, if the classes are others.

    Raises:
        CheckpointError: if another tensor is missing, superfluous or of another shape; the first such is named.
    """
    given, own = content["state_dict"], module.state_dict()
    names = content["hyper_parameters"].get("class_names")
    same = names is not None and list(names) == module.class_names
    new = [] if same else sorted(_depends_on_classes(module))
    # frozen BatchNorms do not count their batches; what learns again counts from 0
    given = {**{k: v for k, v in own.items() if k.endswith(_COUNTER)}, **given}
    given = {k: v for k, v in given.items() if k in own or not k.endswith(_COUNTER)}
    for name in own | given:
        if name not in own:
            raise CheckpointError(f"[LCD-K014] {path} does not fit the network: '{name}' has no place in it")
        if name not in new and (name not in given or given[name].shape != own[name].shape):
            raise CheckpointError(
                f"[LCD-K014] {path} does not fit the network: '{name}' is missing or of another shape"
            )
    module.load_state_dict({**given, **{name: own[name] for name in new}})
    return new


def _depends_on_classes(module: Any) -> set[str]:
    """Names of the tensors that would have another shape with one more class."""
    parameters = {**module.hparams, **NOTHING_TO_FETCH, **_CLASSES, "num_classes": module.num_classes + 1}
    with torch.device("meta"):
        other = type(module)(**accepted(type(module), parameters)).state_dict()
    return {name for name, tensor in module.state_dict().items() if other[name].shape != tensor.shape}
