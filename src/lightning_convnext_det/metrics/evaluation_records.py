"""What is kept of each evaluated image: scores and flags of its detections, classes and areas of its objects, no boxes.

A detection takes 28 bytes. Ranks exchange the records of all their images as eight arrays.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.metrics.matching import AreaMatches

Key = tuple[int, int]
"""0 and the image's id; or, for a target without an id, 1 + rank and a running number."""


class ImageRecord(NamedTuple):
    """One image. Bit ``a * T + t`` of a flag tells of range of areas a and IoU threshold t."""

    label: NDArray[np.int32]
    """Class of each detection, by descending score, [D]."""
    score: NDArray[np.float32]
    rank: NDArray[np.int32]
    """How many detections of the class come before, [D]."""
    right: NDArray[np.int64]
    """Flags: matched with an object that counts, [D]."""
    ignored: NDArray[np.int64]
    """Flags: neither right nor wrong, [D]."""
    object_label: NDArray[np.int32]
    """Class of each object, [G]."""
    object_areas: NDArray[np.uint8]
    """Bit a: whether the object counts in range a, [G]."""


class Records(NamedTuple):
    """Images one after the other, with the fields of `ImageRecord` joined."""

    keys: list[Key]
    num_detections: NDArray[np.int64]
    """Of each image, [I]."""
    num_objects: NDArray[np.int64]
    """Of each image, [I]."""
    fields: ImageRecord

    @property
    def image(self) -> NDArray[np.int64]:
        """The image of each detection, [N]."""
        return np.repeat(np.arange(len(self.keys)), self.num_detections)


def split_images(matches: AreaMatches, num_images: int) -> list[ImageRecord]:
    """The record of each image."""
    numbers = np.arange(num_images + 1)
    found = np.searchsorted(matches.image, numbers).tolist()
    objects = matches.objects.offset.tolist()
    areas = ((1 << np.arange(len(matches.counted))) @ matches.counted).astype(np.uint8)
    label, rank = matches.label.astype(np.int32), matches.rank.astype(np.int32)
    object_label = matches.objects.label.astype(np.int32)
    return [
        ImageRecord(
            label[a:b], matches.score[a:b], rank[a:b], matches.right[a:b], matches.ignored[a:b],
            object_label[c:d], areas[c:d],
        )
        for a, b, c, d in zip(found[:-1], found[1:], objects[:-1], objects[1:], strict=True)
    ]  # fmt: skip


def join_records(records: Mapping[Key, ImageRecord]) -> Records:
    """Join the records of images in the order of their keys."""
    keys = sorted(records)
    ordered = [records[key] for key in keys]
    nothing = [np.zeros(0, dtype) for dtype in (np.int32, np.float32, np.int32, np.int64, np.int64, np.int32, np.uint8)]
    columns = zip(nothing, *ordered, strict=True)
    fields = ImageRecord._make(np.concatenate(column) for column in columns)
    num_detections, num_objects = (np.array([len(record[i]) for record in ordered], np.int64) for i in (0, 5))
    return Records(keys, num_detections, num_objects, fields)


def merge_records(parts: Sequence[Records]) -> Records:
    """The images of all ranks in the order of their keys; one on two ranks counts once."""
    keys = [key for part in parts for key in part.keys]
    place = {key: index for index, key in enumerate(keys)}
    order = np.array([place[key] for key in sorted(place)], np.int64)
    lengths = [np.concatenate([part[i] for part in parts]) for i in (1, 2)]
    rows = [_rows(length, order) for length in lengths]
    columns = enumerate(zip(*(part.fields for part in parts), strict=True))
    fields = ImageRecord._make(np.concatenate(column)[rows[i >= 5]] for i, column in columns)
    return Records(sorted(place), lengths[0][order], lengths[1][order], fields)


def _rows(lengths: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the images in another order."""
    first, counts = (np.cumsum(lengths) - lengths)[order], lengths[order]
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
