"""LightningDataModule for detection datasets in COCO, Pascal VOC or YOLO format, and for datasets of the user's own."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from lightning_convnext_det.arguments import (
    Count,
    Fraction,
    Frequency,
    NonNegative,
    NonNegativeInt,
    Positive,
    Range,
    check_arguments,
)
from lightning_convnext_det.data.annotations import DetectionAnnotations, Format
from lightning_convnext_det.data.base_datamodule import LoadingDataModule
from lightning_convnext_det.data.batch import Batch
from lightning_convnext_det.data.choices import check_choices
from lightning_convnext_det.data.dataset import DetectionDataset, ImageDataset
from lightning_convnext_det.data.formats.cache import cache_folder
from lightning_convnext_det.data.formats.exif_frames import Exif
from lightning_convnext_det.data.formats.problems import InvalidAnnotations
from lightning_convnext_det.data.grey_range import RangeChoice
from lightning_convnext_det.data.io.decode import MAX_PIXELS
from lightning_convnext_det.data.io.inputs import find_images
from lightning_convnext_det.data.io.pixels import WHOLE_RANGE, Channels, GreyRange
from lightning_convnext_det.data.io.reader import SAMPLED, ImageReader
from lightning_convnext_det.data.loader import EvaluationLoader, ImageLoader, TrainingLoader, report_unreadable
from lightning_convnext_det.data.repeat_factors import repeat_factors
from lightning_convnext_det.data.splits import (
    SplitReader,
    Stage,
    check_objects,
    warn_of_shared_images,
    warn_of_unlearned_objects,
)
from lightning_convnext_det.data.transforms import (
    CROP_SIZE,
    MULTISCALE_SIZES,
    RESIZING_PRESETS,
    Preset,
    SampleTransform,
    create_transforms,
)
from lightning_convnext_det.data.user_dataset import UserDataset, UserSplits
from lightning_convnext_det.errors import ArgumentError, DataError

GreyValue = Annotated[int, Range(*WHOLE_RANGE)]


class DetectionDataModule(LoadingDataModule):
    """LightningDataModule for detection datasets in COCO, Pascal VOC or YOLO format.

    A batch is a list of images, uint8 [C, H, W] of any sizes, by default RGB, and a list of targets: ``boxes`` float32
    [N, 4], corners (x1, y1, x2, y2) in pixels of the image; ``labels`` int64 [N] from 0; ``image_id``; ``file_name``.
    For evaluation, targets also have ``iscrowd`` bool [N] and ``area`` float32 [N]; training leaves out crowd boxes.

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

    In prediction of files, ``image_id`` counts from 1, and an unreadable image is skipped with a warning that names it.
    With ``predict_split`` it is the dataset's own id, so that ``predictions.json`` can be evaluated.

    Datasets of your own, as in torchvision's tutorials, are given as ``datasets``; see ``UserDataset`` for their form.

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
        predict: images to predict on: a file, a folder, a pattern such as 'photos/*.jpg', a .txt file with one of these
            in each line, a video (needs PyAV), or a list of these. Frames of a video are named clip.mp4#000123.
        predict_recursive: also predict on what is below the folders.
        predict_split: split to predict on, with the dataset's own image ids, in place of ``predict``.
        datasets: own map-style datasets for ``train``, ``val`` and ``test``, in place of ``root``; no part of ``train``
            is held out for validation. ``train_transforms`` applies to the training dataset after its own transforms.
        batch_size: images per batch on each device.
        num_workers: worker processes that read images; 0 reads in the main process (default: one per core, at most 4).
        train_transforms: augmentation of training images: ``none``; ``flip``: horizontal flip; ``multiscale``: flip,
            resize to one of ``sizes``, in half of the cases after a random crop; ``lsj``: flip, scale by 0.1 to 2, crop
            or pad to a square; ``tiles``: flip, crop to a window of ``crop_size`` at the image's own resolution, in
            which an object counts if 40 % of its area are visible; ``mosaic``: crops of four images in one, but for
            the last tenth of the training, and flip. Or a transform of torchvision v2, or any callable on image and
            target.
        sizes: shorter sides for ``multiscale`` in pixels.
        max_size: largest longer side for ``multiscale`` in pixels.
        crop_size: side of the square for ``lsj`` and of the windows for ``tiles`` in pixels; --tiles sets it.
        scale_range: smallest and largest scale for ``lsj``.
        vertical_flip: also flip vertically with probability 0.5.
        color_jitter: change brightness, contrast and saturation by up to this factor.
        val_fraction: fraction of the training images to hold out where there is no validation split; 0 for none.
        seed: of the order of the images and their augmentation (default: that of ``seed_everything``, or of the
            checkpoint that a training resumes), and of the images held out (default: 0).
        class_names: names of the classes in order of label, where the dataset does not name them, or lacks some
            classes of a trained model (default: those of the dataset).
        classes: names of the classes to use, in order of label (default: all).
        invalid_annotations: annotations that cannot be used: ``auto`` drops those that are harmless to lose and refuses
            the others; ``drop`` drops all; ``refuse`` refuses all.
        in_chans: channels of the images: 1 for grey, 3 for RGB, 4 for RGBA (default: those that the model takes).
        value_range: lowest and highest value of 16-bit grey images, which become 0 and 255; values outside are clipped
            (default: the range that the model was trained with, else the smallest of 8, 10, 12, 14 or 16 bits that
            holds the values of the images).
        max_pixels: larger images are an error.
        exif: whether boxes refer to images turned by their EXIF orientation; ``auto`` goes by the annotated sizes.
        repeat_threshold: repeat images of classes in a smaller share f of the images, sqrt(threshold / f) times
            in an epoch (LVIS: 0.001; default: each image once).
        train_on_difficult: train on objects that VOC marks as difficult.
        cache: folder for checked annotations of large COCO and CVAT files, which the next start maps into memory;
            ``auto`` is ~/.cache/lightning-convnext-det, ``none`` reads and checks the files each time.
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
        predict_recursive: bool = False,
        predict_split: Stage | None = None,
        datasets: dict[Stage, Dataset] | None = None,  # type: ignore[type-arg]  # jsonargparse builds no other
        batch_size: Count = 4,
        num_workers: NonNegativeInt | None = None,
        train_transforms: Preset | SampleTransform = "flip",
        sizes: Sequence[Count] = MULTISCALE_SIZES,
        max_size: Count = 1333,
        crop_size: Count = CROP_SIZE,
        scale_range: tuple[Positive, Positive] = (0.1, 2.0),
        vertical_flip: bool = False,
        color_jitter: NonNegative = 0.0,
        val_fraction: Annotated[float, Range(0, 1, below=True)] = 0.1,
        seed: NonNegativeInt | None = None,
        class_names: list[str] | None = None,
        classes: list[str] | None = None,
        invalid_annotations: InvalidAnnotations = "auto",
        in_chans: Channels | None = None,
        value_range: tuple[GreyValue, GreyValue] | None = None,
        max_pixels: Count = MAX_PIXELS,
        exif: Exif = "auto",
        repeat_threshold: Fraction | None = None,
        train_on_difficult: bool = False,
        cache: str = "auto",
        drop_last: bool = False,
        persistent_workers: bool = True,
        timeout: NonNegative = 300.0,
    ) -> None:
        super().__init__(predict, batch_size, num_workers, seed, drop_last, persistent_workers, timeout)
        check_arguments(DetectionDataModule.__init__, locals())
        check_choices(root, datasets, predict, predict_split, repeat_threshold, class_names, value_range)
        if datasets is not None and train_transforms == "mosaic":
            raise ArgumentError("mosaic joins images of a folder; give root, not datasets")
        self.repeat_threshold = repeat_threshold
        self.train_transforms = train_transforms
        self.predict_split, self.predict_recursive = predict_split, predict_recursive
        self.in_chans, self.value_range, self.max_pixels = in_chans, value_range, max_pixels
        self._range = RangeChoice(value_range)
        self._num_images = {"read": 0, "failed": 0}  # of this rank's prediction
        self._num_files = 0  # of all ranks'
        self._transforms = create_transforms(
            train_transforms, sizes, max_size, crop_size, scale_range, vertical_flip, color_jitter
        )
        self._user = None if datasets is None else UserSplits(datasets, class_names)
        # the seed is not the run's: `validate` must hold out the images that `fit` did
        self.split_reader = SplitReader(
            root=root, format=format, wanted={"train": train, "val": val, "test": test},
            images={"train": train_images, "val": val_images, "test": test_images}, val_fraction=val_fraction,
            seed=seed or 0, class_names=class_names, classes=classes, invalid_annotations=invalid_annotations,
            exif=exif, max_pixels=max_pixels, train_on_difficult=train_on_difficult, cache=cache_folder(cache),
        )  # fmt: skip

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in order of label; reads the training split if no split has been read yet."""
        return list((self._user or self.split_reader).class_table()[0])

    @property
    def category_ids(self) -> list[int]:
        """The dataset's category ids, in order of label."""
        return list((self._user or self.split_reader).class_table()[1])

    @property
    def frequencies(self) -> list[Frequency]:
        """LVIS's frequency of each class in the training images, in order of label; empty for other datasets."""
        return self.split_reader.frequencies() if self._user is None else []

    @property
    def num_classes(self) -> int:
        """Number of classes, without background."""
        return len(self.class_names)

    @property
    def resizes(self) -> bool:
        """Whether a preset sets the final size of training images; the detector then does not resize them."""
        return self.train_transforms in RESIZING_PRESETS

    @property
    def owns_datasets(self) -> bool:
        """Whether ``datasets`` were given in place of a folder."""
        return self._user is not None

    @property
    def validates(self) -> bool:
        """Whether there are validation images; reads the split."""
        return self._dataset("val", training=False) is not None

    def annotations(self, stage: Stage) -> DetectionAnnotations | None:
        """The annotations of a stage; None if validation is switched off.

        Raises:
            DataError: if the split is missing or cannot be used.
        """
        return self.split_reader.annotations(stage)

    def take_splits(self, other: "DetectionDataModule") -> None:
        """Take the splits that a data module of the same arguments has read."""
        self.split_reader = other.split_reader

    def setup(self, stage: str) -> None:
        """Read the splits of a stage, so that all problems are reported before the first step.

        Raises:
            DataError: if a split is missing, empty, or cannot be used.
        """
        needed: dict[str, tuple[Stage, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        found = [self._dataset(one, training=False) for one in needed.get(stage, ())]
        if stage == "validate" and found == [None]:
            raise DataError("[LCD-D131] there is no validation split, and val_fraction is 0; set data.val")
        if stage == "fit" and self._user is None:
            train, val = self.annotations("train"), self.annotations("val")
            assert train is not None
            check_objects(train)
            if val is not None:
                warn_of_shared_images(train, val)
                warn_of_unlearned_objects(train, val)

    def train_dataloader(self) -> TrainingLoader:
        """Training batches grouped by orientation; the position in the epoch is saved in Lightning's checkpoints."""
        dataset = self._dataset("train", training=True)
        assert dataset is not None
        factors = None
        if isinstance(dataset, DetectionDataset):
            self.check_shared_memory(int(dataset.annotations.sizes.prod(axis=1).mean()))
            if self.repeat_threshold:
                factors = repeat_factors(dataset.annotations, self.repeat_threshold)
        loader = self.training_loader(TrainingLoader, dataset, dataset.landscape, factors)
        if self.train_transforms == "mosaic":
            loader.before_epoch = self._close_mosaics
        return loader

    def val_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        """Validation batches of this rank, over all ranks each image once; an empty list without validation."""
        dataset = self._dataset("val", training=False)
        return [] if dataset is None else self.evaluation_loader(EvaluationLoader, dataset)

    def test_dataloader(self) -> EvaluationLoader:
        """Test batches of this rank, over all ranks each image once."""
        dataset = self._dataset("test", training=False)
        assert dataset is not None
        return self.evaluation_loader(EvaluationLoader, dataset)

    def predict_dataloader(self) -> EvaluationLoader:
        """Images of ``predict``, whose ``image_id`` counts from 1, or of ``predict_split`` with the dataset's ids.

        Raises:
            DataError: if no images are given or found.
        """
        if self.predict_split is not None:
            dataset = self._dataset(self.predict_split, training=False)
            if dataset is None:
                raise DataError("[LCD-D131] there is no validation split, and val_fraction is 0; set data.val")
            return self.evaluation_loader(EvaluationLoader, dataset)
        if not self.predict:
            raise DataError(
                "[LCD-P001] data.predict is not given: name an image, a folder or a pattern, or a split in "
                "data.predict_split"
            )
        files = find_images(self.predict, self.predict_recursive, videos=True)
        rank_zero_info(f"{len(files)} images; image_id counts from 1 (data.predict_split keeps the ids of a dataset)")
        module = getattr(self.trainer, "lightning_module", None)
        tile = getattr(getattr(module, "inference_detector", None), "tile", None)  # of a TiledDetector
        images = ImageDataset(files, self._image_reader(files), tile)
        self._num_files = len(files)
        self._num_images = images.counts
        return self.evaluation_loader(ImageLoader, images)

    def teardown(self, stage: str) -> None:
        """Report images that could not be read, on all ranks together.

        Raises:
            DataError: on every rank, if no image could be read.
        """
        if stage != "predict" or self.trainer is None or self.trainer.world_size == 1:
            return  # one rank's loader has reported them
        counts = torch.tensor(list(self._num_images.values()), device=self.trainer.strategy.root_device)
        num_read, num_failed = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if num_read or num_failed == self._num_files:  # else an earlier prediction has read the others
            report_unreadable(num_read, num_failed)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch to a device; the detector moves it to XLA, which would recompile for each image size."""
        if device.type == "xla":
            return batch
        return cast(Batch, super().transfer_batch_to_device(batch, device, dataloader_idx))

    def state_dict(self) -> dict[str, list[int]]:
        """The range of values of 16-bit grey images; empty for others."""
        return {} if self._range.current is None else {"value_range": list(self._range.current)}

    def load_state_dict(self, state_dict: dict[str, list[int]]) -> None:
        """Take the range of values that a model was trained with."""
        low, high, *clip = state_dict["value_range"]
        self._range.take(GreyRange(low, high, bool(clip and clip[0])))

    def _dataset(self, stage: Stage, training: bool) -> DetectionDataset | UserDataset | None:
        """The dataset of a stage; None if validation is switched off."""
        transforms, seed = (self._transforms, self.run_seed()) if training else (None, 0)
        if self._user is not None:
            return self._user.dataset(stage, transforms, training, seed)
        annotations = self.annotations(stage)
        if annotations is None:
            return None
        step = max(1, len(annotations) // SAMPLED)
        reader = self._image_reader([annotations.path(index) for index in range(0, len(annotations), step)])
        mosaic = training and self.train_transforms == "mosaic"
        return DetectionDataset(annotations, transforms, training=training, seed=seed, read=reader, mosaic=mosaic)

    def _close_mosaics(self, loader: TrainingLoader) -> None:
        """End mosaics a tenth of the epochs, and at least one, before the training, as far as its length is known."""
        if self.trainer is None:
            return
        steps = self.trainer.max_steps * self.trainer.accumulate_grad_batches / len(loader)
        ends = [length for length in (self.trainer.max_epochs or 0, math.ceil(steps)) if length > 0]
        if ends:
            cast(DetectionDataset, loader.dataset).mosaic_epochs.fill_(min(ends) - max(1, round(min(ends) / 10)))

    def _image_reader(self, paths: Sequence[Path]) -> ImageReader:
        """Reads images with the channels that the model takes, and 16-bit grey by its range of values."""
        module = getattr(self.trainer, "lightning_module", None)
        channels = cast(Channels, self.in_chans or getattr(module, "in_chans", 3))
        if channels not in get_args(Channels):
            raise ArgumentError(
                f"the model takes {channels} channels; images have 1, 3 or 4: give data.datasets of your own"
            )
        self._range.take(getattr(module, "grey_range", None))
        self._range.find(paths)
        chosen = self._range.current
        if module is not None and self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            module.grey_range = chosen  # its checkpoints hold it: prediction reads other images alike
        low, high, clip = chosen or GreyRange(*WHOLE_RANGE, clip=False)
        return ImageReader(channels, (low, high), clip, self.max_pixels)
