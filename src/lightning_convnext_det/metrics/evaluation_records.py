"""What is kept of each evaluated image: scores and flags of its detections, classes and areas of its objects, no boxes.

An image takes 32 bytes, each of its detections 28. Ranks exchange the records of all their images as ten arrays.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.metrics.matching import AreaMatches

_PARTS = 256  # as many are merged into one
Key = tuple[int, int]
"""0 and the image's id; or, for a target without an id, 1 + rank and a running number."""


class Fields(NamedTuple):
    """Images one after the other. Bit ``a * T + t`` of a flag tells of range of areas a and IoU threshold t."""

    label: NDArray[np.int32]
    """Class of each detection, by image and descending score, [D]."""
    score: NDArray[np.float32]
    rank: NDArray[np.int32]
    """How many detections of the class in the image come before, [D]."""
    right: NDArray[np.int64]
    """Flags: matched with an object that counts, [D]."""
    ignored: NDArray[np.int64]
    """Flags: neither right nor wrong, [D]."""
    object_label: NDArray[np.int32]
    """Class of each object, [G]."""
    object_areas: NDArray[np.uint8]
    """Bit a: whether the object counts in range a, [G]."""


class Records(NamedTuple):
    """What is kept of some images."""

    keys: NDArray[np.int64]
    """The `Key` of each image, [I, 2]."""
    num_detections: NDArray[np.int64]
    """Of each image, [I]."""
    num_objects: NDArray[np.int64]
    """Of each image, [I]."""
    fields: Fields

    @property
    def image(self) -> NDArray[np.int64]:
        """The image of each detection, [N]."""
        return np.repeat(np.arange(len(self.keys)), self.num_detections)


class RecordStore:
    """Collects the records of batches; its memory is that of their arrays, however small the batches are.

    >>> store = RecordStore()
    >>> len(store), len(store.join().keys)
    (0, 0)
    """

    def __init__(self) -> None:
        self._parts: list[list[Records]] = []  # a part of level n holds 256 ** n batches
        self._num_images = 0

    def __len__(self) -> int:
        """Images added, those that came twice included."""
        return self._num_images

    def add(self, keys: Sequence[Key], matches: AreaMatches) -> None:
        """Add the images of a batch; one that was added before replaces its record."""
        self._num_images += len(keys)
        part, level = _take_records(keys, matches), 0
        while True:
            if level == len(self._parts):
                self._parts.append([])
            parts = self._parts[level]
            parts.append(part)
            if len(parts) < _PARTS:
                return
            part, level = merge_records(parts), level + 1
            parts.clear()

    def join(self) -> Records:
        """All images, each once, in the order of their keys."""
        oldest_first = [part for parts in reversed(self._parts) for part in parts]
        return merge_records([_NOTHING, *oldest_first])

    def clear(self) -> None:
        """Remove all images."""
        self._parts.clear()
        self._num_images = 0


def _take_records(keys: Sequence[Key], matches: AreaMatches) -> Records:
    num_detections = np.bincount(matches.image, minlength=len(keys)).astype(np.int64)
    areas = (1 << np.arange(len(matches.counted))) @ matches.counted
    fields = Fields(
        matches.label.astype(np.int32), matches.score, matches.rank.astype(np.int32), matches.right, matches.ignored,
        matches.objects.label.astype(np.int32), areas.astype(np.uint8),
    )  # fmt: skip
    return Records(np.array(keys, np.int64).reshape(-1, 2), num_detections, np.diff(matches.objects.offset), fields)


def merge_records(parts: Sequence[Records]) -> Records:
    """The images of several records in the order of their keys; of one that comes several times, the last counts."""
    keys = np.concatenate([part.keys for part in parts])
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable
    follows = (keys[order[1:]] == keys[order[:-1]]).all(1)  # the same image again
    order = order[np.append(~follows, True)] if len(order) else order
    lengths = [np.concatenate([part[i] for part in parts]) for i in (1, 2)]
    rows = [_rows(length, order) for length in lengths]
    columns = enumerate(zip(*(part.fields for part in parts), strict=True))
    fields = Fields._make(np.concatenate(column)[rows[i >= 5]] for i, column in columns)
    return Records(keys[order], lengths[0][order], lengths[1][order], fields)


def _rows(lengths: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the images in another order."""
    first, counts = (np.cumsum(lengths) - lengths)[order], lengths[order]
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


_NOTHING = Records(
    np.zeros((0, 2), np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64),
    Fields._make(np.zeros(0, t) for t in (np.int32, np.float32, np.int32, np.int64, np.int64, np.int32, np.uint8)),
)  # fmt: skip
