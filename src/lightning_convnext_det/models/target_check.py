"""Targets of every detector: read by torchvision's conventions, and checked before they reach code that trusts them."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from lightning_convnext_det.errors import DataError
from lightning_convnext_det.ops.host_numbers import send
from lightning_convnext_det.types import Target

_logger = logging.getLogger(__name__)
_warned: set[str] = set()  # codes of warnings that this process has given
_VISIBLE = 0.5  # share of a box that lies in its image; augmentation without clipping leaves less now and then
_CONVERTIBLE = (BoundingBoxFormat.XYWH, BoundingBoxFormat.CXCYWH)


def prepare_targets(
    images: Sequence[Tensor] | Tensor, targets: Sequence[Target], num_classes: int, device: torch.device
) -> list[Target]:
    """Read the targets of a training step, as a user of torchvision writes them, and check them.

    Boxes may be of any dtype and ``torch.tensor([])`` where there are none; crowd regions (``iscrowd``) become
    ``ignored``. One transfer from the device for the whole batch when all is well.

    >>> target = {"boxes": torch.tensor([[0, 0, 8, 8], [4, 4, 9, 9]]), "labels": torch.tensor([1, 0]),
    ...           "iscrowd": torch.tensor([0, 1])}
    >>> prepare_targets([torch.zeros(3, 10, 10)], [target], 2, torch.device("cpu"))
    [{'boxes': tensor([[0., 0., 8., 8.]]), 'labels': tensor([1]), 'ignored': tensor([[4., 4., 9., 9.]])}]

    Args:
        images: as many as there are targets; their pixels are not read.
        targets: the objects of each image, boxes in pixels of the image.
        num_classes: labels must run from 0 to ``num_classes - 1``.
        device: where boxes and labels are to be.

    Returns:
        For each image boxes float32 [N, 4], labels int64 [N], ``ignored`` float32 [K, 4] if there are such regions, and
        the name of its file if it has one.

    Raises:
        DataError: if a box is not finite (roi_align ends in a segmentation fault on it) or has no area, a label is not
            in 0 ... num_classes - 1, or boxes, labels and ``iscrowd`` do not belong together.
        ValueError: if there is not one target for each image.
    """
    if isinstance(targets, Mapping) or len(images) != len(targets):
        given = 1 if isinstance(targets, Mapping) else len(targets)
        raise ValueError(f"got {len(images)} images and {given} targets; give a list with one target per image")
    read = [_read(target, _name(target, i), device) for i, target in enumerate(targets)]
    boxes, labels, crowd = (torch.cat(parts) for parts in zip(*read, strict=True))
    good = boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1) & (labels >= 0) & (labels < num_classes)
    inside = _visible_share(boxes, images, [len(own) for own, _, _ in read]) >= _VISIBLE
    # the one look at the device
    are_crowd, are_good, are_inside = torch.stack((crowd, good | crowd, inside | crowd)).tolist()
    prepared, first = [], 0
    for target, (own, classes, _) in zip(targets, read, strict=True):
        prepared.append(_split(target, own, classes, are_crowd[first : first + len(own)]))
        first += len(own)
    if all(are_good) and all(are_inside):
        return prepared
    for i, target in enumerate(prepared):
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            _check_object(box, label, _name(targets[i], i), num_classes)
    _warn_of_outside(boxes[are_inside.index(False)].tolist())
    return prepared


def _visible_share(boxes: Tensor, images: Sequence[Tensor] | Tensor, counts: Sequence[int]) -> Tensor:
    """The share of each box that lies in its image."""
    sides = [[x.shape[-1], x.shape[-2]] * 2 for x, count in zip(images, counts, strict=True) for _ in range(count)]
    limits = send(sides, boxes.device, boxes.dtype).reshape(-1, 4)
    visible = torch.minimum(boxes.clamp(min=0), limits)
    areas = [(x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (visible, boxes)]
    return areas[0] / areas[1]


def _warn_of_outside(box: list[float]) -> None:
    """Warn once per process."""
    if "LCD-D105" not in _warned:
        _warned.add("LCD-D105")
        _logger.warning(
            "[LCD-D105] target box %s lies for more than half outside of its image (further ones are not reported); "
            "boxes are (x1, y1, x2, y2) in pixels of the image given: if it was resized or cropped, change them alike",
            box,
        )


def _read(target: Target, name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, labels and which of them are crowd regions."""
    for key in ("boxes", "labels"):
        if key not in target:
            raise DataError(f"[LCD-D112] the target of {name} has no '{key}'; it has {', '.join(map(repr, target))}")
    boxes, labels = _corners(target["boxes"]), torch.as_tensor(target["labels"])
    if boxes.shape == (0,):  # torch.tensor([])
        boxes = boxes.reshape(0, 4)
    if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.dim() != 1:
        shapes = f"boxes {list(boxes.shape)} and labels {list(labels.shape)}"
        raise DataError(f"[LCD-D112] {name}: got {shapes}; expected [N, 4] and [N]")
    if len(boxes) != len(labels):
        raise DataError(f"[LCD-D112] {name}: {len(boxes)} boxes but {len(labels)} labels")
    if len(labels) and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise DataError(f"[LCD-D112] {name}: labels are {labels.dtype}; give the indices of classes, int64")
    boxes, labels = boxes.to(device, torch.float32), labels.to(device, torch.int64)
    crowd = target.get("iscrowd")
    if crowd is None:
        return boxes, labels, torch.zeros_like(labels, dtype=torch.bool)
    crowd = torch.as_tensor(crowd).to(device, torch.bool)
    if crowd.shape != labels.shape:
        raise DataError(f"[LCD-D112] {name}: {len(labels)} boxes but iscrowd is {list(crowd.shape)}")
    return boxes, labels, crowd


def _split(target: Target, boxes: Tensor, labels: Tensor, crowd: Sequence[bool]) -> Target:
    """Tell the objects of an image from its crowd regions."""
    prepared = Target(boxes=boxes, labels=labels)
    if any(crowd):
        objects, regions = (
            send([i for i, x in enumerate(crowd) if x == wanted], boxes.device, torch.int64) for wanted in (False, True)
        )
        prepared = Target(boxes=boxes[objects], labels=labels[objects], ignored=boxes[regions])
    if "file_name" in target:
        prepared["file_name"] = target["file_name"]
    return prepared


def _corners(boxes: Tensor) -> Tensor:
    """Boxes as (x1, y1, x2, y2); a plain tensor holds them already."""
    if isinstance(boxes, BoundingBoxes) and boxes.format in _CONVERTIBLE:
        boxes = convert_bounding_box_format(boxes, new_format=BoundingBoxFormat.XYXY)
    return torch.as_tensor(boxes).as_subclass(Tensor)


def _check_object(box: list[float], label: int, name: str, num_classes: int) -> None:
    if not torch.tensor(box).isfinite().all():
        raise DataError(f"[LCD-D103] {name}: box {box} is not finite; correct or remove it")
    if box[2] <= box[0] or box[3] <= box[1]:
        raise DataError(f"[LCD-D101] {name}: box {box} has no area; boxes are (x1, y1, x2, y2) with x1 < x2, y1 < y2")
    if not 0 <= label < num_classes:
        raise DataError(
            f"[LCD-D110] label {label} in {name}, but num_classes is {num_classes}; "
            f"labels run from 0 to {num_classes - 1}"
        )


def _name(target: Target, index: int) -> str:
    return f"image '{target['file_name']}'" if "file_name" in target else f"image {index} of the batch"
