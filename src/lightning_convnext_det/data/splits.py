"""Find and read the training, validation and test splits of a dataset, each when it is first needed."""

import logging
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from lightning_convnext_det.arguments import Frequency
from lightning_convnext_det.data.annotations import DetectionAnnotations, Format, Split, canonical_split
from lightning_convnext_det.data.formats.cache import read_cached_split
from lightning_convnext_det.data.formats.discovery import compare_classes, compare_objects, find_splits, make_split
from lightning_convnext_det.data.formats.exif_frames import Exif
from lightning_convnext_det.data.formats.problems import InvalidAnnotations, summarize_problems
from lightning_convnext_det.data.io.decode import MAX_PIXELS
from lightning_convnext_det.data.io.listing import list_names
from lightning_convnext_det.data.subset import count_shared, select_classes, split_randomly, take_images
from lightning_convnext_det.errors import DataError

Stage = Literal["train", "val", "test"]
STAGES: tuple[Stage, ...] = ("train", "val", "test")
_DEFAULTS: dict[Stage, tuple[str, ...]] = {"train": ("train", "trainval"), "val": ("val",), "test": ("test",)}

_warn = rank_zero_only(logging.getLogger(__name__).warning)


class SplitReader:
    """Finds the splits of a dataset and reads each at most once.

    All splits must have the classes of the training split, or of the first split found. Without a validation split, or
    when training on ``trainval``, a random part of the training images is held out for validation; without a test
    split, testing uses the validation images.

    Args:
        root: folder of the dataset; None if ``wanted`` gives paths only.
        format: of the folder, or ``auto``.
        wanted: for each stage the name of a split, the path of a COCO file or of a folder with VOC's XML, or None for
            the usual name. A split wins over a folder of the same name; ./NAME means the folder.
        images: for each stage the folder of images for such a path, or None to look around it.
        val_fraction: fraction of the training images to hold out; 0 for no validation.
        seed: of that random choice.
        class_names: the names of the classes in order of label; None for those of the dataset.
        classes: names of the classes to use, in order of label; None for all.
        invalid_annotations: whether to drop or refuse annotations that cannot be used.
        exif: whether boxes refer to images turned by their EXIF orientation.
        train_on_difficult: train on VOC's difficult objects like any other.
        max_pixels: larger images are refused.
        cache: folder of cached annotations; None reads them from their files each time.
    """

    def __init__(
        self,
        root: str | None,
        format: Literal["auto"] | Format,
        wanted: Mapping[Stage, str | None],
        images: Mapping[Stage, str | None],
        val_fraction: float,
        seed: int,
        class_names: Sequence[str] | None,
        classes: Sequence[str] | None,
        invalid_annotations: InvalidAnnotations,
        exif: Exif,
        train_on_difficult: bool,
        max_pixels: int = MAX_PIXELS,
        cache: Path | None = None,
    ) -> None:
        self.root = root
        self.format = format
        self.wanted = wanted
        self.images = images
        self.val_fraction = val_fraction
        self.seed = seed
        self.class_names = class_names
        self.classes = classes
        self.invalid_annotations = invalid_annotations
        self.exif = exif
        self.train_on_difficult = train_on_difficult
        self.max_pixels = max_pixels
        self.cache = cache
        self._found: dict[str, Split] | None = None
        self._first: tuple[str, DetectionAnnotations] | None = None  # the split that names the classes, without images
        self._tables: dict[Stage, DetectionAnnotations | None] = {}

    def class_table(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return class names and the dataset's category ids, both in order of label.

        Raises:
            DataError: if no split is given, or it cannot be read.
        """
        table = self.annotations(self._first_stage())
        assert table is not None
        return table.class_names, table.category_ids

    def frequencies(self) -> list[Frequency]:
        """Return LVIS's frequency of each class, in order of label; empty for other datasets."""
        table = self.annotations(self._first_stage())
        return list(table.federated.frequencies) if table is not None and table.federated is not None else []

    def annotations(self, stage: Stage) -> DetectionAnnotations | None:
        """Return the annotations of a stage; None if validation is switched off.

        Raises:
            DataError: if there is no such split, it cannot be used, or its classes are not those of training.
        """
        if stage not in self._tables:
            for needed in (self._first_stage(), stage):
                if needed not in self._tables:
                    self._tables.update(self._read_stage(needed))
        return self._tables[stage]

    def _first_stage(self) -> Stage:
        """Return the stage whose split defines the classes."""
        for stage in STAGES:
            if self._locate(stage):
                return stage
        if self.root is None:
            raise DataError(
                "[LCD-D130] no annotated images are given, so their classes are not known; "
                "set data.root to the folder of a dataset, or data.train to a COCO file"
            )
        raise DataError(f"[LCD-D131] there is no train split: {self._place()}; set data.train to one of them")

    def _read_stage(self, stage: Stage) -> dict[Stage, DetectionAnnotations | None]:
        """Read the split of a stage; training and validation together if validation images are held out."""
        split = self._locate(stage)
        if stage == "train" and self._holds_out():
            return self._read_and_hold_out()
        if split:
            return {stage: self._read(split, training=stage == "train")}
        if stage == "val" and self._locate("train"):
            return {stage: None}
        if stage == "test" and (val := self.annotations("val")):
            _warn("no test split in %s: testing on the %d validation images", self.root, len(val))
            return {stage: val}
        raise DataError(f"[LCD-D131] there is no {stage} split: {self._place()}; set data.{stage}")

    def _holds_out(self) -> bool:
        """Tell whether validation images are held out of the training split."""
        train = self._locate("train")
        if train is None or self.wanted["val"] is not None or self.val_fraction == 0:
            return False
        return self._locate("val") is None or canonical_split(train.name) == "trainval"

    def _read_and_hold_out(self) -> dict[Stage, DetectionAnnotations | None]:
        split = self._locate("train")
        assert split is not None
        table = self._read(split, training=False)
        remaining, held_out = split_randomly(table, self.val_fraction, self.seed)
        _warn(
            "%d of the %d images of '%s' are held out for validation (val_fraction %g, seed %d)",
            len(held_out), len(table), split.name, self.val_fraction, self.seed,
        )  # fmt: skip
        train = self._read(split, training=True) if self.train_on_difficult else table
        return {"train": take_images(train, remaining), "val": take_images(table, held_out)}

    def _read(self, split: Split, training: bool) -> DetectionAnnotations:
        """Read a split, log its problems, and select the classes."""
        table = read_cached_split(
            split,
            self.cache,
            class_names=self._first[1].class_names if self._first else self.class_names,
            invalid_annotations=self.invalid_annotations,
            train_on_difficult=training and self.train_on_difficult,
            exif=self.exif,
            max_pixels=self.max_pixels,
        )
        for line in summarize_problems(table.problems):
            _warn("%s: %s", split.name, line)
        self._first = self._first or (split.name, take_images(table, np.array([], np.int64)))
        for problem in compare_classes(dict([self._first, (split.name, table)])):
            raise DataError(str(problem).removesuffix(" (refused)"))
        return table if self.classes is None else select_classes(table, self.classes)

    def _locate(self, stage: Stage) -> Split | None:
        """Find the files of a stage; None if no split has a usual name."""
        wanted = self.wanted[stage]
        if wanted is not None and self._is_path(wanted):
            images = self.images[stage]
            return make_split(self._path(wanted), None if images is None else self._path(images), stage)
        if self.images[stage] is not None:
            raise DataError(
                f"[LCD-D132] data.{stage}_images is given without a path in data.{stage}; "
                "name the COCO file or the folder of VOC's XML there"
            )
        if wanted is None and self.root is None:
            return None
        found = self._splits()
        names = _DEFAULTS[stage] if wanted is None else (wanted, canonical_split(wanted))
        for name in names:
            if name in found:
                return found[name]
        if wanted is None:
            return next(iter(found.values())) if stage == "train" and len(found) == 1 else None
        close = get_close_matches(wanted, found, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise DataError(f"[LCD-D131] data.{stage}: there is no split '{wanted}': {self._place()}{hint}")

    def _is_path(self, wanted: str) -> bool:
        """Tell whether this is a path; a split of the dataset wins over a folder of XML with the same name."""
        if wanted.endswith(".json") or os.sep in wanted:
            return True
        if not list_names(self._path(wanted), ".xml"):
            return False
        try:
            named = self._splits() if self.root else {}
        except DataError:  # a root of no known layout, whose parts are given one by one
            named = {}
        return wanted not in named and canonical_split(wanted) not in named

    def _path(self, given: str) -> Path:
        """Resolve a path: as given, or below the root if it exists only there."""
        path = Path(given)
        return path if path.exists() or not self.root else Path(self.root, path)

    def _splits(self) -> dict[str, Split]:
        """Find the splits below the root, once."""
        if self.root is None:
            raise DataError("[LCD-D130] data.root is not given; a split can be named only in the folder of a dataset")
        if self._found is None:
            self._found = find_splits(Path(self.root), format=self.format)
        return self._found

    def _place(self) -> str:
        """Describe the splits in the root, for messages."""
        return "data.root is not given" if self.root is None else f"{self.root} has {', '.join(self._splits())}"


def warn_of_shared_images(train: DetectionAnnotations, val: DetectionAnnotations) -> None:
    """Warn if validation images are also trained on."""
    if shared := count_shared(train, val):
        _warn("%d of %d validation images are also trained on: the score is too good", shared, len(val))


def check_objects(train: DetectionAnnotations) -> None:
    """Refuse to train where there is nothing to learn.

    Raises:
        DataError: if there are no boxes but those of crowds.
    """
    if train.crowd.all():
        raise DataError(f"[LCD-D134] the training images in {train.image_root} have no boxes to learn from")


def warn_of_unlearned_objects(train: DetectionAnnotations, val: DetectionAnnotations) -> None:
    """Warn if validation images have objects of classes that training has no object of.

    Raises:
        DataError: if that goes for all objects: the mAP would be 0.
    """
    problem = compare_objects(train, val, "val")
    if problem is not None and problem.action == "refused":
        raise DataError(f"{str(problem).removesuffix(' (refused)')}; name another split in data.val")
    if problem is not None:
        _warn("%s", problem)
