"""Small splits on disk, built by hand."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lightning_convnext_det.data.table import DetectionTable

CLASSES = ("cat", "dog")


class Box(NamedTuple):
    corners: tuple[float, float, float, float]
    label: int = 0
    crowd: bool = False
    area: float | None = None


class Picture(NamedTuple):
    height: int
    width: int
    boxes: tuple[Box, ...] = ()


def make_table(folder: Path, pictures: list[Picture], write: bool = True) -> DetectionTable:
    """Write noise pictures 00.png, 01.png, ... with ids 100, 101, ... and return their table."""
    generator = np.random.default_rng(0)
    names = [f"{index:02d}.png" for index in range(len(pictures))]
    if write:
        for name, picture in zip(names, pictures, strict=True):
            pixels = generator.integers(0, 256, (picture.height, picture.width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
    boxes = [box for picture in pictures for box in picture.boxes]
    corners = np.array([box.corners for box in boxes], np.float32).reshape(-1, 4)
    sides = corners[:, 2:] - corners[:, :2]
    areas = [sides[row].prod() if box.area is None else box.area for row, box in enumerate(boxes)]
    return DetectionTable(
        image_root=folder,
        file_names=np.array([name.encode() for name in names], np.bytes_),
        image_ids=np.arange(100, 100 + len(pictures)),
        sizes=np.array([(picture.height, picture.width) for picture in pictures], np.int32).reshape(-1, 2),
        upright=np.zeros(len(pictures), np.bool_),
        boxes=corners,
        labels=np.array([box.label for box in boxes], np.int64),
        crowd=np.array([box.crowd for box in boxes], np.bool_),
        area=np.array(areas, np.float32),
        annotation_ids=np.arange(1, len(boxes) + 1),
        offsets=np.cumsum([0] + [len(picture.boxes) for picture in pictures]),
        class_names=CLASSES,
        category_ids=(1, 2),
    )
