"""Fingerprint of a dataset: sizes, shapes and crowding of its images and objects, without decoding an image.

It is what an experienced trainer looks at before choosing a resolution and anchors. 100,000 images take a second.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from lightning_convnext_det.data.annotations import DetectionAnnotations

SAMPLED = 20_000  # boxes kept for anchors: quantiles of that many are known to a per cent
CROWDED = 0.5  # IoU above which two objects of a class are in each other's way: the usual threshold of NMS


class Quantiles(NamedTuple):
    """How a number is distributed; all 0 where there is nothing to count."""

    p1: float
    p10: float
    p50: float
    p90: float
    p99: float
    highest: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> "Quantiles":
        """Compute the quantiles of an array, of the values themselves and not between them."""
        if not values.size:
            return cls(0, 0, 0, 0, 0, 0)
        found = np.quantile(values, (0.01, 0.1, 0.5, 0.9, 0.99, 1.0), method="lower")
        return cls(*(round(float(value), 4) for value in found))

    def bounded(self, low: float, high: float) -> "Quantiles":
        """The quantiles of the same numbers, of which none is below ``low`` or above ``high``."""
        return Quantiles(*(min(max(value, low), high) for value in self))

    def __str__(self) -> str:
        low, middle, high = (f"{value:.2g}" if value < 10 else f"{value:,.0f}" for value in self[1:4])
        return middle if low == high else f"{middle} ({low}-{high})"


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Result of `take_fingerprint`; lengths are in native pixels, crowd boxes are left out.

    Attributes:
        images: number of images.
        images_without_objects: images without an object to learn.
        objects: boxes that are not crowds.
        crowds: boxes that are.
        objects_per_class: by class name, in order of label.
        shorter_side: of the images.
        longer_side: of the images.
        image_aspect: width over height of the images.
        box_side: square root of a box's area.
        box_shorter_side: the shorter side of a box.
        box_aspect: width over height of a box.
        relative_side: square root of a box's share of its image's area.
        side_per_class: median of ``box_side`` by class name; 0 without objects.
        share_per_class: median by class name of a box's side over the shorter side of its image; 0 without objects.
        objects_per_image: of all images.
        overlap: for each object, its greatest IoU with another object of its class.
        crowded: share of the objects whose overlap is above 0.5.
        boxes: width and height of a sample of the boxes with width and height of their image, float64 [S, 4].
    """

    images: int
    images_without_objects: int
    objects: int
    crowds: int
    objects_per_class: dict[str, int]
    shorter_side: Quantiles
    longer_side: Quantiles
    image_aspect: Quantiles
    box_side: Quantiles
    box_shorter_side: Quantiles
    box_aspect: Quantiles
    relative_side: Quantiles
    side_per_class: dict[str, float]
    share_per_class: dict[str, float]
    objects_per_image: Quantiles
    overlap: Quantiles
    crowded: float
    boxes: NDArray[np.float64]

    @property
    def empty_classes(self) -> list[str]:
        """Classes without an object."""
        return [name for name, count in self.objects_per_class.items() if not count]

    def in_windows(self, side: int) -> "Fingerprint":
        """The fingerprint of square windows of the images: sides of images and boxes end at ``side`` pixels."""
        shorter, longer = self.shorter_side.bounded(0, side), self.longer_side.bounded(0, side)
        longest = max(1.0, longer.highest / max(1.0, shorter.p1))
        grown = self.shorter_side.p50 / max(1.0, shorter.p50)  # a box's share of its image's side
        return replace(
            self,
            shorter_side=shorter,
            longer_side=longer,
            image_aspect=self.image_aspect.bounded(1 / longest, longest),
            box_side=self.box_side.bounded(0, side),
            box_shorter_side=self.box_shorter_side.bounded(0, side),
            share_per_class={name: min(1.0, share * grown) for name, share in self.share_per_class.items()},
            boxes=np.minimum(self.boxes, side),
        )

    def as_dict(self) -> dict[str, Any]:
        """Numbers, lists and dicts, for JSON; without the sample of boxes."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "boxes":
                found[field.name] = value._asdict() if isinstance(value, Quantiles) else value
        return {**found, "empty_classes": self.empty_classes}


def take_fingerprint(annotations: DetectionAnnotations) -> Fingerprint:
    """Take the fingerprint of a split.

    >>> from tempfile import mkdtemp
    >>> from lightning_convnext_det.data.formats.discovery import find_splits, read_split
    >>> from lightning_convnext_det.data.synthetic import write_synthetic_coco
    >>> root = write_synthetic_coco(mkdtemp() + "/shapes", num_train=20, num_val=2)
    >>> found = take_fingerprint(read_split(find_splits(root)["train"]))
    >>> found.images, found.objects, list(found.objects_per_class)
    (20, 80, ['disc', 'ring', 'square', 'triangle', 'star'])
    >>> found.shorter_side.p1 >= 192, found.box_side.p50 > found.box_side.p10
    (True, True)
    """
    kept = ~annotations.crowd
    corners, labels = annotations.boxes[kept].astype(np.float64), annotations.labels[kept]
    image = annotations.image_index[kept]
    sides = corners[:, 2:] - corners[:, :2]
    sizes = annotations.sizes[:, ::-1].astype(np.float64)  # width, height
    per_image = np.bincount(image, minlength=len(annotations))
    per_class = np.bincount(labels, minlength=len(annotations.class_names))
    overlaps = _greatest_overlaps(corners, image, labels)
    root, relative = np.sqrt(sides.prod(axis=1)), np.sqrt(sides.prod(axis=1) / sizes[image].prod(axis=1))
    shares = root / sizes[image].min(axis=1)
    sample = np.unique(np.linspace(0, max(0, len(sides) - 1), SAMPLED).astype(np.int64))[: len(sides)]
    return Fingerprint(
        images=len(annotations),
        images_without_objects=int((per_image == 0).sum()),
        objects=len(corners),
        crowds=int(annotations.crowd.sum()),
        objects_per_class=dict(zip(annotations.class_names, per_class.tolist(), strict=True)),
        shorter_side=Quantiles.of(sizes.min(axis=1, initial=np.inf)),
        longer_side=Quantiles.of(sizes.max(axis=1, initial=0)),
        image_aspect=Quantiles.of(sizes[:, 0] / sizes[:, 1]),
        box_side=Quantiles.of(root),
        box_shorter_side=Quantiles.of(sides.min(axis=1, initial=np.inf)),
        box_aspect=Quantiles.of(sides[:, 0] / sides[:, 1]),
        relative_side=Quantiles.of(relative),
        side_per_class=dict(zip(annotations.class_names, _medians(root, labels, per_class), strict=True)),
        share_per_class=dict(zip(annotations.class_names, _medians(shares, labels, per_class), strict=True)),
        objects_per_image=Quantiles.of(per_image.astype(np.float64)),
        overlap=Quantiles.of(overlaps),
        crowded=round(float((overlaps > CROWDED).mean()), 4) if len(overlaps) else 0.0,
        boxes=np.concatenate([sides, sizes[image]], axis=1)[sample],
    )


def _medians(values: NDArray[np.float64], labels: NDArray[np.int64], per_class: NDArray[np.int64]) -> list[float]:
    """The median of each class, 0 for a class without values."""
    ordered = values[np.lexsort((values, labels))]
    starts = np.cumsum(per_class) - per_class
    middle = (starts + (per_class - 1) // 2).clip(0, max(0, len(values) - 1))
    return [round(float(ordered[row]), 4) if count else 0.0 for row, count in zip(middle, per_class, strict=True)]


def _greatest_overlaps(
    corners: NDArray[np.float64], image: NDArray[np.int64], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """For each box its greatest IoU with another box of its image and class, [N]."""
    order = np.lexsort((labels, image))
    boxes, groups = corners[order], np.stack([image[order], labels[order]])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    greatest = np.zeros(len(boxes))
    first = np.arange(len(boxes))
    for shift in range(1, len(boxes)):  # every box with the one so many rows behind it, while some share a group
        first = first[first + shift < len(boxes)]
        first = first[(groups[:, first] == groups[:, first + shift]).all(axis=0)]
        if not len(first):
            break
        one, other = boxes[first], boxes[first + shift]
        common = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
        shared = common.clip(min=0).prod(axis=1)
        iou = shared / (area[first] + area[first + shift] - shared)
        greatest[first] = np.maximum(greatest[first], iou)
        greatest[first + shift] = np.maximum(greatest[first + shift], iou)
    return greatest[np.argsort(order)]


def fingerprint_table(fingerprints: dict[str, Fingerprint]) -> Table:
    """Lay out fingerprints, one column per split: medians, with the 10th and 90th percentile."""
    grid = Table(title="fingerprint: median (10% to 90%)", title_justify="left")
    grid.add_column("")
    for name in fingerprints:
        grid.add_column(Text(name), justify="right")
    for label, cells in _rows(list(fingerprints.values())):
        grid.add_row(label, *cells)
    return grid


def _rows(found: list[Fingerprint]) -> Iterator[tuple[str, list[str]]]:
    yield "image: shorter side", [str(one.shorter_side) for one in found]
    yield "  longer side", [str(one.longer_side) for one in found]
    yield "  width / height", [str(one.image_aspect) for one in found]
    yield "  objects", [str(one.objects_per_image) for one in found]
    yield "  objects at most", [f"{one.objects_per_image.highest:,.0f}" for one in found]
    yield "box: root of its area", [str(one.box_side) for one in found]
    yield "  relative to image", [str(one.relative_side) for one in found]
    yield "  shorter side", [str(one.box_shorter_side) for one in found]
    yield "  width / height", [str(one.box_aspect) for one in found]
    yield "  IoU > 0.5 with another", [f"{one.crowded:.1%}" for one in found]
    yield "classes without objects", [f"{len(one.empty_classes)}" for one in found]
