"""The table of module classes, and loading by it: `load_module`, `load_classifier`, `start_module`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from torch import nn

from lightning_convnext_det.checkpoints.build_module import build_module, read_checkpoint, take_weights
from lightning_convnext_det.checkpoints.file import write_checkpoint_file
from lightning_convnext_det.checkpoints.format import FORMAT, NOTHING_TO_FETCH, read_grey_range
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.modules.cascade_rcnn import CascadeRCNNModule
from lightning_convnext_det.modules.classification import ClassifierModule
from lightning_convnext_det.modules.deformable_detr import DeformableDETRModule
from lightning_convnext_det.modules.detection import DetectionModule
from lightning_convnext_det.modules.dino import DINOModule
from lightning_convnext_det.modules.faster_rcnn import FasterRCNNModule

DETECTORS: dict[str, type[DetectionModule]] = {
    module.__name__: module for module in (FasterRCNNModule, CascadeRCNNModule, DeformableDETRModule, DINOModule)
}
MODULES: dict[str, type[DetectionModule | ClassifierModule]] = {
    **DETECTORS,
    "ClassifierModule": ClassifierModule,
    "DetectionModule": DetectionModule,  # abstract: a user's class may extend it
}


def load_module(path: str | Path, **options: Any) -> DetectionModule:
    """Load a detector's module from a checkpoint, in evaluation mode; it needs no internet and no dataset.

    >>> from tempfile import mkdtemp
    >>> module = FasterRCNNModule(2, ["cat", "dog"], backbone="test_convnext", min_size=64, max_size=96)
    >>> path = mkdtemp() + "/a.ckpt"
    >>> save_module(module, path)  # or Trainer.save_checkpoint
    >>> load_module(path, score_threshold=0.3).class_names
    ['cat', 'dog']

    Args:
        path: a local file or an fsspec address.
        options: arguments of the module that win over the checkpoint's.

    Raises:
        CheckpointError: if the file is not a checkpoint of this package, or of a classifier, or its weights do not fit
            its description.
    """
    module = build_module(path, MODULES, **options)
    if not isinstance(module, DetectionModule):
        raise CheckpointError(f"[LCD-K013] {path} holds a classifier; load_classifier reads it")
    return module


def load_members(paths: Sequence[str | Path], first: DetectionModule) -> list[nn.Module]:
    """Load the detectors of an ensemble, in evaluation mode.

    Args:
        paths: checkpoints of this package.
        first: the module that they follow.

    Raises:
        CheckpointError: if a file cannot be loaded, or its detector has other classes or channels.
    """
    detectors: list[nn.Module] = []
    for path in paths:
        module = load_module(path)
        if module.class_names != first.class_names:
            raise CheckpointError(
                f"[LCD-K022] {path} has the classes {', '.join(module.class_names)}, the ensemble has "
                f"{', '.join(first.class_names)}; fuse detectors of the same classes in the same order"
            )
        if module.in_chans != first.in_chans:
            raise CheckpointError(
                f"[LCD-K022] {path} takes images of {module.in_chans} channels, the ensemble of {first.in_chans}"
            )
        detectors.append(module.detector)
    return detectors


def load_classifier(path: str | Path) -> ClassifierModule:
    """Load a classifier's module from a checkpoint, in evaluation mode; it needs no internet and no dataset.

    Raises:
        CheckpointError: as for `load_module`.
    """
    module = build_module(path, MODULES)
    if not isinstance(module, ClassifierModule):
        raise CheckpointError(f"[LCD-K013] {path} holds a detector; load_module reads it")
    return module


def start_module(
    path: str | Path,
    num_classes: int,
    class_names: list[str] | None = None,
    category_ids: list[int] | None = None,
    **changes: Any,  # the keywords of the module that the checkpoint holds
) -> DetectionModule:
    """Load a detector's module from a checkpoint for training on another dataset.

    All weights are taken but for those of the layers whose shape depends on the number of classes.

    >>> from tempfile import mkdtemp
    >>> path = mkdtemp() + "/a.ckpt"
    >>> save_module(FasterRCNNModule(2, ["cat", "dog"], backbone="test_convnext", min_size=64, max_size=96), path)
    >>> module = start_module(path, 3, ["cat", "dog", "bird"], lr=5e-5)
    >>> module.num_classes, module.training
    (3, True)

    Args:
        path: a checkpoint of this package, e.g. of imported weights.
        num_classes: foreground classes of the new data.
        class_names: their names in order of label.
        category_ids: the dataset's own ids of the classes.
        changes: arguments of the module that replace the checkpoint's.

    Raises:
        CheckpointError: if the file is not a checkpoint of this package or its weights do not fit.
    """
    content = read_checkpoint(path, MODULES)
    classes = {"num_classes": num_classes, "class_names": class_names, "category_ids": category_ids}
    trained = {**content["hyper_parameters"], **NOTHING_TO_FETCH}
    if content[FORMAT]["module"] not in DETECTORS:
        raise CheckpointError(f"[LCD-K013] {path} holds a classifier; give it as backbone_weights of a detector")
    module = DETECTORS[content[FORMAT]["module"]](**{**trained, **changes, **classes})
    take_weights(module, content, path)
    module.grey_range = read_grey_range(content[FORMAT])
    return module


def save_module(module: DetectionModule, path: str | Path) -> None:
    """Write a checkpoint of a module that no trainer has trained here, e.g. with third-party weights."""
    content = {
        "state_dict": module.state_dict(),
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
    }
    module.on_save_checkpoint(content)
    write_checkpoint_file(content, path)
