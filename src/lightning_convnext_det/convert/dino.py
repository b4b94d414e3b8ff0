"""DINO of detrex on ConvNeXt: names of tensors, classes and arguments.

The files are those of IDEA-Research/detrex, ``projects/dino``. They hold the class and box heads twice, under the
detector and under its decoder; the copies must agree. Differences by design after an import: padding of images in a
batch is masked, where detrex evaluates one image at a time; proposals at the very border of an image are chosen only
where there are too few others.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_convnext_det.convert.naming import (
    Argument,
    Rules,
    convnext_name,
    convnext_rules,
    count_blocks,
    rename_key,
)
from lightning_convnext_det.convert.report import Converted, fill, name_slots
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.models.deformable_detr.dino import DINO

_ORIGIN = "detrex's DINO"
TRANSFORMER_RULES: Rules = [
    (r"^decoder\.ref_point_head\.layers\.0\.", "decoder.position_head.0."),
    (r"^decoder\.ref_point_head\.layers\.1\.", "decoder.position_head.3."),
    (r"^encoder\.layers\.(\d+)\.norms\.0\.", r"encoder.layers.\1.norm."),
    (r"^encoder\.layers\.(\d+)\.norms\.1\.", r"encoder.layers.\1.feedforward.norm."),
    (r"^decoder\.layers\.(\d+)\.norms\.0\.", r"decoder.layers.\1.self_norm."),
    (r"^decoder\.layers\.(\d+)\.norms\.1\.", r"decoder.layers.\1.cross_norm."),
    (r"^decoder\.layers\.(\d+)\.norms\.2\.", r"decoder.layers.\1.feedforward.norm."),
    (r"\.value_proj\.", ".value_projection."),
    (r"\.output_proj\.", ".output_projection."),
]
"""Rules that the files of detrex and MMDetection share, after the prefixes of encoder and decoder."""
_RULES: Rules = [
    *convnext_rules("backbone.net."),
    (r"^neck\.convs\.(\d+)\.conv\.", r"levels.projections.\1.0."),
    (r"^neck\.convs\.(\d+)\.norm\.", r"levels.projections.\1.1."),
    (r"^transformer\.level_embeds$", "levels.embedding"),
    (r"^transformer\.tgt_embed\.", "query_embedding."),
    (r"^transformer\.enc_output\.", "proposer.memory_projection."),
    (r"^transformer\.enc_output_norm\.", "proposer.memory_norm."),
    (r"^(?:transformer\.decoder\.)?class_embed\.", "class_heads."),
    (r"^(?:transformer\.decoder\.)?bbox_embed\.(\d+)\.layers\.0\.", r"box_heads.\1.0."),
    (r"^(?:transformer\.decoder\.)?bbox_embed\.(\d+)\.layers\.1\.", r"box_heads.\1.3."),
    (r"^(?:transformer\.decoder\.)?bbox_embed\.(\d+)\.layers\.2\.", r"box_heads.\1.6."),
    (r"^label_enc\.", "denoising.label_embedding."),
    (r"^transformer\.(encoder|decoder)\.", r"\1."),
    (r"^encoder\.layers\.(\d+)\.attentions\.0\.", r"encoder.layers.\1.attention."),
    (r"^decoder\.layers\.(\d+)\.attentions\.0\.attn\.", r"decoder.layers.\1.self_attention."),
    (r"^decoder\.layers\.(\d+)\.attentions\.1\.", r"decoder.layers.\1.cross_attention."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".feedforward.linear1."),
    (r"\.ffns\.0\.layers\.1\.", ".feedforward.linear2."),
    *TRANSFORMER_RULES,
]


def is_detrex_dino(keys: Iterable[str]) -> bool:
    """Detect a DINO of detrex by the names of its tensors."""
    return {"transformer.tgt_embed.weight", "transformer.decoder.ref_point_head.layers.0.weight"} <= set(keys)


def convert_dino(
    state_dict: Mapping[str, Tensor], *, class_names: Sequence[str] = (), **arguments: Argument
) -> Converted:
    """Convert a state dict of detrex's DINO on ConvNeXt.

    Args:
        state_dict: the tensors; not modified.
        class_names: names of the classes in order, if they are known; else 80 classes are COCO's.
        arguments: arguments of `DINO` that cannot be inferred from the tensors (``num_heads``, 8 by default, an unusual
            ``backbone``); they override inferred ones.

    Raises:
        CheckpointError: if the tensors do not fit the network exactly, or the copies of a head differ.
    """
    tensors, redundant, contradicting = rename_dino(state_dict)
    inferred = complete_arguments(tensors, arguments, _ORIGIN)
    slots = name_slots(int(inferred["num_classes"]), class_names)  # type: ignore[arg-type]
    return fill(DINO, inferred, tensors, _ORIGIN, slots=slots, redundant=redundant, left_over=contradicting)


def rename_dino(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Rename the tensors of detrex to those of `DINO`.

    Returns:
        The renamed tensors; the original names of those that repeat another; the original names of those that should
        and do not.
    """
    renamed: dict[str, Tensor] = {}
    redundant, contradicting = [], []
    for key, tensor in state_dict.items():
        name = rename_key(key, _rules_of(state_dict))
        if name not in renamed:
            renamed[name] = tensor
        elif torch.equal(renamed[name], tensor):
            redundant.append(key)
        else:
            contradicting.append(key)
    return renamed, redundant, contradicting


