"""What a report says of the dataset: splits, near-duplicates between them, its hash, and augmented training images."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lightning_convnext_det.data.annotations import DetectionAnnotations
from lightning_convnext_det.data.batch import Sample
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.splits import STAGES
from lightning_convnext_det.errors import DataError

_MOST_HASHED = 2000  # images of a split that are hashed, evenly spaced; hashing reads the image
_NEAR = 3  # of 64 bits; resized and recompressed copies differ by fewer
_SHOWN = 6  # augmented training images


class SharedImage(NamedTuple):
    """Two images of different splits that look the same."""

    split: str
    file_name: str
    other_split: str
    other_file_name: str


class TrainingImage(NamedTuple):
    """An augmented training image as the network gets it."""

    pixels: torch.Tensor
    boxes: torch.Tensor
    labels: list[str]


def read_splits(data: DetectionDataModule) -> dict[str, DetectionAnnotations]:
    """The splits that the dataset has; the same images under two names are one."""
    splits: dict[str, DetectionAnnotations] = {}
    for stage in STAGES:
        try:
            annotations = data.annotations(stage)
        except DataError:
            continue  # a dataset for evaluation alone has no training split
        if annotations is not None and all(annotations is not other for other in splits.values()):
            splits[stage] = annotations
    return splits


def dataset_hash(annotations: DetectionAnnotations) -> str:
    """SHA-256 of file names, sizes, boxes and labels of a split; the pixels are not read."""
    digest = hashlib.sha256()
    for column in (annotations.file_names, annotations.sizes, annotations.boxes, annotations.labels, annotations.crowd):
        digest.update(np.ascontiguousarray(column).tobytes())
    digest.update("\0".join(annotations.class_names).encode())
    return digest.hexdigest()


def find_shared_images(splits: Mapping[str, DetectionAnnotations]) -> list[SharedImage]:
    """Find images that look the same in two splits, by a perceptual hash of up to 2,000 images of each.

    Reference:
        dHash: Krawetz, "Kind of Like That", 2013.
    """
    hashed = {name: _hash_images(annotations) for name, annotations in splits.items()}
    names = list(hashed)
    found = []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            (codes, files), (other_codes, other_files) = hashed[one], hashed[other]
            for row, code in enumerate(codes):
                near = np.flatnonzero(_bits(other_codes ^ code) <= _NEAR)
                found += [SharedImage(one, files[row], other, other_files[j]) for j in near[:1]]
    return found


def training_images(data: DetectionDataModule) -> list[TrainingImage]:
    """A few training images with the augmentation of the data module; empty without a training split."""
    try:
        loader = data.train_dataloader()
    except DataError:
        return []
    dataset = loader.dataset
    count = min(_SHOWN, len(dataset))  # type: ignore[arg-type]  # map-style
    images = []
    for index in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():  # type: ignore[arg-type]
        pixels, target = cast(Sample, dataset[(0, index)])
        images.append(TrainingImage(pixels, target["boxes"], [data.class_names[i] for i in target["labels"].tolist()]))
    return images


def _hash_images(annotations: DetectionAnnotations) -> tuple[NDArray[np.uint64], list[str]]:
    """Hashes of the images of a split that have some contrast, and their file names."""
    codes, files = [], []
    for index in np.unique(np.linspace(0, len(annotations) - 1, min(_MOST_HASHED, len(annotations))).astype(int)):
        try:
            with Image.open(annotations.path(int(index))) as image:
                image.draft("L", (72, 64))  # JPEG decodes to a small size at once
                small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int64)
        except (OSError, ValueError):
            continue
        if np.ptp(small) > 8:  # an even image looks like any other
            rises = (small[:, 1:] > small[:, :-1]).ravel()
            codes.append(np.packbits(rises).view(np.uint64)[0])
            files.append(annotations.file_names[int(index)].decode())
    return np.array(codes, np.uint64), files


def _bits(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """How many bits of each value are set."""
    counts: NDArray[np.int64] = np.unpackbits(values.view(np.uint8).reshape(len(values), -1), axis=1).sum(1, np.int64)
    return counts
