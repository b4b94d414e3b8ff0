"""What a report is made of: the annotations of a split, and what a detector found in each of its images."""

import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_convnext_det.data.annotations import DetectionAnnotations
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.splits import Stage
from lightning_convnext_det.errors import DataError
from lightning_convnext_det.modules.registry import load_module
from lightning_convnext_det.suggestions import suggest
from lightning_convnext_det.types import image_id_of


class Speed(NamedTuple):
    """Cost of one pass over the images."""

    device: str
    seconds_per_image: float
    """With reading and resizing."""
    peak_memory: int
    """Bytes: of the GPU, or of this process on a CPU."""


class Evaluation(NamedTuple):
    """A split and a detector's results on it, image by image in the order of the annotations."""

    annotations: DetectionAnnotations
    detections: list[dict[str, Tensor]]
    targets: list[dict[str, Tensor]]
    source: str
    """The checkpoint or the file of predictions."""
    speed: Speed | None = None

    def path(self, image: int) -> Path:
        """The file of an image."""
        return self.annotations.path(image)


def evaluate_checkpoint(path: str | Path, data: DetectionDataModule, split: Stage, device: str = "auto") -> Evaluation:
    """Run a checkpoint's detector on a split.

    Raises:
        CheckpointError: if the file is not a checkpoint of this package.
        DataError: if the split is missing, or has other classes than the checkpoint.
    """
    module = load_module(path)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    detector = module.detector.to(place).eval()
    annotations = _annotations(data, split)
    names = list(annotations.class_names)
    if names != list(module.class_names):
        raise DataError(
            f"[LCD-D120] {path} has the classes {', '.join(module.class_names)}, the dataset {', '.join(names)}"
        )
    data.predict_split, data.in_chans = split, data.in_chans or getattr(module, "in_chans", 3)
    found: dict[int, dict[str, Tensor]] = {}
    start = time.perf_counter()
    with torch.inference_mode():
        for images, targets in data.predict_dataloader():
            results = detector([image.to(place) for image in images])
            for result, target in zip(results, targets, strict=True):
                found[image_id_of(target) or 0] = {name: value.cpu() for name, value in result.items()}
    seconds = (time.perf_counter() - start) / max(1, len(annotations))
    return Evaluation(
        annotations, [found[int(i)] for i in annotations.image_ids], _targets(annotations), str(path),
        Speed(str(place), seconds, _peak_memory(place)),
    )  # fmt: skip


def evaluate_predictions(path: str | Path, data: DetectionDataModule, split: Stage) -> Evaluation:
    """Take a detector's results from a file of COCO results, of any detector.

    Raises:
        DataError: if the file is not COCO's results, or names images or categories that the split does not have.
    """
    annotations = _annotations(data, split)
    try:
        records = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"[LCD-D004] {path}: {error}; give a JSON file of COCO results") from None
    if not isinstance(records, list):
        raise DataError(f"[LCD-D001] {path} is not a list of COCO results (image_id, category_id, bbox, score)")
    place = {int(image): i for i, image in enumerate(annotations.image_ids)}
    label = {category: i for i, category in enumerate(annotations.category_ids)}
    rows: list[list[tuple[list[float], int, float]]] = [[] for _ in place]
    for number, record in enumerate(records):
        image, *row = _parse(record, f"{path}: result {number}", place, label)
        rows[image].append(tuple(row))  # type: ignore[arg-type]
    return Evaluation(annotations, [_detection(part) for part in rows], _targets(annotations), str(path))


def _parse(
    record: Any, where: str, place: dict[int, int], label: dict[int, int]
) -> tuple[int, list[float], int, float]:
    try:
        image, category, (x, y, width, height), score = (
            record[k] for k in ("image_id", "category_id", "bbox", "score")
        )
        box, score = [float(x), float(y), float(x) + float(width), float(y) + float(height)], float(score)
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"[LCD-D002] {where} is no object with image_id, category_id, bbox [x, y, w, h] and score"
        ) from None
    if not np.isfinite([*box, score]).all():
        raise DataError(f"[LCD-E010] {where} has a box or score that is not finite")
    if image not in place:
        raise DataError(f"[LCD-D117] {where}: the split has no image with id {image!r}; is it another split (--split)?")
    if category not in label:
        remedy = suggest(str(category), [str(known) for known in label])
        raise DataError(f"[LCD-D110] {where}: the dataset has no category {category!r}; {remedy}")
    return place[image], box, label[category], score


def _detection(rows: Sequence[tuple[list[float], int, float]]) -> dict[str, Tensor]:
    ordered = sorted(rows, key=lambda row: -row[2])
    return {
        "boxes": torch.tensor([row[0] for row in ordered], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([row[1] for row in ordered], dtype=torch.int64),
        "scores": torch.tensor([row[2] for row in ordered], dtype=torch.float32),
    }


def _annotations(data: DetectionDataModule, split: Stage) -> DetectionAnnotations:
    annotations = data.annotations(split)
    if annotations is None:
        raise DataError("[LCD-D131] there is no validation split, and val_fraction is 0; choose another --split")
    return annotations


def _targets(annotations: DetectionAnnotations) -> list[dict[str, Tensor]]:
    """The targets of all images, as evaluation has them."""
    flag = "difficult" if annotations.crowd_is_difficult else "iscrowd"
    targets = []
    for index in range(len(annotations)):
        rows = annotations.rows(index)
        lists = {name: torch.from_numpy(labels) for name, labels in annotations.label_lists(index).items()}
        target = {
            **lists,
            "boxes": torch.from_numpy(annotations.boxes[rows].astype(np.float32)),
            "labels": torch.from_numpy(annotations.labels[rows].copy()),
            "area": torch.from_numpy(annotations.area[rows].astype(np.float32)),
            flag: torch.from_numpy(annotations.crowd[rows].copy()),
        }
        targets.append(target)
    return targets


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes
