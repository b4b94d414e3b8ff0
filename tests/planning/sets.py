"""Fingerprints of made datasets, each with one property that a plan must answer."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.data.annotations import DetectionAnnotations, count_offsets
from lightning_convnext_det.data.fingerprint import Fingerprint, take_fingerprint


def make_fingerprint(
    sizes: list[tuple[int, int]],
    per_image: int,
    side: tuple[float, float],
    aspect: tuple[float, float] = (0.7, 1.4),
    num_classes: int = 3,
    seed: int = 0,
) -> Fingerprint:
    """The fingerprint of images of these (width, height) with boxes of random sides and aspect ratios in a range."""
    generator = np.random.default_rng(seed)
    count = len(sizes) * per_image
    image = np.repeat(np.arange(len(sizes)), per_image)
    root = np.exp(generator.uniform(*np.log(side), count))
    ratio = np.sqrt(np.exp(generator.uniform(*np.log(aspect), count)))
    sides = np.stack([root * ratio, root / ratio], axis=1)
    frames = np.array(sizes, np.float64)
    corner = generator.uniform(0, 1, (count, 2)) * (frames[image] - sides).clip(min=0)
    boxes = np.concatenate([corner, np.minimum(corner + sides, frames[image])], axis=1)
    return take_fingerprint(_annotations(frames, boxes, image, generator.integers(0, num_classes, count), num_classes))


def _annotations(
    frames: NDArray[np.float64],
    boxes: NDArray[np.float64],
    image: NDArray[np.int64],
    labels: NDArray[np.int64],
    num_classes: int,
) -> DetectionAnnotations:
    return DetectionAnnotations(
        image_root=Path(),
        file_names=np.array([b"%d.jpg" % i for i in range(len(frames))]),
        image_ids=np.arange(len(frames)),
        sizes=frames[:, ::-1].astype(np.int32),
        upright=np.zeros(len(frames), np.bool_),
        boxes=boxes.astype(np.float32),
        labels=labels,
        crowd=np.zeros(len(boxes), np.bool_),
        area=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1).astype(np.float32),
        annotation_ids=np.arange(len(boxes)),
        offsets=count_offsets(image, len(frames)),
        class_names=tuple(f"class {i}" for i in range(num_classes)),
        category_ids=tuple(range(num_classes)),
    )


MIXED = [(640, 480), (480, 640)] * 150
SETS = {
    "tiny objects": make_fingerprint([(2000, 2000)] * 400, 20, (6, 10)),
    "one huge object": make_fingerprint([(500, 400)] * 300, 1, (250, 380)),
    "400 objects": make_fingerprint([(1600, 1200)] * 60, 400, (20, 60)),
    "extreme aspect ratios": make_fingerprint([(800, 600)] * 300, 6, (40, 120), aspect=(1 / 12, 12)),
    "two images": make_fingerprint([(640, 480)] * 2, 5, (40, 200)),
    "one class": make_fingerprint([(640, 480)] * 1000, 8, (30, 200), num_classes=1),
    "portrait and landscape": make_fingerprint(MIXED, 6, (30, 200)),
    "COCO's size": make_fingerprint([(640, 480), (480, 640), (640, 427)] * 2000, 7, (10, 300), (0.4, 2.5), 80),
    "no objects": make_fingerprint([(640, 480)] * 5, 0, (30, 200)),
}
