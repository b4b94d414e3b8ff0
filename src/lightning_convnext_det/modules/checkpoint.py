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

DETECTORS: dict[str, type[DetectionModule]] = {
    module.__name__: module for module in (FasterRCNNModule, CascadeRCNNModule, DeformableDETRModule)
}
MODULES: dict[str, type[DetectionModule] | type[ClassifierModule]] = {**DETECTORS, "ClassifierModule": ClassifierModule}


# a checkpoint is a mapping of unrelated sections; the ones used here are checked before they are used
def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this package from a local file, running no code in it.

    Raises:
        CheckpointError: if it is an address, is missing or damaged, or was not written by this package.
    """
    content = read_checkpoint_file(path)
    section = content.get(FORMAT) if isinstance(content, dict) else None
    if not isinstance(section, dict) or str(section.get("module")) not in MODULES:
        raise CheckpointError(
            f"[LCD-K001] {path} is not a checkpoint of this package; "
            "weights from elsewhere need convnext-det import-weights"
        )
    if not isinstance(content.get("hyper_parameters"), dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"[LCD-K001] {path} is incomplete: it lacks hyper-parameters or weights")
    return dict(content)


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


def build_module(path: str | Path, **options: Any) -> DetectionModule | ClassifierModule:
    """Build what a checkpoint describes, detector or classifier; see `load_module`."""
    content = read_checkpoint(path)
    parameters = {**content["hyper_parameters"], **options, "pretrained_backbone": False, "backbone_weights": None}
    try:
        module = MODULES[content[FORMAT]["module"]](**parameters)
        module.load_state_dict(content["state_dict"])
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"[LCD-K001] {path} does not fit this version: {reason}") from None
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
    trained = {**content["hyper_parameters"], "pretrained_backbone": False, "backbone_weights": None}
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
        CheckpointError: if another tensor is missing or has another shape; the first such is named.
    """
    given, own = content["state_dict"], module.state_dict()
    names = content["hyper_parameters"].get("class_names")
    same = names is not None and list(names) == module.class_names
    new = [] if same else sorted(_depends_on_classes(module))
    for name, tensor in own.items():
        if name not in new and (name not in given or given[name].shape != tensor.shape):
            raise CheckpointError(
                f"[LCD-K002] {path} does not fit the network: '{name}' is missing or of another shape"
            )
    module.load_state_dict({**given, **{name: own[name] for name in new}})
    return new


def _depends_on_classes(module: DetectionModule) -> set[str]:
    """Names of the tensors that would have another shape with one more class."""
    classes = {"num_classes": module.num_classes + 1, "class_names": None, "category_ids": None}
    parameters = {**module.hparams, "pretrained_backbone": False, "backbone_weights": None, **classes}
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
