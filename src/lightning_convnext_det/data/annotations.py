"""Annotations of a split as numpy arrays, in the same form for every format.

Arrays, not lists of objects: worker processes share their pages, and checks are vectorised.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.arguments import Frequency
from lightning_convnext_det.errors import DataError

Format = Literal["coco", "voc", "yolo", "cvat"]
Action = Literal["refused", "dropped", "clipped", "noted"]


class Split(NamedTuple):
    """Where the files of one split are. What each field holds for a format is said in that format's module."""

    name: str
    """Such as ``train``, ``val``, ``test``."""
    format: Format
    root: Path
    """Nothing outside this folder is read on the word of an annotation file."""
    annotations: tuple[Path, ...]
    """JSON files, folders of XML or label files."""
    images: tuple[Path, ...]
    """Folders of images."""
    members: tuple[Path, ...] = ()
    """Files that list the images; empty where the annotations or the folder do."""
    classes: tuple[Path, ...] = ()
    """Files or folders that the class names are taken from; empty where the annotations name them."""
    notes: tuple[str, ...] = ()
    """What the user should know about the layout, on a line each."""


def canonical_split(name: str) -> str:
    """The name that a split goes by: ``train2017`` is ``train``, ``valid`` is ``val``."""
    bare = re.sub(r"[\W_]*(?:19|20)\d\d$", "", name.lower()).strip("._- ")
    known = {"valid": "val", "validation": "val", "dev": "val", "training": "train", "testing": "test"}
    return known.get(bare, bare) or name


class Problem(NamedTuple):
    """Something wrong with a record of a dataset."""

    code: str
    """Stable code, e.g. ``LCD-D101``."""
    file: str
    """The annotation file or image it is found in."""
    record: str
    """Where in the file: an annotation id, an object's number, a line; empty for the file as a whole."""
    reason: str
    """What is wrong and what to do, on one line."""
    action: Action
    """``refused`` stops training, ``dropped`` leaves the record out, ``clipped`` and ``noted`` keep it."""

    def __str__(self) -> str:
        where = f"{self.file}: {self.record}" if self.record else self.file
        return f"[{self.code}] {where}: {self.reason} ({self.action})"


class UnreadableError(DataError):
    """A file that cannot be used at all, with the problem that says why."""

    def __init__(self, message: str, problem: Problem | None = None) -> None:
        super().__init__(message)  # the message alone, so that the error survives the way out of a worker process
        self.problem = problem

    @classmethod
    def of(cls, code: str, file: Path | str, reason: str, record: str = "") -> "UnreadableError":
        """Create the error for a problem of a file."""
        where = f"{file}: {record}" if record else str(file)
        return cls(f"[{code}] {where}: {reason}", Problem(code, str(file), record, reason, "refused"))

    def problem_of(self, file: str) -> Problem:
        """The problem, with the file as a report calls it."""
        if self.problem is None:
            return Problem("LCD-D000", file, "", str(self), "refused")
        return self.problem._replace(file=file)


class LabelLists(NamedTuple):
    """Lists of labels of some images, by image id."""

    image_ids: NDArray[np.int64]
    """Ascending, [K]."""
    offsets: NDArray[np.int64]
    """The labels of image k are ``labels[offsets[k]:offsets[k + 1]]``, [K + 1]."""
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, lists: Mapping[int, Sequence[int]]) -> "LabelLists":
        """Create them from labels by image id."""
        ids = sorted(lists)
        labels = np.array([label for key in ids for label in lists[key]], np.int64)
        return cls(np.array(ids, np.int64), np.cumsum([0, *(len(lists[key]) for key in ids)]).astype(np.int64), labels)

    def find(self, image_id: int) -> NDArray[np.int64] | None:
        """The labels of an image; None if it has no list."""
        place = int(np.searchsorted(self.image_ids, image_id))
        if place == len(self.image_ids) or self.image_ids[place] != image_id:
            return None
        return self.labels[self.offsets[place] : self.offsets[place + 1]]


class FederatedLabels(NamedTuple):
    """What LVIS knows of images in which not all classes are annotated."""

    negative: LabelLists
    """Classes verified to be absent."""
    not_exhaustive: LabelLists
    """Classes some of whose objects are not annotated."""
    frequencies: tuple[Frequency, ...] = ()
    """Of the classes in the training images, in order of label; empty where the file does not tell."""


@dataclass(frozen=True, eq=False)
class DetectionAnnotations:
    """Images and boxes of a split. The objects of image ``i`` are rows ``offsets[i]:offsets[i + 1]``.

    A reader fills it with boxes as annotated, float64 and YOLO's still relative to the image; ``validate_annotations``
    checks them, clips them and gives the form below.

    Attributes:
        image_root: folder that ``file_names`` are relative to.
        file_names: UTF-8 bytes [N].
        image_ids: the dataset's own ids, or 1, 2, ... where it has none, int64 [N].
        sizes: height and width in pixels of the frame that the boxes refer to, int32 [N, 2].
        upright: whether the EXIF orientation must be applied to get that frame, bool [N].
        boxes: corners (x1, y1, x2, y2) in pixels, clipped to the image, float32 [M, 4].
        labels: indices into ``class_names``, int64 [M].
        crowd: COCO's ``iscrowd`` or VOC's ``difficult``: ignored by evaluation, left out of training, bool [M].
        area: square pixels as annotated (COCO: of the segment), else of the box, float32 [M].
        annotation_ids: the dataset's own ids, or running numbers, int64 [M].
        offsets: int64 [N + 1].
        class_names: in order of label.
        category_ids: the dataset's own ids of the classes, in order of label.
        problems: of the annotation files, found while reading.
        crowd_is_difficult: whether ``crowd`` marks VOC's difficult objects, not COCO's regions.
        federated: LVIS's lists of the images and frequencies of the classes; None for other datasets.
    """

    image_root: Path
    file_names: NDArray[np.bytes_]
    image_ids: NDArray[np.int64]
    sizes: NDArray[np.int32]
    upright: NDArray[np.bool_]
    boxes: NDArray[np.floating]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    area: NDArray[np.floating]
    annotation_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    problems: tuple[Problem, ...] = ()
    crowd_is_difficult: bool = False
    federated: FederatedLabels | None = None

    def __len__(self) -> int:
        return len(self.file_names)

    def path(self, index: int) -> Path:
        """The file of an image."""
        name: bytes = self.file_names[index]
        return self.image_root / name.decode()

    def rows(self, index: int) -> slice:
        """The rows of ``boxes``, ``labels`` ... that belong to an image."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def label_lists(self, index: int) -> dict[str, NDArray[np.int64]]:
        """LVIS's ``negative_labels`` and ``not_exhaustive_labels`` of an image; empty where it has none."""
        if self.federated is None:
            return {}
        image_id = int(self.image_ids[index])
        lists = {"negative_labels": self.federated.negative, "not_exhaustive_labels": self.federated.not_exhaustive}
        found = {name: labels.find(image_id) for name, labels in lists.items()}
        return {name: labels.copy() for name, labels in found.items() if labels is not None}

    @property
    def image_index(self) -> NDArray[np.int64]:
        """The image of each row, int64 [M]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


def count_offsets(image_index: Sequence[int] | NDArray[np.int64], num_images: int) -> NDArray[np.int64]:
    """The ``offsets`` of rows whose images are given in ascending order, int64 [N + 1]."""
    counts = np.bincount(np.asarray(image_index, np.int64), minlength=num_images)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
