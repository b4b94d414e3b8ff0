"""COCO's mean average precision over the images that all processes have seen.

The figures are torchmetrics' (backend faster_coco_eval), with float64 thresholds so that they equal pycocotools' to
1e-7. torchmetrics' own synchronisation aborts when processes hold different numbers of images; here the records are
gathered once, keyed by image, and evaluated on one process.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from lightning_convnext_det.arguments import check_class_names
from lightning_convnext_det.errors import DivergenceError
from lightning_convnext_det.types import Detection, Target, image_id_of

# pycocotools' own values in float64; torchmetrics' default is a float32 linspace, which differs by up to 6e-5 in mAP
_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
_RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101).tolist()
METRICS = (
    "map",
    "map_50",
    "map_75",
    "map_small",
    "map_medium",
    "map_large",
    "mar_1",
    "mar_10",
    "mar_100",
    "mar_small",
    "mar_medium",
    "mar_large",
)


_Key = tuple[int, int]
"""0 and the image's id; or, for a target without an id, 1 + rank and a running number."""


class _Record(NamedTuple):
    """One image: what was found and what there is, on the CPU."""

    detection: dict[str, Tensor]
    target: dict[str, Tensor]


class DetectionEvaluator:
    """Collects detections and targets, then computes COCO's twelve figures and the AP of each class.

    Args:
        class_names: in order of label; the per-class figures are named after them.

    Attributes:
        undefined: why the figures computed last are nan; None if ``map`` is a number.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        check_class_names(class_names)
        self.class_names = list(class_names)
        self.undefined: str | None = None
        self._records: dict[_Key, _Record] = {}

    def reset(self) -> None:
        """Forget all images."""
        self._records.clear()

    def update(self, detections: Sequence[Detection], targets: Sequence[Target]) -> None:
        """Add images. An image seen before, by its ``image_id``, replaces its record.

        Args:
            detections: boxes in pixels of the original image.
            targets: boxes in the same pixels, with ``iscrowd``, ``area`` and ``image_id`` where the dataset has them.
                Every target without ``image_id`` counts as another image.

        Raises:
            DivergenceError: if a box or score is not finite.
            TypeError: if an ``image_id`` is not an integer.
        """
        for detection, target in zip(detections, targets, strict=True):
            image_id = image_id_of(target)
            key = (1 + _rank(), len(self._records)) if image_id is None else (0, image_id)
            if not (detection["boxes"].isfinite().all() and detection["scores"].isfinite().all()):
                name = target.get("file_name", f"image {key[1]}")
                raise DivergenceError(f"[LCD-E010] the boxes or scores predicted for '{name}' are not finite")
            self._records[key] = _Record(_cpu_detection(detection), _cpu_target(target))

    def compute(self) -> dict[str, float]:
        """Compute the figures over the images of all processes; a collective call.

        Returns:
            ``map`` ... ``mar_large`` and ``map/<class name>``; nan where there is nothing to measure.
        """
        records = _gather(self._records)
        outcome: list[tuple[dict[str, float], str | None] | None] = [None]
        if records is not None:
            figures = self._evaluate(records)
            outcome = [(figures, _why_undefined(records) if math.isnan(figures["map"]) else None)]
        if _world_size() > 1:
            dist.broadcast_object_list(outcome, src=0)
        assert outcome[0] is not None  # rank 0 has evaluated
        figures, self.undefined = outcome[0]
        return figures

    def _evaluate(self, records: dict[_Key, _Record]) -> dict[str, float]:
        metric = MeanAveragePrecision(
            iou_thresholds=_IOU_THRESHOLDS,
            rec_thresholds=_RECALL_THRESHOLDS,
            backend="faster_coco_eval",
            extended_summary=True,
            sync_on_compute=False,  # it runs on one process, which holds everything; the others are not asked
        )
        metric.warn_on_many_detections = False  # COCO's rule is the first hundred by score; no need to say it again
        # equal scores are ranked by the order of images, so the order is fixed: by image
        ordered = [records[key] for key in sorted(records)]
        if not ordered:
            return dict.fromkeys([*METRICS, *(f"map/{c}" for c in self.class_names)], math.nan)
        metric.update([r.detection for r in ordered], [r.target for r in ordered])
        result = metric.compute()
        figures = {name: _defined(float(result[name])) for name in METRICS}
        precision = result["precision"][:, :, :, 0, -1]  # [IoU thresholds, recalls, classes], all areas, 100 detections
        seen = {int(label): i for i, label in enumerate(result["classes"].reshape(-1))}
        for label, name in enumerate(self.class_names):
            values = precision[:, :, seen[label]] if label in seen else precision[:, :, :0]
            values = values[values > -1]
            figures[f"map/{name}"] = float(values.mean()) if values.numel() else math.nan
        return figures


def _cpu_detection(detection: Detection) -> dict[str, Tensor]:
    return {
        "boxes": detection["boxes"].detach().to("cpu", torch.float32),
        "scores": detection["scores"].detach().to("cpu", torch.float32),
        "labels": detection["labels"].detach().to("cpu", torch.int64),
    }


def _cpu_target(target: Target) -> dict[str, Tensor]:
    boxes = target["boxes"].to("cpu", torch.float32).reshape(-1, 4)  # torch.tensor([]) is [0]
    crowd = target.get("iscrowd", torch.zeros(len(boxes), dtype=torch.bool))
    area = target.get("area", (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    return {
        "boxes": boxes,
        "labels": target["labels"].to("cpu", torch.int64),
        "iscrowd": crowd.to("cpu", torch.int64),
        "area": area.to("cpu", torch.float32),
    }


def _defined(value: float) -> float:
    return math.nan if value == -1 else value  # COCO's -1 says that there is nothing to measure


def _why_undefined(records: dict[_Key, _Record]) -> str:
    if not records:
        return "no image was evaluated"
    boxes = sum(len(record.target["boxes"]) for record in records.values())
    what = "are crowd regions" if boxes else "no boxes"
    return f"the {len(records)} images have " + (f"{boxes} boxes, which all {what}" if boxes else what)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(records: dict[_Key, _Record]) -> dict[_Key, _Record] | None:
    """Bring all records to rank 0; None on the others. An image that two processes saw counts once."""
    if _world_size() == 1:
        return records
    parts: list[dict[_Key, _Record] | None] | None = [None] * _world_size() if _rank() == 0 else None
    dist.gather_object(records, parts, dst=0)
    if parts is None:
        return None
    merged: dict[_Key, _Record] = {}
    for part in parts:
        merged.update(part or {})
    return merged
