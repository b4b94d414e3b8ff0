"""Collation of images and targets into batches, and packing of a batch for its way from a worker to the trainer.

Each tensor sent by a worker costs a file descriptor and about 0.1 ms in the receiving process. A packed batch has three
to five tensors instead of that many per image: a tenth of the time for 16 images, and no trouble with a limit of 256
open files.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_convnext_det.data.io.regions import RegionImage
from lightning_convnext_det.errors import DataError
from lightning_convnext_det.types import Target, image_id_of

Sample = tuple[Tensor, Target]
"""An image [C, H, W], uint8 or float in 0..1, and its target."""
Batch = tuple[list[Tensor], list[Target]]
"""Images of any sizes and one target for each: what detectors take; a `TiledDetector` also takes `RegionImage`."""
_LISTS = ("negative_labels", "not_exhaustive_labels")


class UnreadableImage(NamedTuple):
    """An image that cannot be decoded; prediction skips it."""

    file_name: str
    reason: str


class PackedBatch(NamedTuple):
    """A batch as three to five tensors."""

    pixels: Tensor
    """The pixels of all images, concatenated, [sum of C H W]."""
    channels: int
    sizes: list[tuple[int, int]]
    """Height and width of each image."""
    innermost: list[bool]
    """Whether an image is stored in memory as [H, W, C] (channels last) or as [C, H, W]; packing keeps the layout."""
    counts: list[int]
    """Number of objects in each image."""
    objects: dict[str, Tensor]
    """The tensors of the targets with a row for each object, concatenated over all images."""
    label_lists: dict[str, list[list[int] | None]]
    """LVIS's lists of classes of each image, by name; None for an image without."""
    image_ids: list[int]
    file_names: list[str]
    unreadable: list[UnreadableImage]
    regions: dict[int, RegionImage]
    """Images that have no pixels here, but are read region by region, by their place in the batch."""


def collate(samples: Sequence[Sample]) -> Batch:
    """Collate ``(image, target)`` samples into a list of images and a list of targets, without stacking.

    The ``collate_fn`` for a ``DataLoader`` over any detection dataset whose images differ in size.

    >>> import torch
    >>> target = {"boxes": torch.tensor([[2.0, 2.0, 8.0, 6.0]]), "labels": torch.tensor([0])}
    >>> dataset = [(torch.zeros(3, 16, 24), target), (torch.zeros(3, 20, 12), target)]
    >>> images, targets = next(iter(torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=collate)))
    >>> [tuple(image.shape) for image in images], len(targets)
    ([(3, 16, 24), (3, 20, 12)], 2)
    """
    return [image for image, _ in samples], [target for _, target in samples]


def split_batch(batch: object) -> tuple[list[Tensor], list[Target] | None]:
    """Split a batch of any ``DataLoader`` into its images and its targets.

    >>> images, targets = torch.zeros(2, 3, 8, 8), [{}, {}]
    >>> [len(part) for part in split_batch((images, targets))]
    [2, 2]
    >>> split_batch([(images[0], targets[0])])[1]
    [{}]
    >>> split_batch(images)[1] is None
    True

    Args:
        batch: ``(images, targets)``; a list of ``(image, target)``; or images alone. Images are a list of tensors
            [C, H, W] or one tensor [B, C, H, W].

    Returns:
        The images, and one target for each; None in place of the targets for images alone.

    Raises:
        TypeError: if the batch is something else.
    """
    if isinstance(batch, Tensor):
        return _split_images(batch), None
    if not isinstance(batch, list | tuple):
        raise TypeError(f"a batch is a {type(batch).__name__}; give (images, targets), e.g. by collate_fn=collate")
    if len(batch) == 2 and _are_targets(batch[1]):
        return _split_images(batch[0]), list(batch[1])
    if batch and all(isinstance(one, list | tuple) and len(one) == 2 and _are_targets(one[1:]) for one in batch):
        return [image for image, _ in batch], [target for _, target in batch]
    if len(batch) == 1 and isinstance(batch[0], Tensor) and batch[0].dim() == 4:  # of a TensorDataset
        return _split_images(batch[0]), None
    return _split_images(batch), None


def _are_targets(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, Mapping) for one in value)


