"""What the tensors of MMDetection's R-CNNs on ConvNeXt are called there, and what they say about the network.

The files are those of facebookresearch/ConvNeXt, ``object_detection``: Mask R-CNN and Cascade Mask R-CNN. The mask
branch has no influence on boxes and is left out. Background is the last class there and the first one here.
"""

import re
from collections.abc import Iterable, Mapping

import timm
import torch
from torch import Tensor

from lightning_convnext_det.convert.deformable_detr_names import CONVNEXT_SIZES, Argument, Rules

IGNORED = "roi_head.mask_head."  # how names of tensors begin that are left out on purpose

_BACKBONE: Rules = [
    (r"^backbone\.downsample_layers\.0\.(\d)\.", r"backbone.body.net.stem_\1."),
    (r"^backbone\.downsample_layers\.(\d)\.(\d)\.", r"backbone.body.net.stages_\1.downsample.\2."),
    (r"^backbone\.stages\.(\d)\.(\d+)\.dwconv\.", r"backbone.body.net.stages_\1.blocks.\2.conv_dw."),
    (r"^backbone\.stages\.(\d)\.(\d+)\.pwconv([12])\.", r"backbone.body.net.stages_\1.blocks.\2.mlp.fc\3."),
    (r"^backbone\.stages\.(\d)\.(\d+)\.", r"backbone.body.net.stages_\1.blocks.\2."),
    (r"^backbone\.norm(\d)\.", r"backbone.body.norms.\1."),
]
_RULES: Rules = [
    *_BACKBONE,
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


def detect(keys: Iterable[str]) -> bool:
    """Tell whether tensors of these names are an R-CNN of MMDetection."""
    keys = set(keys)
    return "rpn_head.rpn_conv.weight" in keys and any(k.startswith("roi_head.bbox_head.") for k in keys)


def is_cascade(keys: Iterable[str]) -> bool:
    """Tell Cascade R-CNN from an R-CNN with one box head."""
    return any(k.startswith("roi_head.bbox_head.0.") for k in keys)


def rename(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Give tensors their names and their order of classes here.

    Returns:
        The tensors by the names they have here; the names there of those that are left out on purpose.
    """
    four_conv = any(".shared_convs." in k for k in state_dict)
    renamed, ignored = {}, []
    for key, tensor in state_dict.items():
        if key.startswith(IGNORED):
            ignored.append(key)
            continue
        name = key
        for pattern, replacement in _RULES + (_FOUR_CONV if four_conv else _TWO_FC):
            name = re.sub(pattern, replacement, name)
        renamed[name] = _reorder(name, tensor)
    return renamed, ignored


def _reorder(name: str, tensor: Tensor) -> Tensor:
    """Move background from last to first; boxes of background, which exist here only, do not move."""
    if ".cls_score." in name:
        return torch.cat((tensor[-1:], tensor[:-1]))
    if ".box_predictor.bbox_pred." in name:
        return torch.cat((torch.zeros_like(tensor[:4]), tensor))
    return tensor


def infer_arguments(tensors: Mapping[str, Tensor]) -> dict[str, Argument]:
    """Read the arguments of `FasterRCNN` or `CascadeRCNN` off renamed tensors.

    ``backbone`` is left out where it is not known. What the tensors cannot show is as in the authors' configurations.

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
    if (backbone := _infer_backbone(tensors)) is not None:
        arguments["backbone"] = backbone
    return arguments


def _infer_backbone(tensors: Mapping[str, Tensor]) -> str | None:
    """Recognise a ConvNeXt by the width of its stem and the depth of its third stage."""
    stem = tensors["backbone.body.net.stem_0.weight"]
    blocks = {m[1] for k in tensors if (m := re.match(r"backbone\.body\.net\.stages_2\.blocks\.(\d+)\.", k))}
    size = CONVNEXT_SIZES.get((len(stem), len(blocks)))
    name = f"convnext_{size}" if size else None
    return name if name is not None and timm.is_model(name) else None
