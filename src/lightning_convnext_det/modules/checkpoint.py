"""Checkpoints: what a file must hold to be one of ours, and the module that it describes."""

from pathlib import Path
from typing import Any

import lightning
import torch

from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.modules.cascade_rcnn import CascadeRCNNModule
from lightning_convnext_det.modules.checkpoint_file import read_checkpoint_file, write_checkpoint_file
from lightning_convnext_det.modules.classification import ClassifierModule
from lightning_convnext_det.modules.deformable_detr import DeformableDETRModule
from lightning_convnext_det.modules.detection import FORMAT, DetectionModule
from lightning_convnext_det.modules.faster_rcnn import FasterRCNNModule
from lightning_convnext_det.modules.loading import NOTHING_TO_FETCH, LoadableModule, accepted, is_own
from lightning_convnext_det.modules.stated_network import find_misstatement

DETECTORS: dict[str, type[DetectionModule]] = {
    module.__name__: module for module in (FasterRCNNModule, CascadeRCNNModule, DeformableDETRModule)
}
Module = DetectionModule | ClassifierModule
MODULES: dict[str, type[Module]] = {**DETECTORS, "ClassifierModule": ClassifierModule}
_BASES: dict[str, type[Module]] = {**MODULES, "DetectionModule": DetectionModule}  # which a user's class may extend
_COUNTER = ".num_batches_tracked"


