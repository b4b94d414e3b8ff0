"""Convert detections to COCO results, the JSON format that evaluation servers read."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from lightning_convnext_det.errors import DivergenceError
from lightning_convnext_det.types import Detection


class CocoResult(TypedDict):
    """One detection in COCO's results format, with file and class name."""

    image_id: int
    category_id: int
    bbox: list[float]
    """x, y, width, height in pixels."""
    score: float
    category_name: str
    file_name: str


def coco_results(
    detection: Detection, image_id: int, file_name: str, class_names: Sequence[str], category_ids: Sequence[int]
) -> list[CocoResult]:
    """Convert the detections of an image to COCO results.

    Args:
        detection: boxes in pixels of the image.
        image_id: the dataset's own id of the image.
        file_name: of the image, for readers and messages.
        class_names: in order of label.
        category_ids: the dataset's own ids, in order of label.

    Returns:
        One record per box, in the order of the detection; numbers keep the whole precision of float32.

    Raises:
        DivergenceError: if a box or score is not finite.
    """
    check_finite(detection, file_name)
    records = []
    corners, scores = _decimal(detection["boxes"].flatten()), _decimal(detection["scores"])
    for i, label in enumerate(detection["labels"].tolist()):
        x1, y1, x2, y2 = corners[4 * i : 4 * i + 4]
        bbox = [x1, y1, round(x2 - x1, 6), round(y2 - y1, 6)]  # 6 decimals lose nothing of the float32 corners
        records.append(CocoResult(
            image_id=image_id, category_id=category_ids[label], bbox=bbox, score=scores[i],
            category_name=class_names[label], file_name=file_name,
        ))  # fmt: skip
    return records


def check_finite(detection: Detection, file_name: str) -> None:
    """Raise a DivergenceError if a box or score is not finite."""
    if not (detection["boxes"].isfinite().all() and detection["scores"].isfinite().all()):
        raise DivergenceError(f"[LCD-E010] the boxes or scores predicted for '{file_name}' are not finite")


def _decimal(values: Tensor) -> list[float]:
    """Round float32 to the shortest decimal numbers that are equal to it: 0.9, not 0.899999976."""
    return [float(str(value)) for value in values.to(torch.float32).numpy()]
