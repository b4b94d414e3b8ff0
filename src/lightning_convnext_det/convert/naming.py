"""Renaming of tensors, and what several sources share: sizes of ConvNeXt and the classes of COCO."""

import re
from collections.abc import Iterable

import timm
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

Argument = str | int | float | bool | list[int] | list[float]

Rules = list[tuple[str, str]]

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


def rename_key(key: str, rules: Rules) -> str:
    """Apply regular expressions and their replacements to the name of a tensor, one after the other."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def count_blocks(keys: Iterable[str], pattern: str) -> int:
    """Count the different numbers that the group of a pattern matches in the names of tensors."""
    return len({match[1] for key in keys if (match := re.match(pattern, key))})


def convnext_name(stem_width: int, third_stage_blocks: int, family: str = "convnext") -> str | None:
    """Recognise a ConvNeXt by the width of its stem and the depth of its third stage; None if timm has no such."""
    name = f"{family}_{CONVNEXT_SIZES.get((stem_width, third_stage_blocks))}"
    return name if timm.is_model(name) else None


def convnext_rules(prefix: str) -> Rules:
    """Rules from the names of the ConvNeXt authors' backbone to timm's feature extractor, whose names get a prefix."""
    block = rf"{prefix}stages_\1.blocks.\2."
    return [
        (r"^backbone\.downsample_layers\.0\.(\d)\.", rf"{prefix}stem_\1."),
        (r"^backbone\.downsample_layers\.(\d)\.(\d)\.", rf"{prefix}stages_\1.downsample.\2."),
        (r"^backbone\.stages\.(\d)\.(\d+)\.dwconv\.", rf"{block}conv_dw."),
        (r"^backbone\.stages\.(\d)\.(\d+)\.pwconv([12])\.", rf"{block}mlp.fc\3."),
        (r"^backbone\.stages\.(\d)\.(\d+)\.", block),
    ]


def coco_categories() -> list[tuple[int, str]]:
    """Category ids and names of COCO's 80 classes, in order of the ids."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # indexed by id, with gaps
    return [(i, name) for i, name in enumerate(names) if name not in ("N/A", "__background__")]
