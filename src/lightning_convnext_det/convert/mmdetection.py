"""Detectors of MMDetection: the ConvNeXt authors' Mask R-CNN and Cascade Mask R-CNN, without their mask branch."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from lightning_convnext_det.convert import mmdetection_names as mmdetection_weights
from lightning_convnext_det.convert.deformable_detr_names import Argument
from lightning_convnext_det.convert.report import Converted, Slot, fill
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN

_COUNTERS = re.compile(r"\.(running_mean|running_var|num_batches_tracked)$")
_COCO_CLASSES = 80


def convert_mmdetection(
    state_dict: Mapping[str, Tensor], *, class_names: Sequence[str] = (), **arguments: Argument
) -> Converted:
    """Convert a state dict of Mask R-CNN or Cascade Mask R-CNN on ConvNeXt.

    Args:
        state_dict: the tensors; not modified.
        class_names: the classes in order, where the file states them; 80 classes are COCO's otherwise.
        arguments: arguments of `FasterRCNN` or `CascadeRCNN` that the tensors do not show, e.g. an unusual
            ``backbone``; they win over what is inferred.

    Raises:
        CheckpointError: if the tensors do not fill our network exactly.
    """
    cascade = mmdetection_weights.is_cascade(state_dict)
    origin = "MMDetection's Cascade R-CNN" if cascade else "MMDetection's Mask R-CNN"
    tensors, ignored = mmdetection_weights.rename(state_dict)
    try:
        inferred = {**mmdetection_weights.infer_arguments(tensors), **arguments}
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
        slots=_name_classes(int(inferred["num_classes"]), class_names),  # type: ignore[arg-type]
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


def _name_classes(count: int, given: Sequence[str]) -> tuple[Slot, ...]:
    categories = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by COCO's id
    coco = [(i, name) for i, name in enumerate(categories) if name not in ("N/A", "__background__")]
    if count == _COCO_CLASSES and list(given) in ([], [name for _, name in coco]):
        return tuple(Slot(row, name, index) for row, (index, name) in enumerate(coco))
    if len(given) == count:
        return tuple(Slot(row, name, row) for row, name in enumerate(given))
    return ()
