"""Small splits on disk, built by hand."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lightning_convnext_det.data.annotations import DetectionAnnotations

CLASSES = ("cat", "dog")


class Box(NamedTuple):
    corners: tuple[float, float, float, float]
    label: int = 0
    crowd: bool = False
    area: float | None = None


class TinyImage(NamedTuple):
    height: int
    width: int
    boxes: tuple[Box, ...] = ()


def make_annotations(folder: Path, images: list[TinyImage], write: bool = True) -> DetectionAnnotations:
    """Write noise images 00.png, 01.png, ... with ids 100, 101, ... and return their table."""
    generator = np.random.default_rng(0)
    names = [f"{index:02d}.png" for index in range(len(images))]
    if write:
        for name, image in zip(names, images, strict=True):
            pixels = generator.integers(0, 256, (image.height, image.width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
    boxes = [box for image in images for box in image.boxes]
    corners = np.array([box.corners for box in boxes], np.float32).reshape(-1, 4)
    sides = corners[:, 2:] - corners[:, :2]
    areas = [sides[row].prod() if box.area is None else box.area for row, box in enumerate(boxes)]
    return DetectionAnnotations(
        image_root=folder,
        file_names=np.array([name.encode() for name in names], np.bytes_),
        image_ids=np.arange(100, 100 + len(images)),
        sizes=np.array([(image.height, image.width) for image in images], np.int32).reshape(-1, 2),
        upright=np.zeros(len(images), np.bool_),
        boxes=corners,
        labels=np.array([box.label for box in boxes], np.int64),
        crowd=np.array([box.crowd for box in boxes], np.bool_),
        area=np.array(areas, np.float32),
        annotation_ids=np.arange(1, len(boxes) + 1),
        offsets=np.cumsum([0] + [len(image.boxes) for image in images]),
        class_names=CLASSES,
        category_ids=(1, 2),
    )
