"""LightningDataModule for detection datasets in COCO, Pascal VOC or YOLO format."""

import logging
import os
import shutil
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar, cast

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset, Sampler

from lightning_convnext_det.arguments import Count, NonNegative, NonNegativeInt, Positive, Range, check_arguments
from lightning_convnext_det.data.annotations import DetectionAnnotations, Format
from lightning_convnext_det.data.batch import Batch, pack
from lightning_convnext_det.data.dataset import DetectionDataset, ImageDataset, find_images
from lightning_convnext_det.data.formats.exif_frames import Exif
from lightning_convnext_det.data.formats.records import InvalidAnnotations
from lightning_convnext_det.data.loader import EvaluationLoader, ImageLoader, TrainingLoader, outlast_signals
from lightning_convnext_det.data.sampler import EvaluationSampler, Key, TrainingBatchSampler
from lightning_convnext_det.data.splits import SplitReader, warn_of_shared_images
from lightning_convnext_det.data.transforms import MULTISCALE_SIZES, RESIZING_PRESETS, Preset, create_transforms
from lightning_convnext_det.errors import DataError

_logger = logging.getLogger(__name__)
_Loader = TypeVar("_Loader", TrainingLoader, EvaluationLoader, ImageLoader)
PREFETCH = 2  # batches per worker: torch's default


