"""COCO mAP of detections, over the images of all ranks.

The metrics are torchmetrics' (backend faster_coco_eval), with float64 thresholds so that they equal pycocotools' to
1e-7. torchmetrics' own synchronisation aborts when ranks hold different numbers of images; here the records are
gathered once, keyed by image, and evaluated on one rank.

VOC's ``difficult`` objects are ignored by VOC's rule (development kit, ``VOCevaldet.m``): a detection whose IoU with
one reaches the threshold is neither right nor wrong. COCO's crowd regions ignore by the share of the detection instead.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from lightning_convnext_det.arguments import Range, check_arguments, check_class_names
from lightning_convnext_det.errors import DivergenceError
from lightning_convnext_det.metrics.matching import Matches, match_detections
from lightning_convnext_det.metrics.thresholds import ClassThreshold, choose_thresholds
from lightning_convnext_det.types import Detection, Target, image_id_of

_logger = logging.getLogger(__name__)

# pycocotools' own values in float64; torchmetrics' default is a float32 linspace, which differs by up to 6e-5 in mAP
_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
_RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101).tolist()
_BEYOND = 1e12  # square pixels; COCO's largest range ends at 1e10
MaxDetections = Annotated[int, Range(11)]  # the numbers of detections are 1, 10 and this
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
    """Detections and ground truth of one image, on the CPU."""

    detection: dict[str, Tensor]
    target: dict[str, Tensor]


class DetectionEvaluator:
    """Collects detections and targets of a dataset, then computes COCO's twelve metrics and the AP of each class.

    Examples:
        >>> evaluator = DetectionEvaluator(["cat"])
        >>> boxes, labels = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([0])
        >>> detection = {"boxes": boxes, "labels": labels, "scores": torch.tensor([0.9])}
        >>> evaluator.update([detection], [{"boxes": boxes, "labels": labels, "image_id": 1}])
        >>> metrics = evaluator.compute()
        >>> metrics["map"], metrics["map/cat"]
        (1.0, 1.0)

    Args:
        class_names: in order of label; the metrics of the classes are named after them.
        max_detections: how many detections of an image count, the best by score; COCO's rule is 100.

    Attributes:
        names: of the twelve metrics, ``map`` ... ``mar_large``.
        undefined: why the metrics computed last are nan; None if ``map`` is a number.
        thresholds: score thresholds of the classes for the images computed last, at IoU 0.5, in order of label.
        choose: chooses them; by default those of highest F1.
    """

    def __init__(self, class_names: Sequence[str], max_detections: MaxDetections = 100) -> None:
        check_arguments(DetectionEvaluator.__init__, locals())
        check_class_names(class_names)
        self.class_names = list(class_names)
        self.max_detections = max_detections
        self.names = tuple(f"mar_{max_detections}" if name == "mar_100" else name for name in METRICS)
        self.undefined: str | None = None
        self.thresholds: list[ClassThreshold] = []
        self.choose: Callable[[Matches], list[ClassThreshold]] = choose_thresholds
        self._records: dict[_Key, _Record] = {}
        self._has_warned = False

    def reset(self) -> None:
        """Remove all images."""
        self._records.clear()

    def update(self, detections: Sequence[Detection], targets: Sequence[Target]) -> None:
        """Add the detections and targets of images. An image seen before, by its ``image_id``, replaces its record.

        Args:
            detections: boxes in pixels of the original image.
            targets: boxes in the same pixels, with ``iscrowd``, ``difficult``, ``area`` and ``image_id`` where the
                dataset has them.
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
            self._warn_of_many(target, key[1])

    def _warn_of_many(self, target: Target, key: int) -> None:
        count = len(target["boxes"])
        if count > self.max_detections and not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "[LCD-E002] '%s' has %d objects, but only the %d best detections of an image count: recall cannot "
                "reach 1; raise max_detections, and the detector's detections_per_image",
                target.get("file_name", f"image {key}"), count, self.max_detections,
            )  # fmt: skip

    def compute(self) -> dict[str, float]:
        """Compute the metrics over the images of all ranks; a collective call.

        Returns:
            ``map`` ... ``mar_large`` and ``map/<class name>``; nan where there is nothing to measure.
        """
        records = _gather(self._records)
        outcome: list[tuple[dict[str, float], str | None, list[ClassThreshold]] | None] = [None]
        if records is not None:
            metrics = self._evaluate(records)
            why = _why_undefined(records) if math.isnan(metrics["map"]) else None
            outcome = [(metrics, why, self._choose_thresholds(records))]
        if _world_size() > 1:
            dist.broadcast_object_list(outcome, src=0)
        assert outcome[0] is not None  # rank 0 has evaluated
        metrics, self.undefined, self.thresholds = outcome[0]
        return metrics

    def _choose_thresholds(self, records: dict[_Key, _Record]) -> list[ClassThreshold]:
        ordered = [records[key] for key in sorted(records)]
        detections, targets = [r.detection for r in ordered], [r.target for r in ordered]
        return self.choose(
            match_detections(detections, targets, len(self.class_names), max_detections=self.max_detections)
        )

    def _evaluate(self, records: dict[_Key, _Record]) -> dict[str, float]:
        metric = MeanAveragePrecision(
            iou_thresholds=_IOU_THRESHOLDS,
            rec_thresholds=_RECALL_THRESHOLDS,
            max_detection_thresholds=[1, 10, self.max_detections],
            backend="faster_coco_eval",
            extended_summary=True,
            sync_on_compute=False,  # it runs on one rank, which holds everything; the others are not asked
        )
        metric.warn_on_many_detections = False  # said once, by update
        # equal scores are ranked by the order of images, so the order is fixed: by image
        ordered = [records[key] for key in sorted(records)]
        if not ordered:
            return dict.fromkeys([*self.names, *(f"map/{c}" for c in self.class_names)], math.nan)
        metric.update([r.detection for r in ordered], [_ignore_difficult(r) for r in ordered])
        result = metric.compute()
        metrics = {name: _defined(float(result[name])) for name in self.names}
        precision = result["precision"][
            :, :, :, 0, -1
        ]  # [IoU thresholds, recalls, classes], all areas, most detections
        seen = {int(label): i for i, label in enumerate(result["classes"].reshape(-1))}
        for label, name in enumerate(self.class_names):
            values = precision[:, :, seen[label]] if label in seen else precision[:, :, :0]
            values = values[values > -1]
            metrics[f"map/{name}"] = float(values.mean()) if values.numel() else math.nan
        return metrics


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
        "difficult": target.get("difficult", torch.zeros(len(boxes))).to("cpu", torch.bool),
    }


