"""What an exported file says about itself: classes, preprocessing, thresholds, versions and the source."""

import hashlib
import importlib.metadata
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_convnext_det.arguments import check_class_names
from lightning_convnext_det.checkpoints.file import read_checkpoint_file
from lightning_convnext_det.errors import ArgumentError, CheckpointError
from lightning_convnext_det.inference.export.optional import import_optional
from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.image_transform import ImageTransform

PACKAGES = ("lightning-convnext-det", "torch", "torchvision", "timm", "onnx", "onnxscript", "openvino", "nncf")


def describe(
    detector: nn.Module,
    class_names: list[str],
    category_ids: list[int],
    source: str | Path | None = None,
    **export: object,
) -> dict[str, Any]:  # what JSON holds
    """Describe a detector for its exported file.

    >>> from lightning_convnext_det import FasterRCNN
    >>> card = describe(FasterRCNN(2, "test_convnext", min_size=64, max_size=96), ["cat", "dog"], [1, 2])
    >>> card["class_names"], card["resize"]["min_size"], card["nms"]
    (['cat', 'dog'], 64, 'hard')

    Args:
        detector: any detector of this package.
        class_names: in order of label.
        category_ids: the dataset's own ids, in order of label.
        source: the checkpoint, whose SHA-256 and last metrics are kept.
        export: further entries, e.g. ``precision``.
    """
    transform = detector.transform
    assert isinstance(transform, ImageTransform)  # every detector has one
    pyramid = next((part for part in detector.modules() if isinstance(part, TimmPyramid)), None)
    backbone = None if pyramid is None else pyramid.name
    return {
        "detector": type(detector).__name__,
        "backbone": backbone,
        "backbone_weights_license": _license(backbone),
        "class_names": class_names,
        "category_ids": category_ids,
        "in_chans": 3 if pyramid is None else pyramid.in_chans,
        "resize": {
            "rule": transform.resize,
            "min_size": transform.min_sizes[-1],
            "max_size": transform.max_size,
            "fixed_size": transform.fixed_size,
            "size_divisible": transform.size_divisible,
        },
        "normalise": {"mean": transform.image_mean, "std": transform.image_std},
        "score_threshold": getattr(detector, "score_threshold", None),
        "nms": getattr(detector, "nms", None),
        "nms_threshold": getattr(detector, "nms_threshold", None),
        "detections_per_image": getattr(detector, "detections_per_image", None),
        "metrics": {} if source is None else _read_metrics(Path(source)),
        "source": None if source is None else Path(source).name,
        "source_sha256": None if source is None else _sha256(Path(source)),
        "versions": _versions(),
        **export,
    }


def name_classes(
    module: Any, count: int, class_names: Sequence[str] | None, category_ids: Sequence[int] | None
) -> tuple[list[str], list[int]]:
    """Names and ids of a detector's classes: those given, the module's own, or numbers from 0.

    Raises:
        ArgumentError: if there are more or fewer than ``count``, or they are of another type.
    """
    if isinstance(class_names, str):
        raise ArgumentError(f"class_names is '{class_names}'; give a list of names")
    default_names = getattr(module, "class_names", None) or range(count)
    default_ids = getattr(module, "category_ids", None) or range(count)
    names = [str(name) for name in (default_names if class_names is None else class_names)]
    try:
        ids = [index(number) for number in (default_ids if category_ids is None else category_ids)]
    except TypeError:
        raise ArgumentError(f"category_ids is {category_ids}; give a list of whole numbers") from None
    check_class_names(names)
    for what, values in (("class_names", names), ("category_ids", ids)):
        if len(values) != count:
            raise ArgumentError(f"{what} has {len(values)} entries, but the detector has {count} classes")
    return names, ids


def as_text(card: Mapping[str, Any]) -> dict[str, str]:
    """The entries of a description as text, as ONNX files keep them: JSON, but for text itself."""
    # file names that are not UTF-8 have halves of surrogate pairs, which UTF-8 cannot hold
    return {
        key: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else json.dumps(value)
        for key, value in card.items()
    }


def weights_of(detector: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a detector on the CPU, floating point numbers as float32."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in detector.state_dict().items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def write_weights(weights: Mapping[str, torch.Tensor], card: Mapping[str, Any], path: Path) -> Path:
    """Write weights as safetensors and the description beside them, as JSON of the same name; return its path."""
    save_file(dict(weights), path, metadata=as_text(card))
    beside = path.with_suffix(".json")
    write_card(card, beside)
    return beside


def write_card(card: Mapping[str, Any], path: Path) -> None:
    """Write a description as JSON in UTF-8; halves of surrogate pairs in names are written as JSON's escapes."""
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_card(path: Path) -> dict[str, Any]:  # what JSON holds
    """Read the description of an exported file; empty where it has none."""
    if path.is_dir():
        card = path / "metadata.json"
        entries: dict[str, Any] = json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {}
        return entries
    if path.suffix == ".onnx":
        model = import_optional("onnx", "export").load(path, load_external_data=False)
        return {entry.key: _from_text(entry.value) for entry in model.metadata_props}
    if not zipfile.is_zipfile(path):
        return {}
    with zipfile.ZipFile(path) as file:
        for name in file.namelist():
            if name.endswith("extra/metadata.json"):  # of torch.export
                entries = json.loads(file.read(name))
                return entries
            if name.endswith("wrapper_metadata.json"):  # of AOTInductor, which adds entries of its own
                texts: dict[str, str] = json.loads(file.read(name))
                return {key: _from_text(text) for key, text in texts.items() if not key.startswith("AOTI_")}
    return {}


def _from_text(text: str) -> Any:  # what JSON holds
    try:
        return json.loads(text)
    except ValueError:
        return text


def _license(backbone: str | None) -> str | None:
    config = timm.get_pretrained_cfg(backbone, allow_unregistered=True) if backbone else None
    return getattr(config, "license", None)


def _read_metrics(checkpoint: Path) -> dict[str, float]:
    """The metrics that a checkpoint was chosen by, e.g. val/map, as last measured before it was written."""
    if not checkpoint.is_file():  # an address
        return {}
    try:
        content = read_checkpoint_file(checkpoint)
    except CheckpointError:  # another kind of file
        return {}
    states = content.get("callbacks", {}).values() if isinstance(content, dict) else ()
    found = [(s.get("monitor"), s.get("current_score")) for s in states if isinstance(s, dict)]
    return {
        name: float(score)
        for name, score in found
        if isinstance(name, str) and isinstance(score, torch.Tensor | float) and math.isfinite(score)
    }


def _sha256(path: Path) -> str | None:
    if not path.is_file():  # an address
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