class DetectionDataModule(LightningDataModule):
    """LightningDataModule for detection datasets in COCO, Pascal VOC or YOLO format.

    A batch is a list of images, uint8 RGB [3, H, W] of any sizes, and a list of targets: ``boxes`` float32 [N, 4],
    corners (x1, y1, x2, y2) in pixels of the image; ``labels`` int64 [N] from 0; ``image_id``; ``file_name``. For
    evaluation targets also have ``iscrowd`` bool [N] and ``area`` float32 [N]; crowd boxes are left out of training.

    >>> from tempfile import mkdtemp
    >>> from lightning_convnext_det.data.synthetic import write_synthetic_coco
    >>> root = write_synthetic_coco(mkdtemp() + "/shapes", num_train=4, num_val=2)
    >>> data = DetectionDataModule(str(root), batch_size=2, num_workers=0)
    >>> data.class_names
    ['disc', 'ring', 'square', 'triangle', 'star']
    >>> images, targets = next(iter(data.train_dataloader()))
    >>> len(images), images[0].dtype, targets[0]["boxes"].shape[1]
    (2, torch.uint8, 4)

    Format and splits are found from the files. Validation uses the split ``val``; without one, and when training on
    ``trainval``, a part of the training images is held out. Testing uses ``test``, else the validation images. A split
    is read when it is first needed, and once.

    In prediction, ``image_id`` counts from 1, and an unreadable image is skipped with a warning that names it.

    Args:
        root: folder of the dataset.
        format: of the annotations; ``auto`` finds out.
        train: split to train on (default: train), or the path of a COCO file or of a folder with VOC's XML, written
            ./NAME where a split has the same name.
        val: split to validate on (default: val), or such a path.
        test: split to test on (default: test), or such a path.
        train_images: folder of the images when ``train`` is a path (default: looked for around it).
        val_images: folder of the images when ``val`` is a path (default: looked for around it).
        test_images: folder of the images when ``test`` is a path (default: looked for around it).
        predict: images to predict on: a file, a folder, a pattern such as 'photos/*.jpg', or a list of these.
        batch_size: images per batch on each device.
        num_workers: worker processes that read images; 0 reads in the main process (default: one per core, at most 4).
        train_transforms: augmentation of training images: ``none``; ``flip``: horizontal flip; ``multiscale``: flip,
            resize to one of ``sizes``, in half of the cases after a random crop; ``lsj``: flip, scale by 0.1 to 2, crop
            or pad to a square.
        sizes: shorter sides for ``multiscale`` in pixels.
        max_size: largest longer side for ``multiscale`` in pixels.
        crop_size: side of the square for ``lsj`` in pixels.
        scale_range: smallest and largest scale for ``lsj``.
        vertical_flip: also flip vertically with probability 0.5.
        color_jitter: change brightness, contrast and saturation by up to this factor.
        val_fraction: fraction of the training images to hold out where there is no validation split; 0 for none.
        seed: of the order of the images, their augmentation, and the images held out.
        class_names: names of the classes in order of label, where the dataset does not name them, or lacks some
            classes of a trained model (default: those of the dataset).
        classes: names of the classes to use, in order of label (default: all).
        invalid_annotations: annotations that cannot be used: ``auto`` drops those that are harmless to lose and refuses
            the others; ``drop`` drops all; ``refuse`` refuses all.
        exif: whether boxes refer to images turned by their EXIF orientation; ``auto`` goes by the annotated sizes.
        train_on_difficult: train on objects that VOC marks as difficult.
        drop_last: leave out the last batch of a training epoch if it is smaller than the others.
        persistent_workers: keep the worker processes from one epoch to the next.
        timeout: seconds to wait for a batch from a worker; 0 waits without limit.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        root: str | None = None,
        format: Literal["auto"] | Format = "auto",
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        train_images: str | None = None,
        val_images: str | None = None,
        test_images: str | None = None,
        predict: str | list[str] | None = None,
        batch_size: Count = 4,
        num_workers: NonNegativeInt | None = None,
        train_transforms: Preset = "flip",
        sizes: Sequence[Count] = MULTISCALE_SIZES,
        max_size: Count = 1333,
        crop_size: Count = 1024,
        scale_range: tuple[Positive, Positive] = (0.1, 2.0),
        vertical_flip: bool = False,
        color_jitter: NonNegative = 0.0,
        val_fraction: Annotated[float, Range(0, 1, below=True)] = 0.1,
        seed: NonNegativeInt = 0,
        class_names: list[str] | None = None,
        classes: list[str] | None = None,
        invalid_annotations: InvalidAnnotations = "auto",
        exif: Exif = "auto",
        train_on_difficult: bool = False,
        drop_last: bool = False,
        persistent_workers: bool = True,
        timeout: NonNegative = 300.0,
    ) -> None:
        super().__init__()
        check_arguments(DetectionDataModule.__init__, locals())
        self.batch_size = batch_size
        self.num_workers = min(4, _available_cores()) if num_workers is None else num_workers
        self.train_transforms = train_transforms
        self.predict = [predict] if isinstance(predict, str) else predict
        self.seed = seed
        self.drop_last = drop_last
        self.persistent_workers = persistent_workers
        self.timeout = timeout
        self.allow_zero_length_dataloader_with_multiple_devices = True  # evaluation of fewer images than devices
        self._transforms = create_transforms(
            train_transforms, sizes, max_size, crop_size, scale_range, vertical_flip, color_jitter
        )
        self._reader = SplitReader(
            root=root,
            format=format,
            wanted={"train": train, "val": val, "test": test},
            images={"train": train_images, "val": val_images, "test": test_images},
            val_fraction=val_fraction,
            seed=seed,
            class_names=class_names,
            classes=classes,
            invalid_annotations=invalid_annotations,
            exif=exif,
            train_on_difficult=train_on_difficult,
        )

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in order of label; reads the training split if no split has been read yet."""
        return list(self._reader.class_table()[0])

    @property
    def category_ids(self) -> list[int]:
        """The dataset's category ids, in order of label."""
        return list(self._reader.class_table()[1])

    @property
    def num_classes(self) -> int:
        """Number of classes, without background."""
        return len(self._reader.class_table()[0])

    @property
    def resizes(self) -> bool:
        """Whether the transforms set the final size of training images; the detector then does not resize them."""
        return self.train_transforms in RESIZING_PRESETS

    def annotations(self, stage: Literal["train", "val", "test"]) -> DetectionAnnotations | None:
        """The annotations of a stage; None if validation is switched off.

        Raises:
            DataError: if the split is missing or cannot be used.
        """
        return self._reader.annotations(stage)

    def setup(self, stage: str) -> None:
        """Read the splits of a stage, so that all problems are reported before the first step.

        Raises:
            DataError: if a split is missing, empty, or cannot be used.
        """
        if stage == "fit":
            train, val = self.annotations("train"), self.annotations("val")
            assert train is not None
            if train.crowd.all():
                raise DataError(f"[LCD-D134] the training images in {train.image_root} have no boxes to learn from")
            if val is not None:
                warn_of_shared_images(train, val)
        elif stage == "validate":
            if self.annotations("val") is None:
                raise DataError("[LCD-D131] there is no validation split, and val_fraction is 0; set data.val")
        elif stage == "test":
            self.annotations("test")

    def train_dataloader(self) -> TrainingLoader:
        """Training batches grouped by orientation; the position in the epoch is saved in Lightning's checkpoints."""
        table = self.annotations("train")
        assert table is not None
        num_replicas, rank = self._replicas()
        batches = TrainingBatchSampler(
            table.sizes[:, 1] >= table.sizes[:, 0],
            self.batch_size,
            self.seed,
            shuffle=not getattr(self.trainer, "overfit_batches", 0),  # overfitting needs the same batches in each epoch
            drop_last=self.drop_last,
            num_replicas=num_replicas,
            rank=rank,
        )
        dataset = DetectionDataset(table, self._transforms, training=True, seed=self.seed)
        self._check_shared_memory(int(table.sizes.prod(axis=1).mean()))
        return self._loader(TrainingLoader, dataset, batches, None)

    def val_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        """Validation batches of this rank, over all ranks each image once; an empty list without validation."""
        table = self.annotations("val")
        return [] if table is None else self._evaluation_loader(table)

    def test_dataloader(self) -> EvaluationLoader:
        """Test batches of this rank, over all ranks each image once."""
        table = self.annotations("test")
        assert table is not None
        return self._evaluation_loader(table)

    def predict_dataloader(self) -> ImageLoader:
        """Images without boxes; targets have ``file_name`` and ``image_id``, which counts from 1.

        Raises:
            DataError: if no images are given or found.
        """
        if not self.predict:
            raise DataError("[LCD-P001] data.predict is not given: name an image, a folder or a pattern")
        files = find_images(self.predict)
        sampler = EvaluationSampler(len(files), *self._replicas())
        return self._loader(ImageLoader, ImageDataset(files), sampler, self.batch_size)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch to a device; the detector moves it to XLA, which would recompile for each image size."""
        if device.type == "xla":
            return batch
        return cast(Batch, super().transfer_batch_to_device(batch, device, dataloader_idx))

    def _evaluation_loader(self, table: DetectionAnnotations) -> EvaluationLoader:
        dataset = DetectionDataset(table, training=False)
        sampler = EvaluationSampler(len(table), *self._replicas())
        return self._loader(EvaluationLoader, dataset, sampler, self.batch_size)

    def _loader(
        self,
        kind: type[_Loader],
        dataset: Dataset[object],
        sampler: Sampler[int] | Sampler[list[Key]],
        batch_size: int | None,
    ) -> _Loader:
        """Create a loader with the options that all have in common."""
        return kind(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=pack,
            worker_init_fn=outlast_signals,
            num_workers=self.num_workers,
            pin_memory=self._on_cuda(),
            timeout=self.timeout if self.num_workers else 0,
            persistent_workers=self.persistent_workers and self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # else each iterator would draw from the global one
        )

    def _replicas(self) -> tuple[int, int]:
        """Number of ranks, and the rank of this process."""
        if self.trainer is not None:
            return self.trainer.world_size, self.trainer.global_rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0

    def _on_cuda(self) -> bool:
        if self.trainer is not None:
            return self.trainer.strategy.root_device.type == "cuda"
        return torch.cuda.is_available()

    def _check_shared_memory(self, pixels: int) -> None:
        """Warn before workers die of a bus error for lack of shared memory, as in a container with 64 MB."""
        if self.num_workers == 0 or not os.path.isdir("/dev/shm"):
            return
        needed = 3 * pixels * self.batch_size * self.num_workers * PREFETCH
        free = shutil.disk_usage("/dev/shm").free
        if needed > free:
            _logger.warning(
                "[LCD-R001] batches on their way from %d workers need about %d MB of /dev/shm, which has %d MB free: "
                "lower num_workers or batch_size, or start the container with a larger --shm-size",
                self.num_workers, needed >> 20, free >> 20,
            )  # fmt: skip


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