# a checkpoint is a mapping of unrelated sections; the ones used here are checked before they are used
def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this package from a local file, running no code in it.

    The network that it describes has exactly the tensors that it holds.

    Raises:
        CheckpointError: if it is an address, is missing or damaged, was not written by this package or by a user's
            subclass, or describes another network than it holds.
    """
    return _read(path, LoadableModule, {})[0]


def _read(path: str | Path, kind: type[LoadableModule], options: dict[str, Any]) -> tuple[dict[str, Any], type[Module]]:
    """A checkpoint's content, and the class to build, which is a subclass of ``kind`` or a user's class itself."""
    content = read_checkpoint_file(path)
    section = content.get(FORMAT) if isinstance(content, dict) else None
    if not isinstance(section, dict) or str(section.get("module")) not in _BASES:
        raise CheckpointError(
            f"[LCD-K001] {path} is not a checkpoint of this package; "
            "weights from elsewhere need convnext-det import-weights"
        )
    parameters, tensors = content.get("hyper_parameters"), content.get("state_dict")
    if not isinstance(parameters, dict) or not isinstance(tensors, dict):
        raise CheckpointError(f"[LCD-K001] {path} is incomplete: it lacks hyper-parameters or weights")
    build = _find_class(section, kind, path)
    parameters = parameters if is_own(build) else accepted(build, parameters)
    content["hyper_parameters"] = parameters = {**parameters, **_nothing_to_fetch(parameters)}
    # what the caller gives counts only where the file says nothing
    if reason := find_misstatement(build, parameters, options, tensors, Path(path).stat().st_size):
        raise CheckpointError(
            f"[LCD-K015] {path} does not hold the network that it describes: {reason}; use another copy of it, "
            "or the version of this package that wrote it"
        )
    return dict(content), build


# the section is the file's own, a mapping of plain data
def _find_class(section: dict[str, Any], kind: type[LoadableModule], path: str | Path) -> type[Module]:
    own, subclass = _BASES[section["module"]], section.get("subclass")
    if not is_own(kind) and issubclass(kind, own):
        return kind
    if subclass is None and own is not DetectionModule and issubclass(own, kind):
        return own
    name = subclass if isinstance(subclass, str) and subclass.isidentifier() else own.__name__
    if subclass is not None and is_own(kind) and issubclass(own, kind):
        raise CheckpointError(
            f"[LCD-K016] {path} was written by {name}, a subclass of {own.__name__}: "
            f"load it in Python by {name}.load_from_checkpoint"
        )
    raise CheckpointError(f"[LCD-K001] {path} holds a {name}, no {kind.__name__}")


def _nothing_to_fetch(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in NOTHING_TO_FETCH.items() if name in parameters}


def load_module(path: str | Path, **options: Any) -> DetectionModule:
    """Build the detector's module that a checkpoint describes, in evaluation mode, without network or data set.

    Args:
        path: a local file.
        options: arguments of the module that win over the checkpoint's.

    Raises:
        CheckpointError: if the file is not a checkpoint of this package, or of a classifier, or its weights do not fit
            its description.
    """
    module = build_module(path, **options)
    if not isinstance(module, DetectionModule):
        raise CheckpointError(f"[LCD-K013] {path} holds a classifier; load_classifier reads it")
    return module


def load_classifier(path: str | Path) -> ClassifierModule:
    """Build the classifier's module that a checkpoint describes, in evaluation mode, without network or data set.

    Raises:
        CheckpointError: as for `load_module`.
    """
    module = build_module(path)
    if not isinstance(module, ClassifierModule):
        raise CheckpointError(f"[LCD-K013] {path} holds a detector; load_module reads it")
    return module


def build_module(path: str | Path, kind: type[LoadableModule] = LoadableModule, **options: Any) -> Module:
    """Build what a checkpoint describes, detector or classifier; see `load_module`.

    Args:
        path: a local file.
        kind: what it must be; a user's own subclass is built itself.
        options: arguments of the module that win over the checkpoint's.
    """
    content, build = _read(path, kind, options)
    parameters = content["hyper_parameters"]
    try:
        module = build(**{**parameters, **options, **_nothing_to_fetch(parameters)})
        module.load_state_dict(content["state_dict"])
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"[LCD-K001] {path} does not fit this version: {reason}") from None
    names, ids = (content[FORMAT].get(name) for name in ("class_names", "category_ids"))
    if not is_own(build) and isinstance(names, list) and len(names) == module.num_classes:
        module.set_classes(names, ids)  # its constructor need not have these arguments
    return module.eval()


def start_module(
    path: str | Path,
    num_classes: int,
    class_names: list[str] | None = None,
    category_ids: list[int] | None = None,
    **changes: Any,  # the keywords of the module that the checkpoint holds
) -> DetectionModule:
    """Build the module that a checkpoint describes for training on other data, and start it from the weights.

    Args:
        path: a checkpoint of this package, e.g. of imported weights.
        num_classes: foreground classes of the new data.
        class_names: their names in order of label.
        category_ids: the data set's own ids of the classes.
        changes: arguments of the module that shall not be as in the checkpoint.

    Raises:
        CheckpointError: if the file is not a checkpoint of this package or its weights do not fit.
    """
    content = read_checkpoint(path)
    classes = {"num_classes": num_classes, "class_names": class_names, "category_ids": category_ids}
    trained = {**content["hyper_parameters"], **NOTHING_TO_FETCH}
    if content[FORMAT]["module"] not in DETECTORS:
        raise CheckpointError(f"[LCD-K013] {path} holds a classifier; give it as backbone_weights of a detector")
    module = DETECTORS[content[FORMAT]["module"]](**{**trained, **changes, **classes})
    take_weights(module, content, path)
    return module


# the checkpoint is what read_checkpoint returns
def take_weights(module: DetectionModule, content: dict[str, Any], path: str | Path) -> list[str]:
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


def _depends_on_classes(module: DetectionModule) -> set[str]:
    """Names of the tensors that would have another shape with one more class."""
    classes = {"num_classes": module.num_classes + 1, "class_names": None, "category_ids": None}
    parameters = {**module.hparams, **NOTHING_TO_FETCH, **classes}
    with torch.device("meta"):
        other = type(module)(**parameters).state_dict()
    return {name for name, tensor in module.state_dict().items() if other[name].shape != tensor.shape}


def save_module(module: DetectionModule, path: str | Path) -> None:
    """Write a checkpoint of a module that no trainer has trained here, e.g. with weights from elsewhere."""
    content = {
        "state_dict": module.state_dict(),
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
    }
    module.on_save_checkpoint(content)
    write_checkpoint_file(content, path)
