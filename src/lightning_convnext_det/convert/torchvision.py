"""Faster R-CNN of torchvision with an FPN on a ResNet or ResNeXt: names of tensors, classes and arguments."""

import re
from collections.abc import Mapping

from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from lightning_convnext_det.convert.naming import Argument
from lightning_convnext_det.convert.report import Converted, Slot, fill
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN

_ORIGIN = "torchvision"
# blocks of layer3 and whether blocks have three convolutions -> ResNet; ResNeXt-50 has grouped convolutions
_RESNETS = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101"}
_EPS = 1e-5  # of BatchNorm in torchvision and timm


def is_torchvision(state_dict: Mapping[str, Tensor]) -> bool:
    """Detect an R-CNN of torchvision by the names of its tensors."""
    return "rpn.head.cls_logits.weight" in state_dict and "roi_heads.box_predictor.cls_score.weight" in state_dict


def convert_torchvision(state_dict: Mapping[str, Tensor], **arguments: Argument) -> Converted:
    """Convert a state dict of ``fasterrcnn_resnet50_fpn`` or the same network on another ResNet.

    All classes are kept, also the unused ones of COCO's 91, so that scores stay the same. Files with the names of
    torchvision before 0.14, such as the published COCO weights, belong to BatchNorms without epsilon, as torchvision
    runs them; our epsilon is then subtracted from the variances.

    Args:
        state_dict: the tensors; not modified.
        arguments: arguments of `FasterRCNN` that cannot be inferred from the tensors, e.g. ``backbone``; they
            override inferred ones.

    Raises:
        CheckpointError: if the tensors are of another network, or do not fit it exactly.
    """
    if "backbone.fpn.inner_blocks.0.1.weight" in state_dict or "roi_heads.box_head.0.0.weight" in state_dict:
        raise CheckpointError(
            f"[LCD-K011] {_ORIGIN}: this is fasterrcnn_resnet50_fpn_v2, whose heads are not modelled here; "
            "use the weights of fasterrcnn_resnet50_fpn"
        )
    if "roi_heads.box_head.fc6.weight" not in state_dict:
        raise CheckpointError(f"[LCD-K011] {_ORIGIN}: not a Faster R-CNN with two fully connected layers")
    is_legacy = "rpn.head.conv.weight" in state_dict
    tensors = {_rename(key): value for key, value in state_dict.items() if not key.endswith("num_batches_tracked")}
    if is_legacy:
        tensors = {k: v - _EPS if k.endswith(".running_var") else v for k, v in tensors.items()}
    classes = len(tensors["roi_heads.box_predictor.cls_score.weight"]) - 1
    inferred: dict[str, Argument] = {"num_classes": classes, "backbone": _backbone(state_dict), **arguments}
    counters = [key for key in state_dict if key.endswith("num_batches_tracked")]
    return fill(FasterRCNN, inferred, tensors, _ORIGIN, slots=_slots(classes), redundant=counters)


def _rename(key: str) -> str:
    key = re.sub(r"^backbone\.body\.", "backbone.body.net.", key)
    key = re.sub(r"^(backbone\.fpn\.\w+_blocks\.\d)\.(weight|bias)$", r"\1.0.\2", key)
    return re.sub(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", key)


def _backbone(state_dict: Mapping[str, Tensor]) -> str:
    blocks = {m[1] for key in state_dict if (m := re.match(r"backbone\.body\.layer3\.(\d+)\.", key))}
    is_bottleneck = "backbone.body.layer1.0.conv3.weight" in state_dict
    second = state_dict.get("backbone.body.layer1.0.conv2.weight")
    if second is not None and tuple(second.shape[:2]) == (128, 4) and len(blocks) == 6:
        return "resnext50_32x4d"
    name = _RESNETS.get((len(blocks), is_bottleneck))
    if name is None or second is None or len(second) != 64:
        raise CheckpointError(f"[LCD-K011] {_ORIGIN}: the backbone is not recognised; a ResNet is expected")
    return name


def _slots(classes: int) -> tuple[Slot, ...]:
    """COCO's names and ids, if there are 90 classes."""
    if classes != 90:
        return ()
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return tuple(Slot(i, name if name != "N/A" else f"N/A {i}", i) for i, name in enumerate(names) if i > 0)
