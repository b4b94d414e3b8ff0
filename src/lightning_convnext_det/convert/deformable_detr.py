"""Deformable DETR of birder, of its authors and of Hugging Face: names of tensors, classes and arguments.

The three agree on the network and differ in names, in the order of the decoder's norms, in how Hugging Face
splits the projections of the self-attention, and in the position encoding:

- ``birder``: norms in order of place; cells encoded by their far edge (position_offset 0); the first LayerNorm of its
  ConvNeXt adds 1e-5 to the variance, all others 1e-6 (stem_eps);
- ``original``, the authors' repository (fundamentalvision/Deformable-DETR): the decoder's first norm is that of the
  cross-attention, which comes second; cells encoded by their centre (position_offset 0.5);
- ``huggingface``: cells encoded by their centre; heads that layers share are stored once.

The order of levels, heads, points and coordinates is the same in all. Differences by design after an import: proposals
on padding or at the very border are never chosen; numbers that are not finite stop the run, where birder and Hugging
Face clamp activations and costs; the matching cost is computed from logits instead of clamped probabilities. Hugging
Face has dropout on the encoder's input and none in the attention and after the ReLU, and no loss on proposals; ours has
dropout and losses as the authors have.
"""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_convnext_det.convert.naming import (
    Argument,
    Rules,
    coco_categories,
    convnext_name,
    count_blocks,
    rename_key,
)
from lightning_convnext_det.convert.report import Converted, Slot, fill
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR

