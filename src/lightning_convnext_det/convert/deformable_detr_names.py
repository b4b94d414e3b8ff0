"""What Deformable DETR's tensors are called elsewhere, and what their shapes say about the network.

Three origins agree on the network and differ in names, in the order of the decoder's norms, in how Hugging Face
splits the projections of the self-attention, and in the position encoding:

- ``birder``: norms in order of place; cells encoded by their far edge (position_offset 0); the first LayerNorm of its
  ConvNeXt adds 1e-5 to the variance, all others 1e-6 (stem_eps);
- ``original``, the authors' repository (fundamentalvision/Deformable-DETR): the decoder's first norm is that of the
  cross-attention, which comes second; cells encoded by their centre (position_offset 0.5);
- ``huggingface``: cells encoded by their centre; heads that layers share are stored once.

The order of levels, heads, points and coordinates is the same in all. What differs by design after an import: proposals
on padding or at the very border are never chosen; numbers that are not finite stop the run, where birder and Hugging
Face clamp activations and costs; the matching cost is computed from logits instead of clamped probabilities. Hugging
Face has dropout on the encoder's input and none in the attention and after the ReLU, and no loss on proposals; ours has
dropout and losses as the authors have.
"""

import re
from collections.abc import Iterable, Mapping

import timm
import torch
from torch import Tensor

Argument = str | int | float | bool | list[int] | list[float]

Rules = list[tuple[str, str]]

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

# width of the stem and depth of the third stage -> timm's name of the size
CONVNEXT_SIZES = {
    (40, 6): "atto",
    (48, 6): "femto",
    (64, 6): "pico",
    (80, 8): "nano",
    (96, 9): "tiny",
    (96, 27): "small",
    (128, 27): "base",
    (192, 27): "large",
    (256, 27): "xlarge",
    (352, 27): "huge",
}
_RESNET_DEPTHS = {6: "resnet50", 23: "resnet101", 36: "resnet152"}  # blocks of the third stage


def detect_origin(keys: Iterable[str]) -> str | None:
    """Tell whose Deformable DETR tensors of these names are; None if nobody's."""
    keys = set(keys)
    if {"model.encoder.layers.0.self_attn.sampling_offsets.weight", "model.level_embed"} <= keys:
        return "huggingface"
    if "transformer.encoder.layers.0.self_attn.sampling_offsets.weight" in keys:
        return "original" if any(k.startswith("backbone.0.body.") for k in keys) else "birder"
    return None


def rename(state_dict: Mapping[str, Tensor], origin: str) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Give tensors their names here.

    Returns:
        The tensors by the names they have here; the names there of tensors that carry nothing new, because they repeat
        another (heads that the decoder holds too, or that layers share) or count batches; the names there of tensors
        that contradict one of the same name here.
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
    for pattern, replacement in _SHARED + _RULES[origin]:
        key = re.sub(pattern, replacement, key)
    return key


def _join_projections(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the projections of query, key and value into the one that `torch.nn.MultiheadAttention` has."""
    joined = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.self_attention)\.([qkv])_proj\.(weight|bias)", name)
        parts = [f"{match[1]}.{letter}_proj.{match[3]}" for letter in "qkv"] if match else []
        if match is None or any(part not in tensors for part in parts):
            joined[name] = tensor
        elif match[2] == "q":
            joined[f"{match[1]}.in_proj_{match[3]}"] = torch.cat([tensors[part] for part in parts])
    return joined


def infer_arguments(tensors: Mapping[str, Tensor], origin: str, num_heads: int) -> dict[str, Argument]:
    """Read the arguments of `DeformableDETR` off renamed tensors. ``backbone`` is left out where it is not known.

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
        "encoder_layers": _count(tensors, r"encoder\.layers\.(\d+)\."),
        "decoder_layers": _count(tensors, r"decoder\.layers\.(\d+)\."),
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


def share_heads(
    tensors: dict[str, Tensor], origin: str, box_refinement: bool, heads: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Drop the copies of a head that all layers share; make them where Hugging Face shares a head and we do not.

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


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for k in tensors if (match := re.match(pattern, k))})


def _infer_backbone(tensors: Mapping[str, Tensor]) -> str | None:
    """Recognise a ConvNeXt or a ResNet by its widths and depths."""
    name = None
    if (stem := tensors.get("backbone.net.stem_0.weight")) is not None:
        size = CONVNEXT_SIZES.get((len(stem), _count(tensors, r"backbone\.net\.stages_2\.blocks\.(\d+)\.")))
        family = "convnextv2" if "backbone.net.stages_0.blocks.0.mlp.grn.weight" in tensors else "convnext"
        name = f"{family}_{size}" if size else None
    elif (conv := tensors.get("backbone.net.layer1.0.conv2.weight")) is not None and conv.shape == (64, 64, 3, 3):
        name = _RESNET_DEPTHS.get(_count(tensors, r"backbone\.net\.layer3\.(\d+)\."))
    return name if name is not None and timm.is_model(name) else None
