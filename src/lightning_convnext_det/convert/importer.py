"""Import of third-party weights, with a report on every tensor.

Files are read without running code. The names of the tensors tell the source; each source has a file here that renames
its tensors and infers the arguments of the network. Every tensor of the source must fit a tensor of the network, and
every tensor of the network must be filled, or nothing is imported.
"""

import argparse
import json
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_convnext_det.checkpoints.torch_files import load_plain
from lightning_convnext_det.convert.deformable_detr import (
    convert_deformable_detr,
    describe_birder,
    describe_huggingface,
    describe_original,
    detect_origin,
)
from lightning_convnext_det.convert.dino import convert_dino, is_detrex_dino
from lightning_convnext_det.convert.mmdetection import convert_mmdetection, is_mmdetection, read_class_names
from lightning_convnext_det.convert.mmdetection_dino import convert_mmdetection_dino, is_mmdetection_dino
from lightning_convnext_det.convert.naming import Argument
from lightning_convnext_det.convert.report import Converted, Slot
from lightning_convnext_det.convert.torchvision import convert_torchvision, is_torchvision
from lightning_convnext_det.errors import CheckpointError, first_line


class Source(NamedTuple):
    """Content of a third-party file."""

    state_dict: dict[str, Tensor]
    slots: Sequence[Slot] = ()
    """Rows of the class heads that belong to a class, in order; empty if the file does not tell."""
    arguments: Mapping[str, Argument] = {}
    """Arguments of the detector that the file has beside its tensors."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in order, if the file has only names."""


def import_weights(path: str | Path, *, keep_unused: bool = False, **arguments: Argument) -> Converted:
    """Read and convert third-party weights of a detector.

    Args:
        path: Deformable DETR of birder (``.pt``, ``.safetensors``), of its authors (``.pth``) or of Hugging Face
            (folder or weight file); DINO on ConvNeXt of detrex or on ResNet of MMDetection (``.pth``); Mask R-CNN or
            Cascade Mask R-CNN of the ConvNeXt authors (``.pth``); ``fasterrcnn_resnet50_fpn`` of torchvision
            (``.pth``).
        keep_unused: keep rows of Deformable DETR's class heads that belong to no class.
        arguments: arguments of the detector that cannot be inferred from the file, e.g. ``backbone``.

    Raises:
        CheckpointError: if the file cannot be read, is of another family, or does not fit; it names the file.
    """
    path = Path(path)
    source = read_source(path)
    try:
        if is_detrex_dino(source.state_dict):
            return convert_dino(source.state_dict, class_names=source.class_names, **arguments)
        if is_mmdetection_dino(source.state_dict):
            return convert_mmdetection_dino(source.state_dict, class_names=source.class_names, **arguments)
        if is_mmdetection(source.state_dict):
            return convert_mmdetection(source.state_dict, class_names=source.class_names, **arguments)
        if is_torchvision(source.state_dict):
            return convert_torchvision(source.state_dict, **arguments)
        return convert_deformable_detr(
            source.state_dict, slots=source.slots, keep_unused=keep_unused, **{**source.arguments, **arguments}
        )
    except CheckpointError as error:
        code, text = str(error).split(" ", 1)
        raise CheckpointError(f"{code} {path}: {text}") from None


def read_source(path: Path) -> Source:
    """Read a third-party file or a Hugging Face folder without running code.

    Raises:
        CheckpointError: if it is missing, damaged, or holds more than tensors and plain data.
    """
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not files:
            raise CheckpointError(f"[LCD-K012] {path}: no model.safetensors or pytorch_model.bin in this folder")
        path = files[0]
    if not path.is_file():
        raise CheckpointError(f"[LCD-K012] {path}: no such file; give a local weight file or a Hugging Face folder")
    tensors, extras = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    try:
        return _describe(path, tensors, extras)
    except CheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"what it says beside its tensors is malformed ({first_line(error)})"
        raise CheckpointError(f"[LCD-K012] {path}: {reason}") from None


# extras are whatever JSON or pickled plain data lies beside the tensors
def _describe(path: Path, tensors: dict[str, Tensor], extras: dict[str, Any]) -> Source:
    config = path.with_name("config.json")
    if detect_origin(tensors) == "huggingface" and config.is_file():
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"[LCD-K012] {config} cannot be read: {first_line(error)}") from None
        return Source(tensors, *describe_huggingface(content))
    if is_detrex_dino(tensors):
        return Source(tensors)
    if is_mmdetection(tensors) or is_mmdetection_dino(tensors):
        return Source(tensors, class_names=tuple(read_class_names(extras)))
    if "class_to_idx" in extras:
        return Source(tensors, *describe_birder(extras))
    return Source(tensors, *describe_original(tensors, extras))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"[LCD-K012] {path} cannot be read: {first_line(error)}") from None
    extras = {}
    for key, text in metadata.items():
        with suppress(json.JSONDecodeError):  # a note may be anything
            extras[key] = json.loads(text)
    return tensors, extras


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        # the authors' files hold their command line in a Namespace, which is as plain as a dict
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = load_plain(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"[LCD-K012] {path} holds more than weights and is refused: {first_line(error)}"
        ) from None
    except Exception as error:  # a damaged or crafted file makes the reader raise almost anything
        raise CheckpointError(f"[LCD-K012] {path} cannot be read: {first_line(error)}") from None
    extras = content if isinstance(content, dict) else {}
    for key in ("state", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"[LCD-K012] {path} holds no tensors")
    return tensors, extras