_SHARED: Rules = [
    (r"^(?:transformer|model)\.(encoder|decoder)\.", r"\1."),
    (r"\.value_proj\.", ".value_projection."),
    (r"\.output_proj\.", ".output_projection."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.", r"encoder.layers.\1.attention."),
    (r"^decoder\.layers\.(\d+)\.self_attn\.", r"decoder.layers.\1.self_attention."),
    (r"^decoder\.layers\.(\d+)\.(?:cross|encoder)_attn\.", r"decoder.layers.\1.cross_attention."),
    (r"^(?:transformer|model)\.level_embed$", "levels.embedding"),
    (r"^(?:model\.)?input_proj\.", "levels.projections."),
    (r"^(?:query_embed|model\.query_position_embeddings)\.", "query_embedding."),
    (r"^(?:transformer|model)\.reference_points\.", "reference_points."),
    (r"^(?:transformer|model)\.enc_output\.", "proposer.memory_projection."),
    (r"^(?:transformer|model)\.enc_output_norm\.", "proposer.memory_norm."),
    (r"^(?:transformer|model)\.pos_trans\.", "proposer.query_projection."),
    (r"^(?:transformer|model)\.pos_trans_norm\.", "proposer.query_norm."),
    (r"^(?:decoder\.)?class_embed\.", "class_heads."),
    (r"^(?:decoder\.)?bbox_embed\.", "box_heads."),
    (r"^box_heads\.(\d+)\.layers\.0\.", r"box_heads.\1.0."),
    (r"^box_heads\.(\d+)\.layers\.1\.", r"box_heads.\1.3."),
    (r"^box_heads\.(\d+)\.layers\.2\.", r"box_heads.\1.6."),
]
_NUMBERED_NORMS: Rules = [
    (r"^encoder\.layers\.(\d+)\.norm1\.", r"encoder.layers.\1.norm."),
    (r"^encoder\.layers\.(\d+)\.norm2\.", r"encoder.layers.\1.feedforward.norm."),
    (r"^decoder\.layers\.(\d+)\.norm3\.", r"decoder.layers.\1.feedforward.norm."),
    (r"^(encoder|decoder)\.layers\.(\d+)\.(linear[12])\.", r"\1.layers.\2.feedforward.\3."),
]
_BIRDER_BLOCK = r"^backbone\.body\.stage(\d)\.(-?\d+)\."
_RULES: dict[str, Rules] = {
    "birder": [
        *_NUMBERED_NORMS,
        (r"^decoder\.layers\.(\d+)\.norm1\.", r"decoder.layers.\1.self_norm."),
        (r"^decoder\.layers\.(\d+)\.norm2\.", r"decoder.layers.\1.cross_norm."),
        (r"^backbone\.stem\.(\d)\.", r"backbone.net.stem_\1."),
        (_BIRDER_BLOCK + r"(\d)\.", r"backbone.net.stages_\1.downsample.\3."),
        (_BIRDER_BLOCK + "layer_scale$", r"backbone.net.stages_\1.blocks.\2.gamma"),
        (_BIRDER_BLOCK + r"block\.0\.", r"backbone.net.stages_\1.blocks.\2.conv_dw."),
        (_BIRDER_BLOCK + r"block\.2\.", r"backbone.net.stages_\1.blocks.\2.norm."),
        (_BIRDER_BLOCK + r"block\.3\.", r"backbone.net.stages_\1.blocks.\2.mlp.fc1."),
        (_BIRDER_BLOCK + r"block\.5\.gamma$", r"backbone.net.stages_\1.blocks.\2.mlp.grn.weight"),
        (_BIRDER_BLOCK + r"block\.5\.beta$", r"backbone.net.stages_\1.blocks.\2.mlp.grn.bias"),
        (_BIRDER_BLOCK + r"block\.[56]\.", r"backbone.net.stages_\1.blocks.\2.mlp.fc2."),
    ],
    "original": [
        *_NUMBERED_NORMS,
        (r"^decoder\.layers\.(\d+)\.norm2\.", r"decoder.layers.\1.self_norm."),
        (r"^decoder\.layers\.(\d+)\.norm1\.", r"decoder.layers.\1.cross_norm."),
        (r"^backbone\.0\.body\.", "backbone.net."),
    ],
    "huggingface": [
        (r"^(encoder|decoder)\.layers\.(\d+)\.(?:mlp\.)?fc([12])\.", r"\1.layers.\2.feedforward.linear\3."),
        (r"^(encoder|decoder)\.layers\.(\d+)\.final_layer_norm\.", r"\1.layers.\2.feedforward.norm."),
        (r"^encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"encoder.layers.\1.norm."),
        (r"^decoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"decoder.layers.\1.self_norm."),
        (r"^decoder\.layers\.(\d+)\.encoder_attn_layer_norm\.", r"decoder.layers.\1.cross_norm."),
        (r"\.self_attention\.o_proj\.", ".self_attention.out_proj."),
        (r"^model\.backbone\.(?:conv_encoder\.)?model\.", "backbone.net."),
    ],
}
_POSITION_OFFSET = {"birder": 0.0, "original": 0.5, "huggingface": 0.5}

_RESNET_DEPTHS = {6: "resnet50", 23: "resnet101", 36: "resnet152"}  # blocks of the third stage
# prefixes of tensors of other families, for the error message
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


def convert_deformable_detr(
    state_dict: Mapping[str, Tensor],
    *,
    slots: Sequence[Slot] = (),
    keep_unused: bool = False,
    **arguments: Argument,
) -> Converted:
    """Convert a state dict of birder, of the authors or of Hugging Face.

    Args:
        state_dict: the tensors; not modified.
        slots: rows of the class heads that belong to a class, in order of label; empty if unknown.
        keep_unused: keep all rows.
        arguments: arguments of `DeformableDETR` that cannot be inferred from the tensors (``num_heads``, 8 by
            default, an unusual ``backbone``, options); they override inferred ones.

    Raises:
        CheckpointError: if the tensors are of another family, or do not fit the network exactly.
    """
    origin = _detect_origin(state_dict)
    tensors, redundant, left_over = _rename(state_dict, origin)
    try:
        inferred = _infer_arguments(tensors, origin, int(arguments.get("num_heads", 8)))  # type: ignore[arg-type]
    except KeyError as error:
        raise CheckpointError(f"[LCD-K011] {origin}: tensor {error} is missing; is the file complete?") from None
    inferred = {**inferred, **arguments}
    if "backbone" not in inferred:
        raise CheckpointError(f"[LCD-K011] {origin}: the backbone is not recognised; give its timm name as backbone")
    heads = int(inferred["decoder_layers"]) + bool(inferred["two_stage"])  # type: ignore[arg-type]
    tensors, copies = _share_heads(tensors, origin, bool(inferred["box_refinement"]), heads)
    if slots and not keep_unused:
        proposer = heads - 1 if inferred["two_stage"] else None
        tensors = _select_classes(tensors, [s.row for s in slots], proposer)
        inferred["num_classes"] = len(slots)
    redundant += copies
    return fill(DeformableDETR, inferred, tensors, origin, slots=slots, redundant=redundant, left_over=left_over)


def _select_classes(tensors: Mapping[str, Tensor], rows: list[int], proposer: int | None) -> dict[str, Tensor]:
    """Keep some rows of the class heads; the proposals' head keeps its first row, the objectness."""
    selected = dict(tensors)
    for name in tensors:
        if name.startswith("class_heads."):
            scores_proposals = proposer is not None and name.startswith(f"class_heads.{proposer}.")
            selected[name] = tensors[name][[0, *rows[1:]] if scores_proposals else rows]
    return selected


def _detect_origin(state_dict: Mapping[str, Tensor]) -> str:
    origin = detect_origin(state_dict)
    if origin is None:
        known = (what for start, what in _OTHER_FAMILIES.items() if any(k.startswith(start) for k in state_dict))
        what = next(known, f"of no known family; its first tensor is '{next(iter(state_dict), 'none')}'")
        raise CheckpointError(
            "[LCD-K010] expected a Deformable DETR of birder, its authors or Hugging Face, an R-CNN of the ConvNeXt "
            f"authors, or a Faster R-CNN of torchvision, got {what}"
        )
    return origin


def detect_origin(keys: Iterable[str]) -> str | None:
    """Detect the origin of a Deformable DETR by the names of its tensors; None if it is another network."""
    keys = set(keys)
    if {"model.encoder.layers.0.self_attn.sampling_offsets.weight", "model.level_embed"} <= keys:
        return "huggingface"
    if "transformer.encoder.layers.0.self_attn.sampling_offsets.weight" in keys:
        return "original" if any(k.startswith("backbone.0.body.") for k in keys) else "birder"
    return None


def _rename(state_dict: Mapping[str, Tensor], origin: str) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Rename tensors to those of `DeformableDETR`.

    Returns:
        The renamed tensors; the original names of redundant tensors, which repeat another (heads that the decoder
        holds too, or that layers share) or count batches; the original names of tensors that contradict another of
        the same new name.
    """
    renamed: dict[str, Tensor] = {}
    redundant, contradicting = [], []
    for key, tensor in state_dict.items():
        name = _rename_key(key, origin)
        if key.endswith("num_batches_tracked"):
            redundant.append(key)
        elif name not in renamed:
            renamed[name] = tensor
        elif torch.equal(renamed[name], tensor):
            redundant.append(key)
        else:
            contradicting.append(key)
    return _join_projections(renamed), redundant, contradicting


def _rename_key(key: str, origin: str) -> str:
    if origin == "birder" and (match := re.match(_BIRDER_BLOCK, key)):
        stage, block = int(match[1]), int(match[2])
        # from the second stage on, the first place is taken by the downsampling
        key = f"backbone.body.stage{stage - 1}.{block - (stage > 1)}.{key[match.end() :]}"
    return rename_key(key, _SHARED + _RULES[origin])


def _join_projections(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the projections of query, key and value as in `torch.nn.MultiheadAttention`."""
    joined = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.self_attention)\.([qkv])_proj\.(weight|bias)", name)
        parts = [f"{match[1]}.{letter}_proj.{match[3]}" for letter in "qkv"] if match else []
        if match is None or any(part not in tensors for part in parts):
            joined[name] = tensor
        elif match[2] == "q":
            joined[f"{match[1]}.in_proj_{match[3]}"] = torch.cat([tensors[part] for part in parts])
    return joined


def _infer_arguments(tensors: Mapping[str, Tensor], origin: str, num_heads: int) -> dict[str, Argument]:
    """Infer the arguments of `DeformableDETR` from renamed tensors, without ``backbone`` if it is unknown.

    Raises:
        KeyError: if a tensor that every Deformable DETR has is missing.
    """
    levels, hidden_dim = tensors["levels.embedding"].shape
    pointwise = [k for k in tensors if re.fullmatch(r"levels\.projections\.\d+\.0\.weight", k)]
    maps = sum(tensors[k].shape[-1] == 1 for k in pointwise)
    per_point = num_heads * levels
    arguments: dict[str, Argument] = {
        "num_classes": tensors["class_heads.0.weight"].shape[0],
        "strides": [32 >> i for i in reversed(range(maps))],
        "extra_levels": levels - maps,
        "hidden_dim": hidden_dim,
        "num_heads": num_heads,
        "encoder_layers": count_blocks(tensors, r"encoder\.layers\.(\d+)\."),
        "decoder_layers": count_blocks(tensors, r"decoder\.layers\.(\d+)\."),
        "encoder_points": len(tensors["encoder.layers.0.attention.attention_weights.bias"]) // per_point,
        "decoder_points": len(tensors["decoder.layers.0.cross_attention.attention_weights.bias"]) // per_point,
        "feedforward_dim": tensors["encoder.layers.0.feedforward.linear1.weight"].shape[0],
        "box_refinement": not _shares_heads(tensors),
        "two_stage": "proposer.memory_norm.weight" in tensors,
        "position_offset": _POSITION_OFFSET[origin],
    }
    if "query_embedding.weight" in tensors:
        arguments["num_queries"] = tensors["query_embedding.weight"].shape[0]
    if origin == "birder":
        arguments["stem_eps"] = 1e-5
    if (backbone := _infer_backbone(tensors)) is not None:
        arguments["backbone"] = backbone
    return arguments


def _share_heads(
    tensors: dict[str, Tensor], origin: str, box_refinement: bool, heads: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Drop the copies of a head that all layers share; copy the head that Hugging Face shares and we do not.

    Returns:
        The tensors, and the names of the copies dropped.
    """
    if not box_refinement:
        copies = [k for k in tensors if re.match(r"(class|box)_heads\.[1-9]", k)]
        return {k: v for k, v in tensors.items() if k not in copies}, copies
    shared = {k: v for k, v in tensors.items() if k.startswith("class_heads.")}
    if origin != "huggingface" or any(not k.startswith("class_heads.0.") for k in shared):
        return tensors, []
    return {**tensors, **{k.replace(".0.", f".{i}.", 1): v for k, v in shared.items() for i in range(heads)}}, []


def _shares_heads(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether all layers have the same box head."""
    first = {k: v for k, v in tensors.items() if k.startswith("box_heads.0.")}
    others = [k for k in tensors if re.match(r"box_heads\.[1-9]", k)]
    return all(torch.equal(tensors[k], first[re.sub(r"\.\d+\.", ".0.", k, count=1)]) for k in others)


def _infer_backbone(tensors: Mapping[str, Tensor]) -> str | None:
    """Recognise a ConvNeXt or a ResNet by its widths and depths."""
    if (stem := tensors.get("backbone.net.stem_0.weight")) is not None:
        family = "convnextv2" if "backbone.net.stages_0.blocks.0.mlp.grn.weight" in tensors else "convnext"
        return convnext_name(len(stem), count_blocks(tensors, r"backbone\.net\.stages_2\.blocks\.(\d+)\."), family)
    conv = tensors.get("backbone.net.layer1.0.conv2.weight")
    if conv is None or conv.shape != (64, 64, 3, 3):
        return None
    return _RESNET_DEPTHS.get(count_blocks(tensors, r"backbone\.net\.layer3\.(\d+)\."))


# extras and config are whatever pickled plain data or JSON lies beside the tensors
def describe_birder(extras: Mapping[str, Any]) -> tuple[list[Slot], dict[str, Argument]]:
    """Read the classes and arguments that birder stores; its labels begin at 1: row s of its heads is label s + 1."""
    table = sorted((index, name) for name, index in extras["class_to_idx"].items() if index > 0)
    arguments: dict[str, Argument] = {}
    if "rgb_stats" in extras:
        arguments["image_mean"] = list(extras["rgb_stats"]["mean"])
        arguments["image_std"] = list(extras["rgb_stats"]["std"])
    if "signature" in extras:
        arguments["min_size"] = int(extras["signature"]["inputs"][0]["data_shape"][2])
    return [Slot(index - 1, name, index) for index, name in table], arguments


def describe_huggingface(config: Mapping[str, Any]) -> tuple[list[Slot], dict[str, Argument]]:
    """Read the classes and arguments in Hugging Face's ``config.json``.

    Raises:
        CheckpointError: if the network has an option that `DeformableDETR` has not.
    """
    heads = config.get("encoder_attention_heads", 8)
    expected = {"dilation": False, "activation_function": "relu", "decoder_attention_heads": heads}
    unlike = [f"{k} {config[k]}" for k, value in expected.items() if config.get(k, value) != value]
    if unlike:
        raise CheckpointError(f"[LCD-K011] config.json asks for {', '.join(unlike)}, which is not supported here")
    table = sorted((int(index), name) for index, name in config.get("id2label", {}).items())
    arguments: dict[str, Argument] = {"num_heads": heads}
    if config.get("two_stage"):
        arguments["num_queries"] = config.get("two_stage_num_proposals", 300)
    if backbone := (config.get("backbone_config") or {}).get("backbone") or config.get("backbone"):
        arguments["backbone"] = backbone
    return [Slot(i, name, i) for i, name in table if name != "N/A" and not name.startswith("LABEL_")], arguments


def describe_original(
    tensors: Mapping[str, Tensor], extras: Mapping[str, Any]
) -> tuple[list[Slot], dict[str, Argument]]:
    """Read the arguments that the authors store; their 91 rows are COCO's category ids, of which 80 are in use."""
    arguments: dict[str, Argument] = {}
    if isinstance(args := extras.get("args"), argparse.Namespace):
        names = {"nheads": "num_heads", "num_queries": "num_queries"}
        arguments = {ours: getattr(args, theirs) for theirs, ours in names.items() if hasattr(args, theirs)}
    head = tensors.get("class_embed.0.bias")
    if detect_origin(tensors) != "original" or head is None or len(head) != 91:
        return [], arguments
    return [Slot(i, name, i) for i, name in coco_categories()], arguments
