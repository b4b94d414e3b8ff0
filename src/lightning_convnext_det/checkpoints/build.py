"""From a checkpoint file to the module that it describes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_convnext_det.checkpoints.file import read_checkpoint_file
from lightning_convnext_det.checkpoints.format import FORMAT, NOTHING_TO_FETCH, accepted, is_own
from lightning_convnext_det.checkpoints.validation import find_contradiction
from lightning_convnext_det.errors import CheckpointError

Classes = Mapping[str, type[pl.LightningModule]]
"""Modules by the names that checkpoints call them, those of this package only."""

_COUNTER = ".num_batches_tracked"


# a checkpoint is a mapping of unrelated sections; the ones used here are checked before they are used
def read_checkpoint(path: str | Path, classes: Classes) -> dict[str, Any]:
    """Read a checkpoint of this package from a local file, running no code in it.

    The network that it describes has exactly the tensors that it holds.

    Args:
        path: a local file.
        classes: the modules that it may describe.

    Raises:
        CheckpointError: if it is an address, is missing or damaged, was not written by this package or by a user's
            subclass, or describes another network than it holds.
    """
    return _read(path, None, classes, {})[0]


def _read(
    path: str | Path, kind: type[pl.LightningModule] | None, classes: Classes, options: dict[str, Any]
) -> tuple[dict[str, Any], type[pl.LightningModule]]:
    """A checkpoint's content, and the class to build, which is a subclass of ``kind`` or a user's class itself."""
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
    parameters = parameters if is_own(build) else accepted(build, parameters)
    content["hyper_parameters"] = parameters = {**parameters, **_nothing_to_fetch(parameters)}
    # what the caller gives counts only where the file says nothing
    if reason := find_contradiction(build, parameters, options, tensors, Path(path).stat().st_size):
        raise CheckpointError(
            f"[LCD-K015] {path} does not hold the network that it describes: {reason}; use another copy of it, "
            "or the version of this package that wrote it"
        )
    return dict(content), build


# the section is the file's own, a mapping of plain data
def _find_class(
    section: dict[str, Any], kind: type[pl.LightningModule] | None, classes: Classes, path: str | Path
) -> type[pl.LightningModule]:
    own, subclass = classes.get(section["module"]), section.get("subclass")
    kind = kind or pl.LightningModule
    if own is None:
        raise CheckpointError(f"[LCD-K001] {path} holds no {kind.__name__}")
    if not is_own(kind) and issubclass(kind, own):
        return kind
    if subclass is None and not own.__dict__.get("is_abstract", False) and issubclass(own, kind):
        return own
    name = subclass if isinstance(subclass, str) and subclass.isidentifier() else own.__name__
    if subclass is not None and issubclass(own, kind):
        raise CheckpointError(
            f"[LCD-K016] {path} was written by {name}, a subclass of {own.__name__}: "
            f"load it in Python by {name}.load_from_checkpoint"
        )
    raise CheckpointError(f"[LCD-K001] {path} holds a {name}, no {kind.__name__}")


def _nothing_to_fetch(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in NOTHING_TO_FETCH.items() if name in parameters}


def build_module(
    path: str | Path, classes: Classes, kind: type[pl.LightningModule] | None = None, **options: Any
) -> pl.LightningModule:
    """Build the module that a checkpoint describes, in evaluation mode.

    Args:
        path: a local file.
        classes: the modules that it may describe.
        kind: what it must be (default: any of them); a user's own subclass is built itself.
        options: arguments of the module that win over the checkpoint's.

    Raises:
        CheckpointError: as `read_checkpoint`, or if it holds another module than ``kind``.
    """
    content, build = _read(path, kind, classes, options)
    parameters = content["hyper_parameters"]
    try:
        module: Any = build(**{**parameters, **options, **_nothing_to_fetch(parameters)})
        module.load_state_dict(content["state_dict"])
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"[LCD-K001] {path} does not fit this version: {reason}") from None
    names, ids = (content[FORMAT].get(name) for name in ("class_names", "category_ids"))
    if not is_own(build) and isinstance(names, list) and len(names) == module.num_classes:
        module.set_classes(names, ids)  # its constructor need not have these arguments
    built: pl.LightningModule = module.eval()
    return built


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
    classes = {"num_classes": module.num_classes + 1, "class_names": None, "category_ids": None}
    parameters = {**module.hparams, **NOTHING_TO_FETCH, **classes}
    with torch.device("meta"):
        other = type(module)(**parameters).state_dict()
    return {name for name, tensor in module.state_dict().items() if other[name].shape != tensor.shape}