def _ignore_difficult(record: _Record) -> dict[str, Tensor]:
    """Turn difficult objects into objects that COCO's evaluation ignores.

    COCO ignores objects outside of a range of areas, by their IoU, and matches each with one detection. So a difficult
    object gets an area beyond all ranges, and stands as often as there are detections of its class.
    """
    target = {key: value for key, value in record.target.items() if key != "difficult"}
    difficult = record.target["difficult"]
    if not difficult.any():
        return target
    of_class = (record.detection["labels"][None] == target["labels"][:, None]).sum(1)
    repeats = torch.where(difficult, of_class.clamp(min=1), 1)
    target["area"] = torch.where(difficult, _BEYOND, target["area"])
    return {key: value.repeat_interleave(repeats, 0) for key, value in target.items()}


def _defined(value: float) -> float:
    return math.nan if value == -1 else value  # COCO's -1 says that there is nothing to measure


def _why_undefined(records: dict[_Key, _Record]) -> str:
    if not records:
        return "no image was evaluated"
    boxes = sum(len(record.target["boxes"]) for record in records.values())
    what = f"{boxes} boxes, which are all crowd regions or difficult" if boxes else "no boxes"
    return f"the {len(records)} images have {what}"


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(records: dict[_Key, _Record]) -> dict[_Key, _Record] | None:
    """Gather the records of all ranks on rank 0; None on the others. An image on two ranks counts once."""
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
