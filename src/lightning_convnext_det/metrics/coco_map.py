"""COCO mAP of detections, over the images of all ranks.

Images are matched as they come, see `matching`; only scores and flags are kept, gathered once, keyed by image, and
evaluated on one rank. The metrics equal pycocotools' to 12 digits, and torchmetrics' `MeanAveragePrecision` given
float64 thresholds (its own are float32, which differ by up to 6e-5); its synchronisation aborts when ranks hold
different numbers of images.

VOC's ``difficult`` objects are ignored by VOC's rule (development kit, ``VOCevaldet.m``): a detection whose IoU with
one reaches the threshold is neither right nor wrong. COCO's crowd regions ignore by the share of the detection instead.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_convnext_det.arguments import Frequency, Range, check_arguments, check_class_names
from lightning_convnext_det.errors import ArgumentError, DataError, DivergenceError
from lightning_convnext_det.metrics.coco_summary import (
    AREA_RANGES,
    FREQUENCY_METRICS,
    IOU_THRESHOLDS,
    METRICS,
    evaluate_classes,
    outcomes,
    summarize,
)
from lightning_convnext_det.metrics.evaluation_records import (
    Key,
    Records,
    RecordStore,
    merge_records,
)
from lightning_convnext_det.metrics.matching import ScoredDetections, match_areas
from lightning_convnext_det.metrics.thresholds import ClassThreshold, choose_thresholds
from lightning_convnext_det.types import Detection, Target, image_id_of

_logger = logging.getLogger(__name__)
_DTYPES = {
    "boxes": torch.float32, "scores": torch.float32, "area": torch.float32, "labels": torch.int64,
    "iscrowd": torch.bool, "difficult": torch.bool,
    "negative_labels": torch.int64, "not_exhaustive_labels": torch.int64,
}  # fmt: skip
MaxDetections = Annotated[int, Range(11)]  # the numbers of detections are 1, 10 and this


class DetectionEvaluator:
    """Collects detections and targets of a dataset, then computes COCO's twelve metrics and the AP of each class.

    Examples:
        >>> evaluator = DetectionEvaluator(["cat"])
        >>> boxes, labels = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([0])
        >>> detection = {"boxes": boxes, "labels": labels, "scores": torch.tensor([0.9])}
        >>> evaluator.update([detection], [{"boxes": boxes, "labels": labels, "image_id": 1}])
        >>> metrics = evaluator.compute()
        >>> round(metrics["map"], 6), round(metrics["map/cat"], 6)
        (1.0, 1.0)

    Args:
        class_names: in order of label; the metrics of the classes are named after them.
        max_detections: how many detections of a class in an image count, the best by score; COCO's rule is 100.
        frequencies: LVIS's of each class in the training images, in order of label: adds ``map_rare``, ``map_common``
            and ``map_frequent``, LVIS's APr, APc and APf.

    Attributes:
        undefined: why the metrics computed last are nan; None if ``map`` is a number.
        thresholds: score thresholds of the classes for the images computed last, at IoU 0.5, in order of label.
        choose: chooses them; by default those of highest F1.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        max_detections: MaxDetections = 100,
        frequencies: Sequence[Frequency] | None = None,
    ) -> None:
        check_arguments(DetectionEvaluator.__init__, locals())
        check_class_names(class_names)
        if frequencies is not None and len(frequencies) != len(class_names):
            raise ArgumentError(f"frequencies has {len(frequencies)} entries, but there are {len(class_names)} classes")
        self.class_names = list(class_names)
        self.max_detections = max_detections
        self.frequencies = list(frequencies or ())
        self.undefined: str | None = None
        self.thresholds: list[ClassThreshold] = []
        self.choose: Callable[[ScoredDetections], list[ClassThreshold]] = choose_thresholds
        self._records = RecordStore()
        self._has_warned = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the twelve metrics, ``map`` ... ``mar_large``, and of LVIS's three where there are frequencies."""
        return (*self._coco_names, *(FREQUENCY_METRICS if self.frequencies else ()))

    @property
    def _coco_names(self) -> tuple[str, ...]:
        return tuple(f"mar_{self.max_detections}" if name == "mar_100" else name for name in METRICS)

    def reset(self) -> None:
        """Remove all images."""
        self._records.clear()

    def update(self, detections: Sequence[Detection], targets: Sequence[Target]) -> None:
        """Add the detections and targets of images. An image seen before, by its ``image_id``, replaces its record.

        Args:
            detections: boxes in pixels of the original image.
            targets: boxes in the same pixels, with ``iscrowd``, ``difficult``, ``area``, ``image_id``,
                ``negative_labels`` and ``not_exhaustive_labels`` where the dataset has them.
                Every target without ``image_id`` counts as another image.

        Raises:
            DataError: if a label is not among the classes.
            DivergenceError: if a box or score is not finite.
            TypeError: if an ``image_id`` is not an integer.
        """
        keys: list[Key] = []
        for detection, target in zip(detections, targets, strict=True):
            image_id = image_id_of(target)
            keys.append((1 + _rank(), len(self._records) + len(keys)) if image_id is None else (0, image_id))
            name = target.get("file_name", f"image {keys[-1][1]}")
            if not (detection["boxes"].isfinite().all() and detection["scores"].isfinite().all()):
                raise DivergenceError(f"[LCD-E010] the boxes or scores predicted for '{name}' are not finite")
            self._check_labels(detection["labels"], name)
            self._check_labels(target["labels"], name)
            self._warn_of_many(len(target["boxes"]), name)
        found = [_on_cpu(detection) for detection in detections]
        matches = match_areas(
            found, [_on_cpu(target) for target in targets], IOU_THRESHOLDS, self.max_detections, AREA_RANGES
        )
        self._records.add(keys, matches)

    def _check_labels(self, labels: Tensor, name: str) -> None:
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < len(self.class_names)):
            wrong = next(label for label in labels.tolist() if not 0 <= label < len(self.class_names))
            raise DataError(
                f"[LCD-D110] label {wrong} in '{name}', but there are {len(self.class_names)} classes; "
                f"labels run from 0 to {len(self.class_names) - 1}"
            )

    def _warn_of_many(self, count: int, name: str) -> None:
        if count > self.max_detections and not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "[LCD-E002] '%s' has %d objects, but only the %d best detections of an image count: recall cannot "
                "reach 1; raise max_detections, and the detector's detections_per_image",
                name, count, self.max_detections,
            )  # fmt: skip

    def compute(self) -> dict[str, float]:
        """Compute the metrics over the images of all ranks; a collective call.

        Returns:
            ``map`` ... ``mar_large`` and ``map/<class name>``; nan where there is nothing to measure.
        """
        records = _gather(self._records.join())
        outcome: list[tuple[dict[str, float], str | None, list[ClassThreshold]] | None] = [None]
        if records is not None:
            num_classes = len(self.class_names)
            tables = evaluate_classes(records, num_classes)
            metrics = summarize(tables, self._coco_names, self.class_names, self.frequencies)
            why = _why_undefined(records) if math.isnan(metrics["map"]) else None
            outcome = [(metrics, why, self.choose(outcomes(records, num_classes)))]
        if _world_size() > 1:
            dist.broadcast_object_list(outcome, src=0)
        assert outcome[0] is not None  # rank 0 has evaluated
        metrics, self.undefined, self.thresholds = outcome[0]
        return metrics


def _on_cpu(record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a detection or a target on the CPU; boxes, scores and areas as float32."""
    moved = {key: value.detach().to("cpu") for key, value in record.items() if key in _DTYPES}
    return {key: value.to(_DTYPES[key]) for key, value in moved.items()}


def _why_undefined(records: Records) -> str:
    if len(records.keys) == 0:
        return "no image was evaluated"
    boxes = len(records.fields.object_label)
    what = f"{boxes} boxes, which are all crowd regions or difficult" if boxes else "no boxes"
    return f"the {len(records.keys)} images have {what}"


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(records: Records) -> Records | None:
    """Gather the records of all ranks on rank 0; None on the others."""
    if _world_size() == 1:
        return records
    parts: list[Records] | None = [records] * _world_size() if _rank() == 0 else None
    dist.gather_object(records, parts, dst=0)
    return None if parts is None else merge_records(parts)
