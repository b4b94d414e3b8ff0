"""Batches, and the few tensors that they travel in from a worker to the training process.

Each tensor that a worker sends costs a file descriptor and about 0.1 ms in the process that receives it. Three to five
tensors per batch, instead of as many per image, take a tenth of that process's time for 16 images, and fit under a
limit of 256 open files.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_convnext_det.types import Target

Sample = tuple[Tensor, Target]
"""An image, uint8 [3, H, W], and its objects."""
Batch = tuple[list[Tensor], list[Target]]
"""What detectors take: images of any sizes, and as many targets."""


class UnreadableImage(NamedTuple):
    """An image that prediction leaves out."""

    file_name: str
    reason: str


class PackedBatch(NamedTuple):
    """A batch as few tensors."""

    pixels: Tensor
    """All images one after the other, uint8 [sum of 3 H W]."""
    sizes: list[tuple[int, int]]
    """Height and width of each image."""
    innermost: list[bool]
    """Whether an image lies in memory as [H, W, 3], as decoded and resized, or as [3, H, W]; no copy changes it."""
    counts: list[int]
    """How many objects each image has."""
    objects: dict[str, Tensor]
    """The fields of a target that have a row per object, for the objects of all images."""
    image_ids: list[int]
    file_names: list[str]
    unreadable: list[UnreadableImage]


def collate(samples: Sequence[Sample]) -> Batch:
    """Turn samples into a list of images and a list of targets; nothing is stacked, for sizes differ."""
    return [image for image, _ in samples], [target for _, target in samples]


def pack(samples: Sequence[Sample | UnreadableImage]) -> PackedBatch:
    """Turn the samples of a dataset of this package into few tensors."""
    images, targets = collate([sample for sample in samples if not isinstance(sample, UnreadableImage)])
    innermost = [image.permute(1, 2, 0).is_contiguous() for image in images]
    flat = [
        (image.permute(1, 2, 0) if last else image).reshape(-1) for image, last in zip(images, innermost, strict=True)
    ]
    rows = [{key: value for key, value in target.items() if isinstance(value, Tensor)} for target in targets]
    return PackedBatch(
        pixels=torch.cat(flat or [torch.empty(0, dtype=torch.uint8)]),
        sizes=[(image.shape[-2], image.shape[-1]) for image in images],
        innermost=innermost,
        counts=[len(target["boxes"]) for target in targets],
        objects={key: torch.cat([fields[key] for fields in rows]) for key in (rows[0] if rows else ())},
        image_ids=[target["image_id"] for target in targets],
        file_names=[target["file_name"] for target in targets],
        unreadable=[sample for sample in samples if isinstance(sample, UnreadableImage)],
    )


def unpack(batch: PackedBatch) -> Batch:
    """Turn a packed batch into images and targets, which are views of its tensors."""
    flat = torch.split(batch.pixels, [3 * height * width for height, width in batch.sizes])
    images = [
        pixels.view(height, width, 3).permute(2, 0, 1) if last else pixels.view(3, height, width)
        for pixels, (height, width), last in zip(flat, batch.sizes, batch.innermost, strict=True)
    ]
    rows = {key: torch.split(values, batch.counts) for key, values in batch.objects.items()}
    targets: list[Target] = []
    for index, (image_id, file_name) in enumerate(zip(batch.image_ids, batch.file_names, strict=True)):
        target: Target = {
            "boxes": rows["boxes"][index],
            "labels": rows["labels"][index],
            "image_id": image_id,
            "file_name": file_name,
        }
        if "crowd" in rows:
            target["crowd"] = rows["crowd"][index]
        if "area" in rows:
            target["area"] = rows["area"][index]
        targets.append(target)
    return images, targets
