"""Images and their boxes, one at a time: for training and evaluation from a table, for prediction from files."""

from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import overload

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lightning_convnext_det.data.annotations import DetectionAnnotations
from lightning_convnext_det.data.batch import Sample, UnreadableImage
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.io.listing import image_names, is_image_name
from lightning_convnext_det.data.sampler import Key
from lightning_convnext_det.data.transforms import seeded, transform_sample
from lightning_convnext_det.errors import DataError
from lightning_convnext_det.types import Target


class DetectionDataset(Dataset[Sample]):
    """The images of a table, of whatever format it was read from.

    Indexed by an image's number or by ``(epoch, number)``, or by a list of either for a list of samples. A number
    alone is of epoch 0. What the transforms draw from torch is a function of seed, epoch and number, so the same key
    gives the same sample in any process, with any number of workers; torch's own generator is left as it was.

    Args:
        table: the split; its arrays are shared by worker processes, not copied, where they are forked.
        transforms: torchvision v2 transforms of image and boxes; None for none.
        training: leave crowd boxes out. Otherwise targets also hold ``crowd`` and ``area``.
        seed: of the transforms.
    """

    def __init__(
        self, table: DetectionAnnotations, transforms: v2.Transform | None = None, *, training: bool, seed: int = 0
    ) -> None:
        self.table = table
        self.transforms = transforms
        self.training = training
        self.seed = seed

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, key: int | Key) -> Sample: ...
    @overload
    def __getitem__(self, key: list[int] | list[Key]) -> list[Sample]: ...
    def __getitem__(self, key: int | Key | list[int] | list[Key]) -> Sample | list[Sample]:
        """Read and transform an image, or several.

        Raises:
            DataError: if an image cannot be read or has another size than its boxes refer to.
        """
        if isinstance(key, list):
            return [self[one] for one in key]
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = self._read(epoch, index)
        target = self.target(index)
        if self.transforms is None:
            return image, target
        with seeded(self.seed, epoch, index):
            return transform_sample(self.transforms, image, target)

    def target(self, index: int) -> Target:
        """The objects of an image, before any transform; tensors of its own."""
        table, rows = self.table, self.table.rows(index)
        crowd = torch.from_numpy(table.crowd[rows].copy())
        target: Target = {
            "boxes": torch.from_numpy(table.boxes[rows].copy()),
            "labels": torch.from_numpy(table.labels[rows].copy()),
            "image_id": int(table.image_ids[index]),
            "file_name": str(table.path(index)),
        }
        if self.training:
            if crowd.any():
                target["boxes"], target["labels"] = target["boxes"][~crowd], target["labels"][~crowd]
        else:
            target["crowd"] = crowd
            target["area"] = torch.from_numpy(table.area[rows].copy())
        return target

    def _read(self, epoch: int, index: int) -> Tensor:
        """The image, uint8 [3, H, W], of the size that its boxes refer to."""
        table = self.table
        path, where = table.path(index), f"(image id {table.image_ids[index]}, epoch {epoch})"
        try:
            image = read_image(path, upright=bool(table.upright[index]))
        except DataError as error:
            raise DataError(f"{error} {where}") from error
        height, width = (int(side) for side in table.sizes[index])
        if image.shape[-2:] != (height, width):
            raise DataError(
                f"[LCD-I020] {path} is {image.shape[-1]}x{image.shape[-2]}, but its boxes refer to {width}x{height} "
                f"{where}; correct the annotation or the image"
            )
        return image


class ImageDataset(Dataset[Sample | UnreadableImage]):
    """Images without annotations, numbered from 1 in the order given.

    An image that cannot be read does not end a prediction over many: its item says why instead.

    Args:
        files: the images; turned upright by their EXIF orientation.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.files = [str(file) for file in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample | UnreadableImage:
        """Read an image; its target has no boxes, ``image_id`` and ``file_name``."""
        file = self.files[index]
        try:
            image = read_image(file, upright=True)
        except DataError as error:
            return UnreadableImage(file, str(error))
        target: Target = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "image_id": index + 1,
            "file_name": file,
        }
        return image, target


def find_images(sources: Sequence[str | Path]) -> list[Path]:
    """The files that prediction is asked for, each once.

    Args:
        sources: files, whatever their names; folders, of which the images in them are taken, sorted, but not those in
            folders below; and patterns such as ``photos/**/*.jpg``, of which only images are taken.

    Raises:
        DataError: if a source yields none.
    """
    found: dict[Path, None] = {}
    for source in map(Path, sources):
        if source.is_dir():
            files = [source / name for name in image_names(source)]
        elif source.is_file():
            files = [source]
        else:
            files = [Path(name) for name in sorted(glob(str(source), recursive=True)) if is_image_name(Path(name).name)]
        if not files:
            what = "holds no images itself; for those below it, end it in /**/*" if source.is_dir() else "is not there"
            raise DataError(f"[LCD-P001] {source} {what}")
        found.update(dict.fromkeys(files))
    return list(found)
