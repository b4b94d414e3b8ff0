"""Third-party weights, with a report of what became of every tensor.

Files are read without running code. The family is told from the names of the tensors; a family knows how to rename them
and which network they are; then every tensor of the source must find its place and every tensor of ours must be filled,
or nothing is imported.
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
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from lightning_convnext_det.checkpoints.torch_files import load_plain
from lightning_convnext_det.convert import deformable_detr_names as deformable_detr_weights
from lightning_convnext_det.convert import mmdetection_names as mmdetection_weights
from lightning_convnext_det.convert.deformable_detr_names import Argument
from lightning_convnext_det.convert.mmdetection import convert_mmdetection, read_class_names
from lightning_convnext_det.convert.report import Converted, Slot, fill
from lightning_convnext_det.convert.torchvision import convert_torchvision, is_torchvision
from lightning_convnext_det.errors import CheckpointError, first_line
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR


class Source(NamedTuple):
    """A file from elsewhere."""

    state_dict: dict[str, Tensor]
    slots: tuple[Slot, ...] = ()
    """The rows of the class heads that stand for a class, in order; empty where the file does not say."""
    arguments: Mapping[str, Argument] = {}
    """Arguments of our constructor that the file states outside of its tensors."""
    class_names: tuple[str, ...] = ()
    """The classes in order, where the file has nothing else but their names."""


def import_weights(path: str | Path, *, keep_unused: bool = False, **arguments: Argument) -> Converted:
    """Read and convert a file of third-party weights.

    Args:
        path: Deformable DETR of birder (``.pt``, ``.safetensors``), of its authors (``.pth``) or of Hugging Face
            (folder or weight file); Mask R-CNN or Cascade Mask R-CNN of the ConvNeXt authors (``.pth``);
            ``fasterrcnn_resnet50_fpn`` of torchvision (``.pth``).
        keep_unused: keep rows of Deformable DETR's class heads that stand for no class.
        arguments: arguments of the detector that neither the tensors nor the file show, e.g. ``backbone``.

    Raises:
        CheckpointError: if the file cannot be read, is of another family, or does not fit; it names the file.
    """
    path = Path(path)
    source = read_source(path)
    try:
        if mmdetection_weights.detect(source.state_dict):
            return convert_mmdetection(source.state_dict, class_names=source.class_names, **arguments)
        if is_torchvision(source.state_dict):
            return convert_torchvision(source.state_dict, **arguments)
        return convert_deformable_detr(
            source.state_dict, slots=source.slots, keep_unused=keep_unused, **{**source.arguments, **arguments}
        )
    except CheckpointError as error:
        code, text = str(error).split(" ", 1)
        raise CheckpointError(f"{code} {path}: {text}") from None


def convert_deformable_detr(
    state_dict: Mapping[str, Tensor],
    *,
    slots: Sequence[Slot] = (),
    keep_unused: bool = False,
    **arguments: Argument,
) -> Converted:
    """Convert a state dict of birder, of the authors' repository or of Hugging Face.

    Args:
        state_dict: the tensors; not modified.
        slots: the rows of the class heads that stand for a class, in order of label; none if nothing is known.
        keep_unused: keep all rows, as they are.
        arguments: arguments of `DeformableDETR` that the tensors do not show (``num_heads``, 8 by default, or an
            unusual ``backbone``) or that choose behaviour; they win over what is inferred.

    Raises:
        CheckpointError: if the tensors are of another family, or do not fill our network exactly.
    """
    origin = _detect_origin(state_dict)
    tensors, redundant, left_over = deformable_detr_weights.rename(state_dict, origin)
    try:
        inferred = deformable_detr_weights.infer_arguments(tensors, origin, int(arguments.get("num_heads", 8)))  # type: ignore[arg-type]
    except KeyError as error:
        raise CheckpointError(f"[LCD-K011] {origin}: tensor {error} is missing; is the file complete?") from None
    inferred = {**inferred, **arguments}
    if "backbone" not in inferred:
        raise CheckpointError(f"[LCD-K011] {origin}: the backbone is not recognised; give its timm name as backbone")
    heads = int(inferred["decoder_layers"]) + bool(inferred["two_stage"])  # type: ignore[arg-type]
    tensors, copies = deformable_detr_weights.share_heads(tensors, origin, bool(inferred["box_refinement"]), heads)
    if slots and not keep_unused:
        proposer = heads - 1 if inferred["two_stage"] else None
        tensors = _select_classes(tensors, [s.row for s in slots], proposer)
        inferred["num_classes"] = len(slots)
    redundant += copies
    return fill(DeformableDETR, inferred, tensors, origin, slots=slots, redundant=redundant, left_over=left_over)


def _select_classes(tensors: Mapping[str, Tensor], rows: list[int], proposer: int | None) -> dict[str, Tensor]:
    """Keep some rows of the class heads; the head that scores proposals keeps its first row, which is objectness."""
    selected = dict(tensors)
    for name in tensors:
        if name.startswith("class_heads."):
            scores_proposals = proposer is not None and name.startswith(f"class_heads.{proposer}.")
            selected[name] = tensors[name][[0, *rows[1:]] if scores_proposals else rows]
    return selected


# how the names of tensors begin in other families, and what to say of them
_OTHER_FAMILIES = {
    "levels.embedding": "a Deformable DETR of this package already",
    "backbone.body.net.": "a detector of this package already",
    "rpn_head.": "another R-CNN of MMDetection",
    "bbox_head.": "a detector of MMDetection",
    "rpn.head.": "another R-CNN of torchvision",
    "model.enc_score_head.": "an RT-DETR of Hugging Face",
    "transformer.encoder.layers.0.self_attn.in_proj_weight": "a DETR without deformable attention",
    "model.encoder.layers.0.self_attn.q_proj.": "a DETR of Hugging Face without deformable attention",
    "head.": "a classifier; use it as backbone weights",
    "fc.": "a classifier; use it as backbone weights",
    "classifier.": "a classifier; use it as backbone weights",
}


def _detect_origin(state_dict: Mapping[str, Tensor]) -> str:
    origin = deformable_detr_weights.detect_origin(state_dict)
    if origin is None:
        known = (what for start, what in _OTHER_FAMILIES.items() if any(k.startswith(start) for k in state_dict))
        what = next(known, f"of no known family; its first tensor is '{next(iter(state_dict), 'none')}'")
        raise CheckpointError(
            "[LCD-K010] expected a Deformable DETR of birder, its authors or Hugging Face, an R-CNN of the ConvNeXt "
            f"authors, or a Faster R-CNN of torchvision, got {what}"
        )
    return origin


def read_source(path: Path) -> Source:
    """Read a file or Hugging Face folder from elsewhere without running code.

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
    if deformable_detr_weights.detect_origin(tensors) == "huggingface" and config.is_file():
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"[LCD-K012] {config} cannot be read: {first_line(error)}") from None
        return _describe_huggingface(tensors, content)
    if mmdetection_weights.detect(tensors):
        return Source(tensors, class_names=tuple(read_class_names(extras)))
    if "class_to_idx" in extras:
        return _describe_birder(tensors, extras)
    return _describe_original(tensors, extras)


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