def _split_images(images: object) -> list[Tensor]:
    if isinstance(images, Tensor) and images.dim() == 4:
        return list(images)
    if isinstance(images, list | tuple) and all(_is_image(one) for one in images):
        return list(images)
    shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
    raise TypeError(f"the images of a batch are {shape}; give a list of tensors [C, H, W] or a tensor [B, C, H, W]")


def _is_image(value: object) -> bool:
    return isinstance(value, RegionImage) or (isinstance(value, Tensor) and value.dim() == 3)


def pack(samples: Sequence[Sample | UnreadableImage]) -> PackedBatch:
    """Collate samples into a packed batch.

    Raises:
        DataError: if images differ in their number of channels or their dtype.
    """
    every, targets = collate([sample for sample in samples if not isinstance(sample, UnreadableImage)])
    regions = {i: image for i, image in enumerate(cast(list[object], every)) if isinstance(image, RegionImage)}
    kinds = {(image.shape[0], image.dtype): i for i, image in enumerate(every) if i not in regions}
    if len(kinds) > 1:
        found = ", ".join(f"{targets[i]['file_name']}: {kind[0]} channels {kind[1]}" for kind, i in kinds.items())
        raise DataError(f"[LCD-D162] images of one batch differ in channels or dtype: {found}; make them all alike")
    images = [image for i, image in enumerate(every) if i not in regions]
    innermost = [image.permute(1, 2, 0).is_contiguous() for image in images]
    flat = [
        (image.permute(1, 2, 0) if last else image).reshape(-1) for image, last in zip(images, innermost, strict=True)
    ]
    rows = [
        {key: value for key, value in target.items() if isinstance(value, Tensor) and key not in _LISTS}
        for target in targets
    ]
    return PackedBatch(
        pixels=torch.cat(flat or [torch.empty(0, dtype=torch.uint8)]),
        channels=images[0].shape[0] if images else 3,
        sizes=[(image.shape[-2], image.shape[-1]) for image in images],
        innermost=innermost,
        counts=[len(target["boxes"]) for target in targets],
        objects={key: torch.cat([fields[key] for fields in rows]) for key in (rows[0] if rows else ())},
        label_lists={key: _lists(targets, key) for key in _LISTS if any(key in target for target in targets)},
        image_ids=[cast(int, image_id_of(target)) for target in targets],
        file_names=[target["file_name"] for target in targets],
        unreadable=[sample for sample in samples if isinstance(sample, UnreadableImage)],
        regions=regions,
    )


def unpack(batch: PackedBatch) -> Batch:
    """Split a packed batch into images and targets, which are views of its tensors."""
    flat = torch.split(batch.pixels, [batch.channels * height * width for height, width in batch.sizes])
    images = [
        pixels.view(height, width, -1).permute(2, 0, 1) if last else pixels.view(-1, height, width)
        for pixels, (height, width), last in zip(flat, batch.sizes, batch.innermost, strict=True)
    ]
    for place, image in batch.regions.items():  # in ascending order
        images.insert(place, cast(Tensor, image))
    rows = {key: torch.split(values, batch.counts) for key, values in batch.objects.items()}
    targets: list[Target] = []
    for index, (image_id, file_name) in enumerate(zip(batch.image_ids, batch.file_names, strict=True)):
        target: Target = {
            "boxes": rows["boxes"][index],
            "labels": rows["labels"][index],
            "image_id": image_id,
            "file_name": file_name,
        }
        if "iscrowd" in rows:
            target["iscrowd"] = rows["iscrowd"][index]
        if "difficult" in rows:
            target["difficult"] = rows["difficult"][index]
        if "area" in rows:
            target["area"] = rows["area"][index]
        if (negative := _list_of(batch, "negative_labels", index)) is not None:
            target["negative_labels"] = negative
        if (not_exhaustive := _list_of(batch, "not_exhaustive_labels", index)) is not None:
            target["not_exhaustive_labels"] = not_exhaustive
        targets.append(target)
    return images, targets


def _lists(targets: Sequence[Target], key: str) -> list[list[int] | None]:
    values = [target.get(key) for target in targets]
    return [value.tolist() if isinstance(value, Tensor) else None for value in values]


def _list_of(batch: PackedBatch, key: str, index: int) -> Tensor | None:
    values = batch.label_lists[key][index] if key in batch.label_lists else None
    return None if values is None else torch.tensor(values, dtype=torch.int64)
