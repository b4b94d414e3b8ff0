"""Parquet files of predictions: one part per rank and some images, each complete or absent.

A part says in its metadata which images it covers, also those without detections, what their files were like, and by
what they were predicted; so a prediction that was ended can go on with the others.
"""

import json
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_convnext_det.data.io.video import parse_frame_name
from lightning_convnext_det.data.writers.annotations import COLUMNS, printable
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.types import Detection

ImageKey = tuple[int, str]
"""Id and file name of an image."""

FOLDER = "parquet"
_METADATA = b"lightning_convnext_det"
_PATTERN = "part-*.parquet"


class FinishedPart(NamedTuple):
    """A part that an earlier prediction has finished."""

    path: Path
    images: list[ImageKey]
    """The images that it covers, in the order of prediction."""


def check_pyarrow() -> None:
    """Raise an ArgumentError that names the extra if pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise ArgumentError("format parquet needs pyarrow: pip install 'lightning-convnext-det[parquet]'")


class ParquetWriter:
    """Writes the detections of one rank as parts.

    Args:
        folder: of the parts.
        rank: this rank.
        images_per_part: a part is written when it has this many images; the batch that fills it goes in whole.
        fingerprint: by what the images are predicted.
        class_names: in order of label.
        category_ids: the dataset's own ids, in order of label.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        images_per_part: int,
        fingerprint: str,
        class_names: Sequence[str],
        category_ids: Sequence[int],
    ) -> None:
        self.folder, self.rank, self.images_per_part, self.fingerprint = folder, rank, images_per_part, fingerprint
        self.class_names = [printable(name) for name in class_names]
        self.category_ids = list(category_ids)
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.stem.rpartition("-")[2]) for path in folder.glob(f"part-{rank:05d}-*.parquet")]
        self._number = max(numbers, default=-1) + 1
        self._images: list[ImageKey] = []
        self._detections: list[Detection] = []

    def add(self, detection: Detection, image_id: int, file_name: str) -> None:
        """Take the detections of an image, on the CPU."""
        self._images.append((image_id, file_name))
        self._detections.append(detection)

    def end_batch(self) -> None:
        """Write a part if it is full."""
        if len(self._images) >= self.images_per_part:
            self.flush()

    def flush(self) -> None:
        """Write what was taken as a part."""
        if not self._images:
            return
        import pyarrow.parquet as pq

        path = self.folder / f"part-{self.rank:05d}-{self._number:06d}.parquet"
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            pq.write_table(self._table(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._number += 1
        self._images, self._detections = [], []

    # pyarrow has no types
    def _table(self) -> Any:
        import pyarrow as pa

        counts = [len(detection["labels"]) for detection in self._detections]
        labels = torch.cat([detection["labels"] for detection in self._detections]).tolist()
        boxes = torch.cat([detection["boxes"] for detection in self._detections]).to(torch.float32).numpy()
        scores = torch.cat([detection["scores"] for detection in self._detections]).to(torch.float32).numpy()
        covered = [key for key, count in zip(self._images, counts, strict=True) for _ in range(count)]
        columns = [
            pa.array([image_id for image_id, _ in covered], pa.int64()),
            pa.array([printable(name) for _, name in covered], pa.string()),
            pa.array([self.category_ids[label] for label in labels], pa.int64()),
            pa.array([self.class_names[label] for label in labels], pa.string()),
            pa.array(scores, pa.float32()),
            *(pa.array(boxes[:, i], pa.float32()) for i in range(4)),
        ]
        stamps = [file_stamp(name) for _, name in self._images]
        facts = json.dumps({"fingerprint": self.fingerprint, "images": self._images, "stamps": stamps})
        return pa.table(columns, names=list(COLUMNS)).replace_schema_metadata({_METADATA: facts.encode("ascii")})


def clear_parts(
    folder: Path, fingerprint: str | None, images: Sequence[ImageKey] = ()
) -> tuple[list[FinishedPart], int]:
    """Remove our parts but those that the same prediction of the same images, with unchanged files, would write.

    Args:
        folder: of the parts.
        fingerprint: by what the images are predicted; None removes all of ours.
        images: those that are to be predicted.

    Returns:
        The parts that stay, by name, and how many were removed.
    """
    stay: list[FinishedPart] = []
    num_removed = 0
    known = set(images)
    for path in folder.glob(".part-*.tmp"):
        path.unlink()
    for path in sorted(folder.glob(_PATTERN)):
        facts = _facts(path)
        covered = [(int(image_id), str(name)) for image_id, name in facts.get("images", [])]
        same = fingerprint is not None and facts.get("fingerprint") == fingerprint and known.issuperset(covered)
        if same and facts.get("stamps") == [file_stamp(name) for _, name in covered]:
            stay.append(FinishedPart(path, covered))
            known.difference_update(covered)  # once
        elif facts:
            path.unlink()
            num_removed += 1
    return stay, num_removed


def file_stamp(file_name: str) -> list[int] | None:
    """Size and time of change (ns) of an image's file, or of a frame's video; None if there is no such file."""
    video = parse_frame_name(file_name)
    try:
        facts = os.stat(file_name if video is None else video[0])
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return [facts.st_size, facts.st_mtime_ns]


def read_part(part: FinishedPart, category_ids: Sequence[int]) -> Iterator[tuple[Detection, ImageKey]]:
    """The detections of each image in a part that has any."""
    import pyarrow.parquet as pq

    names = dict(part.images)
    labels = {category_id: label for label, category_id in enumerate(category_ids)}
    with open(part.path, "rb") as file:
        rows = pq.read_table(file).to_pylist()
    for image_id, group in groupby(rows, key=lambda row: row["image_id"]):
        own = list(group)
        found = Detection(
            boxes=torch.tensor([[row[name] for name in ("x1", "y1", "x2", "y2")] for row in own], dtype=torch.float32),
            labels=torch.tensor([labels[row["category_id"]] for row in own], dtype=torch.int64),
            scores=torch.tensor([row["score"] for row in own], dtype=torch.float32),
        )
        yield found, (image_id, names[image_id])


# the facts are JSON
def _facts(path: Path) -> dict[str, Any]:
    """What a part says of itself; nothing if it is not ours, or pyarrow is not there to tell."""
    if find_spec("pyarrow") is None:
        return {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as file:
            metadata = pq.read_schema(file).metadata or {}
        facts = json.loads(metadata.get(_METADATA, b"{}"))
    except (OSError, ValueError, pa.ArrowException):
        return {}
    return facts if isinstance(facts, dict) else {}
