"""The annotated objects of a dataset as flat arrays over all images."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_Number = TypeVar("_Number", bound=np.generic)


class Objects(NamedTuple):
    """Annotated objects of all images, [M] in the order of images and targets."""

    image: NDArray[np.int64]
    """Position of the image among those given."""
    label: NDArray[np.int64]
    box: NDArray[np.float64]
    """Corners in pixels, [M, 4]."""
    area: NDArray[np.float64]
    """Square pixels, as annotated where it is."""
    is_ignored: NDArray[np.bool_]
    """Crowd regions and VOC's difficult objects."""
    is_crowd: NDArray[np.bool_]
    offset: NDArray[np.int64]
    """Row of the first object of each image, [I + 1]."""

    def per_image(self, num_classes: int) -> NDArray[np.int64]:
        """How many objects of each class count in each image, [I, C]."""
        counts = np.zeros((len(self.offset) - 1, num_classes), np.int64)
        kept = ~self.is_ignored
        np.add.at(counts, (self.image[kept], self.label[kept]), 1)
        return counts


def flatten_targets(targets: Sequence[Mapping[str, Tensor]]) -> Objects:
    """Join the targets of all images.

    >>> import torch
    >>> target = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.tensor([1])}
    >>> flatten_targets([target, target]).per_image(2).tolist()
    [[0, 1], [0, 1]]

    Args:
        targets: ``boxes`` [G, 4] and ``labels`` [G] of each image; ``iscrowd``, ``difficult`` and ``area`` [G] where
            there are any.
    """
    lengths = np.array([len(target["labels"]) for target in targets], np.int64)
    boxes = join_arrays([target["boxes"].numpy().reshape(-1, 4).astype(np.float64) for target in targets], (0, 4))
    crowd = join_arrays([_flag(target, "iscrowd") for target in targets], (0,)).astype(np.bool_)
    difficult = join_arrays([_flag(target, "difficult") for target in targets], (0,)).astype(np.bool_)
    own = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    area = join_arrays([_given_area(target) for target in targets], (0,))
    return Objects(
        image=np.repeat(np.arange(len(targets)), lengths),
        label=join_arrays([target["labels"].numpy() for target in targets], (0,)).astype(np.int64),
        box=boxes,
        area=np.where(np.isnan(area), own, area),
        is_ignored=crowd | difficult,
        is_crowd=crowd,
        offset=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def _flag(target: Mapping[str, Tensor], name: str) -> NDArray[np.bool_]:
    if name not in target:
        return np.zeros(len(target["labels"]), np.bool_)
    return target[name].numpy().astype(np.bool_)


def _given_area(target: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """The areas as annotated, nan where they are not."""
    if "area" not in target:
        return np.full(len(target["labels"]), np.nan)
    return target["area"].numpy().astype(np.float64)


def join_arrays(arrays: Sequence[NDArray[_Number]], empty: tuple[int, ...]) -> NDArray[_Number]:
    """Concatenate arrays; of none, an empty one of the shape given."""
    return np.concatenate(arrays) if arrays else np.zeros(empty)  # type: ignore[return-value]  # holds nothing
