"""DINO of MMDetection on ResNet or ConvNeXt: names of tensors, classes and arguments.

The files are those of open-mmlab/mmdetection 3, ``configs/dino``, with the resizing and the position encoding that they
were trained with. Differences by design after an import, beside those of `lightning_convnext_det.convert.dino`: sides
of boxes below a thousandth of the image are limited as in detrex. Swin backbones are not recognised.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_convnext_det.convert.dino import TRANSFORMER_RULES, complete_arguments
from lightning_convnext_det.convert.naming import Argument, Rules, convnext_rules, count_blocks, rename_key
from lightning_convnext_det.convert.report import Converted, fill, name_slots
from lightning_convnext_det.models.deformable_detr.dino import DINO

_ORIGIN = "MMDetection's DINO"
_COUNTERS = ("running_mean", "running_var", "num_batches_tracked")
_RULES: Rules = [
    *convnext_rules("backbone.net."),
    (r"^backbone\.(conv1|bn1|layer\d)\.", r"backbone.net.\1."),
    (r"^level_embed$", "levels.embedding"),
    (r"^memory_trans_fc\.", "proposer.memory_projection."),
    (r"^memory_trans_norm\.", "proposer.memory_norm."),
    (r"^bbox_head\.cls_branches\.", "class_heads."),
    (r"^bbox_head\.reg_branches\.(\d+)\.0\.", r"box_heads.\1.0."),
    (r"^bbox_head\.reg_branches\.(\d+)\.2\.", r"box_heads.\1.3."),
    (r"^bbox_head\.reg_branches\.(\d+)\.4\.", r"box_heads.\1.6."),
    (r"^dn_query_generator\.", "denoising."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.", r"encoder.layers.\1.attention."),
    (r"^decoder\.layers\.(\d+)\.self_attn\.attn\.", r"decoder.layers.\1.self_attention."),
    (r"^decoder\.layers\.(\d+)\.cross_attn\.", r"decoder.layers.\1.cross_attention."),
    (r"\.ffn\.layers\.0\.0\.", ".feedforward.linear1."),
    (r"\.ffn\.layers\.1\.", ".feedforward.linear2."),
    *TRANSFORMER_RULES,
]


def is_mmdetection_dino(keys: Iterable[str]) -> bool:
    """Detect a DINO of MMDetection by the names of its tensors."""
    return {"memory_trans_fc.weight", "dn_query_generator.label_embedding.weight"} <= set(keys)


def convert_mmdetection_dino(
    state_dict: Mapping[str, Tensor], *, class_names: Sequence[str] = (), **arguments: Argument
) -> Converted:
    """Convert a state dict of MMDetection's DINO.

    Args:
        state_dict: the tensors; not modified.
        class_names: names of the classes in order, if the file has them; else 80 classes are COCO's.
        arguments: arguments of `DINO` that cannot be inferred from the tensors (``num_heads``, 8 by default, an unusual
            ``backbone``); they override inferred ones.

    Raises:
        CheckpointError: if the tensors do not fit the network exactly.
    """
    counters = [key for key in state_dict if key.endswith("num_batches_tracked")]
    tensors = _rename({key: tensor for key, tensor in state_dict.items() if key not in counters})
    # dino-4scale_r50_8xb2-12e_coco.py: positional_encoding; images are resized by OpenCV
    fixed: dict[str, Argument] = {"position_offset": 0.0, "position_temperature": 20.0, "resize": "opencv"}
    inferred = complete_arguments(tensors, {**fixed, **arguments}, _ORIGIN)
    slots = name_slots(int(inferred["num_classes"]), class_names)  # type: ignore[arg-type]
    parameters = sum(tensor.numel() for key, tensor in state_dict.items() if not key.endswith(_COUNTERS))
    return fill(DINO, inferred, tensors, _ORIGIN, slots=slots, redundant=counters, parameters=parameters)


def _rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors to those of `DINO`; projections of the neck, which have no bias there, get one of zeros."""
    maps = count_blocks(state_dict, r"neck\.convs\.(\d+)\.")
    norms = sorted({int(m[1]) for key in state_dict if (m := re.match(r"backbone\.norm(\d)\.", key))})
    renamed: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = rename_key(key, _RULES)
        if match := re.match(r"neck\.(extra_)?convs\.(\d+)\.(conv|gn)\.(weight|bias)$", key):
            level = int(match[2]) + (maps if match[1] else 0)
            name = f"levels.projections.{level}.{('conv', 'gn').index(match[3])}.{match[4]}"
            if match[3] == "conv" and match[4] == "weight":
                renamed.setdefault(f"levels.projections.{level}.0.bias", torch.zeros_like(tensor[:, 0, 0, 0]))
        elif match := re.match(r"backbone\.norm(\d)\.(\w+)$", key):
            name = f"backbone.norms.{norms.index(int(match[1]))}.{match[2]}"
        renamed[name] = tensor
    return renamed