def _rules_of(keys: Iterable[str]) -> Rules:
    """Rules that depend on the number of levels: extra ones follow the others, and each level's norm has a number."""
    keys = list(keys)
    maps = count_blocks(keys, r"neck\.convs\.(\d+)\.")
    extra = count_blocks(keys, r"neck\.extra_convs\.(\d+)\.")
    rules = list(_RULES)
    for i in range(extra):
        rules.append((rf"^neck\.extra_convs\.{i}\.conv\.", f"levels.projections.{maps + i}.0."))
        rules.append((rf"^neck\.extra_convs\.{i}\.norm\.", f"levels.projections.{maps + i}.1."))
    for i in range(4):
        rules.append((rf"^backbone\.norm{i}\.", f"backbone.norms.{i - (4 - maps)}."))
    return rules


def complete_arguments(
    tensors: Mapping[str, Tensor], given: Mapping[str, Argument], origin: str
) -> dict[str, Argument]:
    """The arguments of `DINO`: those given, and for the others what renamed tensors tell.

    Raises:
        CheckpointError: if a tensor that every DINO has is missing, or the backbone is not recognised.
    """
    try:
        inferred = {**_infer_arguments(tensors, int(given.get("num_heads", 8))), **given}  # type: ignore[arg-type]
    except KeyError as error:
        raise CheckpointError(f"[LCD-K011] {origin}: tensor {error} is missing; is the file complete?") from None
    if "backbone" not in inferred:
        raise CheckpointError(f"[LCD-K011] {origin}: the backbone is not recognised; give its timm name as backbone")
    return inferred


def _infer_arguments(tensors: Mapping[str, Tensor], num_heads: int) -> dict[str, Argument]:
    """Infer the arguments of `DINO` from renamed tensors, without ``backbone`` if it is unknown.

    Raises:
        KeyError: if a tensor that every DINO has is missing.
    """
    levels, hidden_dim = tensors["levels.embedding"].shape
    pointwise = [k for k in tensors if re.fullmatch(r"levels\.projections\.\d+\.0\.weight", k)]
    maps = sum(tensors[k].shape[-1] == 1 for k in pointwise)
    arguments: dict[str, Argument] = {
        "num_classes": tensors["class_heads.0.weight"].shape[0],
        "strides": [32 >> i for i in reversed(range(maps))],
        "extra_levels": levels - maps,
        "num_queries": tensors["query_embedding.weight"].shape[0],
        "hidden_dim": hidden_dim,
        "num_heads": num_heads,
        "encoder_layers": count_blocks(tensors, r"encoder\.layers\.(\d+)\."),
        "decoder_layers": count_blocks(tensors, r"decoder\.layers\.(\d+)\."),
        "encoder_points": len(tensors["encoder.layers.0.attention.attention_weights.bias"]) // (num_heads * levels),
        "decoder_points": len(tensors["decoder.layers.0.cross_attention.attention_weights.bias"])
        // (num_heads * levels),
        "feedforward_dim": tensors["encoder.layers.0.feedforward.linear1.weight"].shape[0],
        "out_norm": "backbone.norms.0.weight" in tensors,
        "size_divisible": 1,
        "resize": "pillow",
    }
    if (name := _backbone_name(tensors)) is not None:
        arguments["backbone"] = name
    return arguments


def _backbone_name(tensors: Mapping[str, Tensor]) -> str | None:
    """Recognise a ConvNeXt, or a ResNet with three convolutions per block; None if it is another."""
    stem = tensors.get("backbone.net.stem_0.weight")
    if stem is not None:
        return convnext_name(len(stem), count_blocks(tensors, r"backbone\.net\.stages_2\.blocks\.(\d+)\."))
    if "backbone.net.layer1.0.conv3.weight" not in tensors:
        return None
    blocks = count_blocks(tensors, r"backbone\.net\.layer3\.(\d+)\.")
    return {6: "resnet50", 23: "resnet101"}.get(blocks)
