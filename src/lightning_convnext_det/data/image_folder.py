"""Dataset and LightningDataModule for classification: one folder of images per class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_convnext_det.arguments import (
    Count,
    Factor,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    Range,
    check_arguments,
)
from lightning_convnext_det.data.base_datamodule import LoadingDataModule
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.io.inputs import find_images
from lightning_convnext_det.data.io.listing import image_names
from lightning_convnext_det.data.loader import EvaluationLoader, TrainingLoader
from lightning_convnext_det.data.sampler import Key
from lightning_convnext_det.data.seeding import SeededDataset, seeded
from lightning_convnext_det.errors import DataError

Stage = Literal["train", "val", "test"]
_SPLITS: dict[Stage, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}


class LabeledImage(TypedDict, total=False):
    """An image and its label."""

    image: Tensor
    """uint8 [3, H, W]."""
    label: int
    file_name: str


class ImageFolderDataset(SeededDataset):
    """Map-style dataset of images with labels, or without labels for prediction.

    Indexed by ``index`` or ``(epoch, index)``, or by a list of either. The random numbers that the transform draws
    depend on seed, epoch and index alone.

    Args:
        files: paths of the images, which are turned upright by their EXIF orientation.
        labels: one per image, or None.
        transform: from a Pillow image to uint8 [3, H, W].
        seed: of the transform.
    """

    def __init__(self, files: Sequence[Path], labels: Sequence[int] | None, transform: Any, seed: int = 0) -> None:
        self.files = np.array([str(file) for file in files])
        self.labels = None if labels is None else np.array(labels)
        self.transform = transform  # timm's transforms have no common type
        self.seed = seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | Key | list[int] | list[Key]) -> LabeledImage | list[LabeledImage]:
        """Read and transform an image, or several.

        Raises:
            DataError: if an image cannot be read.
        """
        if isinstance(key, list):
            return [self[one] for one in key]  # type: ignore[misc]  # of one key comes one image
        epoch, index = key if isinstance(key, tuple) else (0, key)
        file = str(self.files[index])
        image = Image.fromarray(read_image(file, upright=True).permute(1, 2, 0).contiguous().numpy())
        with seeded(self.seed, epoch, index):
            sample: LabeledImage = {"image": self.transform(image), "file_name": file}
        if self.labels is not None:
            sample["label"] = int(self.labels[index])
        return sample


class ImageFolderDataModule(LoadingDataModule):
    """LightningDataModule for classification, with one folder of images per class.

    Images are in ``ROOT/train/CLASS/*.jpg``, or in ``ROOT/CLASS/*.jpg`` without splits. A batch is a dict of
    ``images`` uint8 [B, 3, image_size, image_size], ``labels`` int64 [B] (absent in prediction) and ``file_names``.

    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> from PIL import Image
    >>> root = Path(mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (root / "train" / name).mkdir(parents=True)
    ...     for i in range(4):
    ...         Image.new("RGB", (40, 30)).save(root / "train" / name / f"{i}.png")
    >>> data = ImageFolderDataModule(str(root), image_size=32, batch_size=4, num_workers=0, val_fraction=0.25)
    >>> data.class_names
    ['cat', 'dog']
    >>> batch = next(iter(data.train_dataloader()))
    >>> tuple(batch["images"].shape), tuple(batch["labels"].shape)
    ((4, 3, 32, 32), (4,))

    Without a folder ``val``, a part of the training images is held out for validation. Testing uses ``test``, else the
    validation images. timm's transforms augment training images and crop evaluation images.

    Args:
        root: folder of the dataset.
        train: folder of class folders to train on (default: found in ``root``).
        val: folder of class folders to validate on (default: found in ``root``).
        test: folder of class folders to test on (default: found in ``root``).
        predict: images to predict on: a file, a folder, a pattern such as 'photos/*.jpg', or a list of these.
        image_size: side of the images in pixels.
        batch_size: images per batch on each device.
        num_workers: worker processes that read images; 0 reads in the main process.
        scale: smallest and largest area of the random crop, as a fraction of the training image.
        ratio: smallest and largest aspect ratio, width over height, of the random crop.
        horizontal_flip: probability of a horizontal flip in training.
        vertical_flip: probability of a vertical flip in training.
        color_jitter: change brightness, contrast and saturation of training images by up to this factor.
        auto_augment: timm's name of an augmentation policy, e.g. 'rand-m9-mstd0.5-inc1' (default: none).
        crop_pct: side of evaluation's centre crop, as a fraction of the resized image.
        val_fraction: fraction of the training images to hold out where there is no validation split.
        seed: of the order of the images and their augmentation (default: that of ``seed_everything``, or of the
            checkpoint that a training resumes), and of the images held out (default: 0).
        drop_last: leave out the last batch of a training epoch if it is smaller than the others.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        root: str | None = None,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | list[str] | None = None,
        image_size: Count = 224,
        batch_size: Count = 32,
        num_workers: NonNegativeInt = 2,
        scale: tuple[Factor, Factor] = (0.08, 1.0),
        ratio: tuple[Positive, Positive] = (0.75, 4 / 3),
        horizontal_flip: Fraction = 0.5,
        vertical_flip: Fraction = 0.0,
        color_jitter: NonNegative = 0.4,
        auto_augment: str | None = None,
        crop_pct: Factor = 0.875,
        val_fraction: Annotated[float, Range(0, 1, below=True)] = 0.1,
        seed: NonNegativeInt | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(predict, batch_size, num_workers, seed, drop_last)
        check_arguments(ImageFolderDataModule.__init__, locals())
        self.root, self.val_fraction = root, val_fraction
        self.given: dict[Stage, str | None] = {"train": train, "val": val, "test": test}
        self._train_transform = create_transform(
            image_size, is_training=True, scale=scale, ratio=ratio, hflip=horizontal_flip, vflip=vertical_flip,
            color_jitter=color_jitter, auto_augment=auto_augment, interpolation="random", normalize=False,
        )  # fmt: skip
        self._eval_transform = create_transform(image_size, crop_pct=crop_pct, interpolation="bicubic", normalize=False)
        self._splits: dict[Stage, tuple[list[Path], list[int]]] = {}
        self._names: list[str] | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders, sorted."""
        if self._names is None:
            folder = self._folder("train") or self._folder("val") or self._folder("test")
            if folder is None:
                raise DataError("[LCD-D140] data.root is not given: name a folder with one folder per class")
            names = _class_folders(folder)
            if len(names) < 2 and folder == self._folder("train"):
                raise DataError(f"[LCD-D140] {folder} holds fewer than two class folders: {', '.join(names)}")
            self._names = names
        return list(self._names)

    @property
    def category_ids(self) -> list[int]:
        """The labels; folders have no ids of their own."""
        return list(range(len(self.class_names)))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def train_dataloader(self) -> TrainingLoader:
        """Training batches; the position in the epoch is saved in Lightning's checkpoints."""
        files, labels = self._split("train")
        dataset = ImageFolderDataset(files, labels, self._train_transform, self.run_seed())
        return self.training_loader(_TrainingLoader, dataset, np.ones(len(files), np.bool_))

    def val_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        """Each validation image once; an empty list if there are none."""
        files, labels = self._split("val")
        return self._evaluation_loader(files, labels) if files else []

    def test_dataloader(self) -> EvaluationLoader:
        """Each test image once."""
        return self._evaluation_loader(*self._split("test"))

    def predict_dataloader(self) -> EvaluationLoader:
        """Images without labels.

        Raises:
            DataError: if no images are given or found.
        """
        if not self.predict:
            raise DataError("[LCD-P001] data.predict is not given: name an image, a folder or a pattern")
        return self._evaluation_loader(find_images(self.predict), None)

    def _evaluation_loader(self, files: list[Path], labels: list[int] | None) -> EvaluationLoader:
        return self.evaluation_loader(_EvaluationLoader, ImageFolderDataset(files, labels, self._eval_transform))

    def _folder(self, stage: Stage) -> Path | None:
        if (given := self.given[stage]) is not None:
            return _existing(Path(given))
        if self.root is None:
            return None
        root = _existing(Path(self.root))
        found = next((root / name for name in _SPLITS[stage] if (root / name).is_dir()), None)
        if found is None and stage == "train" and not any((root / n).is_dir() for n in sum(_SPLITS.values(), ())):
            return root
        return found

    def _split(self, stage: Stage) -> tuple[list[Path], list[int]]:
        if stage not in self._splits:
            folder = self._folder(stage)
            if folder is not None:
                self._splits[stage] = _read_folder(folder, self.class_names)
                if stage == "train" and self._folder("val") is None:
                    self._hold_out()
            elif stage == "train":
                raise DataError("[LCD-D140] data.root holds no folder 'train' with one folder per class")
            elif stage == "val":
                self._split("train")
            else:
                self._splits["test"] = self._split("val")
        return self._splits[stage]

    def _hold_out(self) -> None:
        files, labels = self._splits["train"]
        order = np.random.default_rng(self.seed or 0).permutation(len(files))
        count = round(self.val_fraction * len(files))
        for stage, rows in (("val", sorted(order[:count])), ("train", sorted(order[count:]))):
            self._splits[stage] = [files[i] for i in rows], [labels[i] for i in rows]  # type: ignore[index]


def _stack(samples: Sequence[LabeledImage]) -> dict[str, Tensor | list[str]]:
    batch: dict[str, Tensor | list[str]] = {
        "images": torch.stack([sample["image"] for sample in samples]),
        "file_names": [sample["file_name"] for sample in samples],
    }
    if samples and "label" in samples[0]:
        batch["labels"] = torch.tensor([sample["label"] for sample in samples])
    return batch


class _EvaluationLoader(EvaluationLoader):
    collate = staticmethod(_stack)
    unpack = staticmethod(lambda batch: batch)  # stacked images need no unpacking

    def __len__(self) -> int:
        return DataLoader.__len__(self)  # there is no batch without images


class _TrainingLoader(TrainingLoader):
    collate = staticmethod(_stack)
    unpack = staticmethod(lambda batch: batch)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"[LCD-D140] {folder}: there is no such folder")
    return folder


def _class_folders(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"[LCD-D140] {folder} holds no class folders")
    return names


def _read_folder(folder: Path, class_names: list[str]) -> tuple[list[Path], list[int]]:
    names = _class_folders(folder)
    if unknown := [name for name in names if name not in class_names]:
        raise DataError(f"[LCD-D140] {folder / unknown[0]} is not a class of the training images")
    files: list[Path] = []
    labels: list[int] = []
    for name in names:
        found = [folder / name / image for image in image_names(folder / name)]
        if not found:
            raise DataError(f"[LCD-D140] {folder / name} holds no images")
        files += found
        labels += [class_names.index(name)] * len(found)
    return files, labels
