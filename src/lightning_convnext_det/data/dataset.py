"""Datasets of images with boxes, for training and evaluation, and of images alone, for prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_convnext_det.data.annotations import DetectionAnnotations
from lightning_convnext_det.data.batch import Sample, UnreadableImage
from lightning_convnext_det.data.io.pixels import GreyRange
from lightning_convnext_det.data.io.reader import ImageReader
from lightning_convnext_det.data.io.regions import open_regions
from lightning_convnext_det.data.io.video import FrameReader, parse_frame_name
from lightning_convnext_det.data.mosaic import NUM_IMAGES, create_mosaic
from lightning_convnext_det.data.sampler import Key
from lightning_convnext_det.data.seeding import SeededDataset, seeded
from lightning_convnext_det.data.transforms import SampleTransform, transform_sample
from lightning_convnext_det.errors import DataError
from lightning_convnext_det.types import Target


class DetectionDataset(SeededDataset):
    """Map-style dataset of images with boxes, for a split in COCO, Pascal VOC or YOLO format.

    ``dataset[index]`` is an image, uint8 [C, H, W], by default RGB, and a ``Target``: ``boxes`` float32 [N, 4], corners
    (x1, y1, x2, y2) in pixels of that image; ``labels`` int64 [N] from 0; ``image_id``; ``file_name``. For evaluation
    it also has ``iscrowd`` bool [N] and ``area`` float32 [N] in square pixels; for training, crowd boxes are left out.

    >>> from lightning_convnext_det.data.formats.discovery import find_splits, read_split
    >>> from lightning_convnext_det.data.synthetic import write_synthetic_coco
    >>> from tempfile import mkdtemp
    >>> splits = find_splits(write_synthetic_coco(mkdtemp() + "/shapes", num_train=2, num_val=1))
    >>> image, target = DetectionDataset(read_split(splits["train"]), training=True)[0]
    >>> image.dtype, image.shape[0], target["boxes"].shape[1]
    (torch.uint8, 3, 4)

    An index may also be ``(epoch, index)``, or a list of either for a list of samples; an index alone means epoch 0. In
    a pair, an index of N and more, of N images, is a copy of image ``index % N`` with an augmentation of its own.
    The random numbers that the transforms draw depend on seed, epoch and index alone, so the same key gives the same
    sample with any number of workers and ranks. The global generators are left as they were.

    Args:
        annotations: of the split; forked workers share the arrays.
        transforms: augmentation of image and target, for training; None for none.
        training: leave out crowd boxes. Otherwise targets also have ``area`` and ``iscrowd``, or VOC's ``difficult``.
        seed: of the transforms.
        read: decodes the images.
        mosaic: put each image together from crops of four, see `create_mosaic`, in epochs before ``mosaic_epochs``.

    Attributes:
        mosaic_epochs: a number that worker processes share, int64 []; 0 without ``mosaic``.
    """

    def __init__(
        self,
        annotations: DetectionAnnotations,
        transforms: SampleTransform | None = None,
        *,
        training: bool,
        seed: int = 0,
        read: ImageReader = ImageReader(),  # noqa: B008  # frozen
        mosaic: bool = False,
    ) -> None:
        if transforms is not None and not training:
            raise ValueError("transforms are for training: evaluation compares boxes in pixels of the original images")
        self.annotations = annotations
        self.transforms = transforms
        self.training = training
        self.seed = seed
        self.read = read
        self.mosaic_epochs = torch.tensor(torch.iinfo(torch.int64).max if mosaic else 0)
        self.mosaic_epochs.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.annotations)

    def keys(self) -> list[tuple[int, str]]:
        """Id and file name of each image."""
        table = self.annotations
        return [(int(image_id), str(table.path(i))) for i, image_id in enumerate(table.image_ids)]

    @property
    def landscape(self) -> NDArray[np.bool_]:
        """Whether each image is at least as wide as it is high, bool [N]."""
        sizes = self.annotations.sizes
        return sizes[:, 1] >= sizes[:, 0]

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
        epoch, number = key if isinstance(key, tuple) else (0, key)
        index = number % len(self) if isinstance(key, tuple) else number  # a copy, augmented by its own number
        with seeded(self.seed, epoch, number):
            joins = epoch < int(self.mosaic_epochs)
            image, target = self._mosaic(epoch, index) if joins else self._sample(epoch, index)
            return (image, target) if self.transforms is None else transform_sample(self.transforms, image, target)

    def _sample(self, epoch: int, index: int) -> Sample:
        return self._read(epoch, index), self.target(index)

    def _mosaic(self, epoch: int, index: int) -> Sample:
        others = torch.randint(len(self), (NUM_IMAGES - 1,)).tolist()
        return create_mosaic([self._sample(epoch, one) for one in (index, *others)])

    def target(self, index: int) -> Target:
        """The target of an image before transforms; its tensors are copies."""
        table, rows = self.annotations, self.annotations.rows(index)
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
            target["difficult" if table.crowd_is_difficult else "iscrowd"] = crowd
            target["area"] = torch.from_numpy(table.area[rows].copy())
            lists = table.label_lists(index)
            if "negative_labels" in lists:
                target["negative_labels"] = torch.from_numpy(lists["negative_labels"])
            if "not_exhaustive_labels" in lists:
                target["not_exhaustive_labels"] = torch.from_numpy(lists["not_exhaustive_labels"])
        return target

    def _read(self, epoch: int, index: int) -> Tensor:
        """Decode an image and check that it has the size its boxes refer to; uint8 [3, H, W]."""
        table = self.annotations
        path, where = table.path(index), f"(image id {table.image_ids[index]}, epoch {epoch})"
        try:
            image = self.read(path, upright=bool(table.upright[index]))
        except DataError as error:
            raise DataError(f"{error} {where}") from error
        height, width = (int(side) for side in table.sizes[index])
        if image.shape[-2:] != (height, width):
            raise DataError(
                f"[LCD-I020] {path} is {image.shape[-1]}x{image.shape[-2]}, but its boxes refer to {width}x{height} "
                f"{where}; correct the annotation or the image"
            )
        return image


class ImageDataset(SeededDataset):
    """Map-style dataset of images without annotations, for prediction.

    ``dataset[index]`` is an image, uint8 [C, H, W], by default RGB, turned upright by its EXIF orientation, and a
    ``Target`` without boxes; its ``image_id`` counts from 1 in the order of the files. The item of an image that cannot
    be decoded is an ``UnreadableImage``, so that one damaged file does not end a prediction over many.

    Attributes:
        counts: images of this rank's last prediction that were ``read`` and that ``failed``.

    Args:
        files: paths of the images, or frames of videos such as ``clip.mp4#000123``.
        read: decodes the images.
        tile: for a `TiledDetector` with windows of this side: TIFF files with a longer side are a `RegionImage` in
            place of a tensor where rasterio is installed; None decodes all images.
    """

    seed = 0  # nothing is random

    def __init__(
        self,
        files: Sequence[str | Path],
        read: ImageReader = ImageReader(),  # noqa: B008  # frozen
        tile: int | None = None,
    ) -> None:
        self.files = [str(file) for file in files]
        self.read = read
        self.tile = tile
        self.counts = {"read": 0, "failed": 0}
        self._frames = FrameReader()

    def __len__(self) -> int:
        return len(self.files)

    def keys(self) -> list[tuple[int, str]]:
        """Id and file name of each image."""
        return list(enumerate(self.files, 1))

    def __getitem__(self, index: int) -> Sample | UnreadableImage:
        """Read an image; its target has no boxes, ``image_id`` and ``file_name``."""
        file = self.files[index]
        try:
            frame = parse_frame_name(file)
            if frame is None:
                image = self._read(file)
            else:
                image = self._frames.read(*frame, self.read.channels, self.read.max_pixels)
        except DataError as error:
            return UnreadableImage(file, str(error))
        target: Target = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "image_id": index + 1,
            "file_name": file,
        }
        return image, target

    def _read(self, file: str) -> Tensor:
        regions = None
        if self.tile is not None:
            grey = GreyRange(*self.read.value_range, self.read.clip)
            regions = open_regions(file, self.tile, self.read.channels, grey)
        return self.read(file) if regions is None else cast(Tensor, regions.with_overview())  # finds damage now
