"""The check that every detector makes of its targets before they reach code that trusts them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_convnext_det.errors import DataError
from lightning_convnext_det.types import Target


def check_targets(images: Sequence[Tensor], targets: Sequence[Target], num_classes: int) -> None:
    """Refuse boxes and labels that would crash the process or train on nonsense, with the image's name.

    One transfer from the device for the whole batch when all is well.

    Raises:
        DataError: if a box is not finite (roi_align ends in a segmentation fault on it) or has no area, a label is not
            in 0 ... num_classes - 1, or the numbers of boxes and labels differ.
    """
    if len(images) != len(targets):
        raise ValueError(f"got {len(images)} images and {len(targets)} targets; give one target per image")
    for i, target in enumerate(targets):
        if target["boxes"].dim() != 2 or target["boxes"].shape[1] != 4 or target["labels"].dim() != 1:
            shapes = f"boxes {list(target['boxes'].shape)} and labels {list(target['labels'].shape)}"
            raise DataError(f"[LCD-D112] {_name(target, i)}: got {shapes}; expected [N, 4] and [N]")
        if len(target["boxes"]) != len(target["labels"]):
            counts = f"{len(target['boxes'])} boxes but {len(target['labels'])} labels"
            raise DataError(f"[LCD-D112] {_name(target, i)}: {counts}")
    boxes = torch.cat([t["boxes"] for t in targets])
    labels = torch.cat([t["labels"] for t in targets])
    good = boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1) & (labels >= 0) & (labels < num_classes)
    if bool(good.all()):
        return
    for i, target in enumerate(targets):
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            _check_object(box, label, _name(target, i), num_classes)


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
