"""R-CNNs of MMDetection: the ConvNeXt authors' Mask R-CNN and Cascade Mask R-CNN, without their mask branch.

The files are those of facebookresearch/ConvNeXt, ``object_detection``. The mask branch has no influence on boxes and is
ignored. Background is the last class there and the first one here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN

_COUNTERS = re.compile(r"\.(running_mean|running_var|num_batches_tracked)$")
_IGNORED = "roi_head.mask_head."  # prefix of tensors that are ignored on purpose

_RULES: Rules = [
    *convnext_rules("backbone.body.net."),
    (r"^backbone\.norm(\d)\.", r"backbone.body.norms.\1."),
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"^roi_head\.bbox_head\.(\d)\.", r"roi_heads.stages.\1."),
    (r"^roi_head\.bbox_head\.", "roi_heads."),
    (r"^(roi_heads.*)\.fc_cls\.", r"\1.box_predictor.cls_score."),
    (r"^(roi_heads.*)\.fc_reg\.", r"\1.box_predictor.bbox_pred."),
    (r"^(roi_heads.*)\.shared_convs\.(\d)\.conv\.", r"\1.box_head.\2.0."),
    (r"^(roi_heads.*)\.shared_convs\.(\d)\.bn\.", r"\1.box_head.\2.1."),
]
_TWO_FC: Rules = [(r"\.shared_fcs\.0\.", ".box_head.fc6."), (r"\.shared_fcs\.1\.", ".box_head.fc7.")]
_FOUR_CONV: Rules = [(r"\.shared_fcs\.0\.", ".box_head.5.")]  # four convolutions, flatten, then this one


def convert_mmdetection(
    state_dict: Mapping[str, Tensor], *, class_names: Sequence[str] = (), **arguments: Argument
) -> Converted:
    """Convert a state dict of Mask R-CNN or Cascade Mask R-CNN on ConvNeXt.

    Args:
        state_dict: the tensors; not modified.
        class_names: names of the classes in order, if the file has them; else 80 classes are COCO's.
        arguments: arguments of `FasterRCNN` or `CascadeRCNN` that cannot be inferred from the tensors, e.g. an
            unusual ``backbone``; they override inferred ones.

    Raises:
        CheckpointError: if the tensors do not fit the network exactly.
    """
    cascade = _is_cascade(state_dict)
    origin = "MMDetection's Cascade R-CNN" if cascade else "MMDetection's Mask R-CNN"
    tensors, ignored = _rename(state_dict)
    try:
        inferred = {**_infer_arguments(tensors), **arguments}
    except KeyError as error:
        raise CheckpointError(f"[LCD-K011] {origin}: tensor {error} is missing; is the file complete?") from None
    if "backbone" not in inferred:
        raise CheckpointError(f"[LCD-K011] {origin}: the backbone is not recognised; give its timm name as backbone")
    counts = {key: 0 if _COUNTERS.search(key) else tensor.numel() for key, tensor in state_dict.items()}
    left_out = {key: counts[key] for key in ignored}
    return fill(
        CascadeRCNN if cascade else FasterRCNN,
        inferred,
        tensors,
        origin,
        slots=name_slots(int(inferred["num_classes"]), class_names),  # type: ignore[arg-type]
        ignored=left_out,
        parameters=sum(counts.values()) - sum(left_out.values()),
    )


def read_class_names(extras: Mapping[str, Any]) -> list[str]:  # whatever lies beside the tensors
    """Find the names of the classes in the ``meta`` section that MMDetection writes into its files."""
    meta = extras.get("meta")
    for key in ("CLASSES", "dataset_meta"):
        value = meta.get(key) if isinstance(meta, dict) else None
        if isinstance(value, dict):
            value = value.get("classes", value.get("CLASSES"))
        if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
            return list(value)
    return []


def is_mmdetection(keys: Iterable[str]) -> bool:
    """Detect an R-CNN of MMDetection by the names of its tensors."""
    keys = set(keys)
    return "rpn_head.rpn_conv.weight" in keys and any(k.startswith("roi_head.bbox_head.") for k in keys)


def _is_cascade(keys: Iterable[str]) -> bool:
    """Tell Cascade R-CNN from an R-CNN with one box head."""
    return any(k.startswith("roi_head.bbox_head.0.") for k in keys)


def _rename(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename tensors to those of `FasterRCNN` or `CascadeRCNN`, and reorder their classes.

    Returns:
        The renamed tensors, and the original names of those that are ignored on purpose.
    """
    four_conv = any(".shared_convs." in k for k in state_dict)
    renamed, ignored = {}, []
    for key, tensor in state_dict.items():
        if key.startswith(_IGNORED):
            ignored.append(key)
            continue
        name = rename_key(key, _RULES + (_FOUR_CONV if four_conv else _TWO_FC))
        renamed[name] = _reorder(name, tensor)
    return renamed, ignored


def _reorder(name: str, tensor: Tensor) -> Tensor:
    """Move background from last to first; the boxes of background, which only our heads have, are zero."""
    if ".cls_score." in name:
        return torch.cat((tensor[-1:], tensor[:-1]))
    if ".box_predictor.bbox_pred." in name:
        return torch.cat((torch.zeros_like(tensor[:4]), tensor))
    return tensor


def _infer_arguments(tensors: Mapping[str, Tensor]) -> dict[str, Argument]:
    """Infer the arguments of `FasterRCNN` or `CascadeRCNN` from renamed tensors, without ``backbone`` if it is unknown.

    What tensors do not show is as in the authors' configurations.

    Raises:
        KeyError: if a tensor that every such detector has is missing.
    """
    cascade = "roi_heads.stages.0.box_predictor.cls_score.weight" in tensors
    predictor = "roi_heads.stages.0.box_predictor" if cascade else "roi_heads.box_predictor"
    logits = tensors[f"{predictor}.cls_score.weight"]
    arguments: dict[str, Argument] = {
        "num_classes": len(logits) - 1,
        "convention": "mmdetection",
        "out_norm": "backbone.body.norms.0.weight" in tensors,
        "fpn_channels": len(tensors["rpn.head.conv.0.0.weight"]),
        "box_head": "four_conv" if any(".box_head.0.0." in k for k in tensors) else "two_fc",
        "box_head_features": logits.shape[1],
        # mask_rcnn_convnext_fpn.py and cascade_mask_rcnn_convnext_fpn.py, train_cfg.rpn_proposal.max_per_img
        "rpn_post_nms_top_n": [2000 if cascade else 1000, 1000],
    }
    if len(tensors[f"{predictor}.bbox_pred.weight"]) != 4 * len(logits):
        raise KeyError(f"{predictor}.bbox_pred of every class")
    stem = tensors["backbone.body.net.stem_0.weight"]
    blocks = count_blocks(tensors, r"backbone\.body\.net\.stages_2\.blocks\.(\d+)\.")
    if (backbone := convnext_name(len(stem), blocks)) is not None:
        arguments["backbone"] = backbone
    return arguments
