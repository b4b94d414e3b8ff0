"""Duplicate images of a dataset: files that are equal byte by byte, and images in more than one split."""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from lightning_convnext_det.data.annotations import DetectionAnnotations, Problem

Tables = Mapping[str, DetectionAnnotations]


def image_path(table: DetectionAnnotations, index: int) -> Path:
    """The path of an image without ``..``."""
    return Path(os.path.normpath(table.path(index)))


def image_paths(table: DetectionAnnotations) -> Iterator[Path]:
    """Yield the path of each image; a list of a million would take hundreds of megabytes."""
    return (image_path(table, index) for index in range(len(table)))


def find_equal_files(tables: Tables, root: Path) -> Iterator[Problem]:
    """Note duplicate image files; only files of equal size are read."""
    every = list(tables.values())
    sizes = [np.fromiter((path.stat().st_size for path in image_paths(table)), np.int64, len(table)) for table in every]
    size = np.concatenate([np.zeros(0, np.int64), *sizes])
    first = np.cumsum([0, *map(len, sizes)])
    order = np.argsort(size, kind="stable")
    bounds = np.flatnonzero(np.diff(size[order], prepend=-1, append=-1))
    for start, end in itertools.pairwise(bounds.tolist()):
        if end - start > 1:
            rows = order[start:end]
            owners = np.searchsorted(first, rows, side="right") - 1
            places = zip(owners.tolist(), (rows - first[owners]).tolist(), strict=True)
            yield from _compare((image_path(every[owner], index) for owner, index in places), root)


def _compare(paths: Iterable[Path], root: Path) -> Iterator[Problem]:
    """Note those of some files that equal an earlier one."""
    first: dict[bytes, Path] = {}
    for path in dict.fromkeys(paths):
        twin = first.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
        if twin != path:
            reason = f"equals {os.path.relpath(twin, root)} byte by byte"
            yield Problem("LCD-D125", os.path.relpath(path, root), "", reason, "noted")


def find_shared_images(tables: Tables, root: Path) -> Iterator[Problem]:
    """Note images in more than one split; ``trainval`` may contain ``train`` and ``val``."""
    for one, other in itertools.combinations(tables, 2):
        if "trainval" in (one, other) and {"train", "val"} & {one, other}:
            continue
        small, large = sorted((tables[one], tables[other]), key=len)
        known = set(image_paths(small))
        if shared := known.intersection(image_paths(large)):
            reason = f"{len(shared)} images are in {one!r} and in {other!r}, such as {min(shared).name}"
            yield Problem("LCD-D126", str(root), "", reason, "noted")