def _describe_birder(tensors: dict[str, Tensor], extras: Mapping[str, Any]) -> Source:
    """Birder's labels begin at 1: row s of its heads is label s + 1."""
    table = sorted((index, name) for name, index in extras["class_to_idx"].items() if index > 0)
    arguments: dict[str, Argument] = {}
    if "rgb_stats" in extras:
        arguments["image_mean"] = list(extras["rgb_stats"]["mean"])
        arguments["image_std"] = list(extras["rgb_stats"]["std"])
    if "signature" in extras:
        arguments["min_size"] = int(extras["signature"]["inputs"][0]["data_shape"][2])
    return Source(tensors, tuple(Slot(index - 1, name, index) for index, name in table), arguments)


def _describe_huggingface(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> Source:
    heads = config.get("encoder_attention_heads", 8)
    expected = {"dilation": False, "activation_function": "relu", "decoder_attention_heads": heads}
    unlike = [f"{k} {config[k]}" for k, value in expected.items() if config.get(k, value) != value]
    if unlike:
        raise CheckpointError(f"[LCD-K011] config.json asks for {', '.join(unlike)}, which is not supported here")
    table = sorted((int(index), name) for index, name in config.get("id2label", {}).items())
    arguments: dict[str, Argument] = {"num_heads": heads}
    if config.get("two_stage"):
        arguments["num_queries"] = config.get("two_stage_num_proposals", 300)
    backbone = (config.get("backbone_config") or {}).get("backbone") or config.get("backbone")
    if backbone:
        arguments["backbone"] = backbone
    named = [Slot(i, name, i) for i, name in table if name != "N/A" and not name.startswith("LABEL_")]
    return Source(tensors, tuple(named), arguments)


def _describe_original(tensors: dict[str, Tensor], extras: Mapping[str, Any]) -> Source:
    """The authors' 91 rows are COCO's category ids, of which 80 are in use."""
    arguments: dict[str, Argument] = {}
    if isinstance(args := extras.get("args"), argparse.Namespace):
        names = {"nheads": "num_heads", "num_queries": "num_queries"}
        arguments = {ours: getattr(args, theirs) for theirs, ours in names.items() if hasattr(args, theirs)}
    head = tensors.get("class_embed.0.bias")
    if deformable_detr_weights.detect_origin(tensors) != "original" or head is None or len(head) != 91:
        return Source(tensors, (), arguments)
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    unused = ("N/A", "__background__")
    return Source(tensors, tuple(Slot(i, n, i) for i, n in enumerate(names) if n not in unused), arguments)
