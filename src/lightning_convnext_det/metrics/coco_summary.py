"""COCO's twelve metrics and the AP of each class from the records of images.

References:
    ``COCOeval.accumulate`` and ``summarize`` of pycocotools; APr, APc and APf: ``LVISEval`` of lvis-api.
"""

from collections.abc import Sequence
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.arguments import Frequency
from lightning_convnext_det.metrics.average_precision import mean_over_classes, order_by_class, precision_areas
from lightning_convnext_det.metrics.evaluation_records import Records

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
AREA_RANGES = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))  # all, small, medium, large
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
FREQUENCY_METRICS = tuple(f"map_{frequency}" for frequency in get_args(Frequency))
_RANGES, _THRESHOLDS = len(AREA_RANGES), len(IOU_THRESHOLDS)
_FEW = (1, 10)  # detections of an image for mar_1 and mar_10


class ClassTables(NamedTuple):
    """AP and recall of each class; nan where a class has no object."""

    ap: NDArray[np.float64]
    """By range of areas and IoU threshold, [A, T, C]."""
    recall: NDArray[np.float64]
    """Of all detections, [A, T, C]."""
    recall_of_few: NDArray[np.float64]
    """Of the best detection and of the best ten of each class in an image, all areas, [2, T, C]."""


class Outcomes(NamedTuple):
    """The detections of all images at IoU 0.5, as `ScoredDetections`."""

    image: NDArray[np.int64]
    label: NDArray[np.int64]
    score: NDArray[np.float32]
    is_true_positive: NDArray[np.bool_]
    """[1, N]."""
    is_ignored: NDArray[np.bool_]
    """[1, N]."""
    num_objects: NDArray[np.int64]


def outcomes(records: Records, num_classes: int) -> Outcomes:
    """The detections at the first IoU threshold, objects of all areas."""
    fields = records.fields
    right, ignored = ((flags & 1).astype(np.bool_)[None] for flags in (fields.right, fields.ignored))
    num_objects = _count_objects(records, num_classes)[0]
    return Outcomes(records.image, fields.label.astype(np.int64), fields.score, right, ignored, num_objects)


def evaluate_classes(records: Records, num_classes: int) -> ClassTables:
    """Compute AP and recall of each class."""
    fields, num_objects = records.fields, _count_objects(records, num_classes)
    order = order_by_class(fields.label, fields.score)
    bounds = np.searchsorted(fields.label[order], np.arange(num_classes + 1))
    shape = (_RANGES, _THRESHOLDS, num_classes)
    tables = ClassTables(np.full(shape, np.nan), np.full(shape, np.nan), np.full((len(_FEW), *shape[1:]), np.nan))
    for label in np.flatnonzero(num_objects[0]):
        rows = order[bounds[label] : bounds[label + 1]]
        right, ignored = (_unpack(flags[rows]) for flags in (fields.right, fields.ignored))  # [A * T, N]
        counts = np.repeat(num_objects[:, label], _THRESHOLDS)
        tables.ap[..., label] = precision_areas(right, ignored, counts).reshape(_RANGES, _THRESHOLDS)
        found = np.where(counts > 0, right.sum(1) / np.maximum(counts, 1), np.nan)
        tables.recall[..., label] = found.reshape(_RANGES, _THRESHOLDS)
        for table, limit in zip(tables.recall_of_few, _FEW, strict=True):
            table[:, label] = right[:_THRESHOLDS, fields.rank[rows] < limit].sum(1) / num_objects[0, label]
    return tables


def summarize(
    tables: ClassTables, names: Sequence[str], class_names: Sequence[str], frequencies: Sequence[Frequency] = ()
) -> dict[str, float]:
    """COCO's twelve metrics, LVIS's three where frequencies are given, and the AP of each class.

    Args:
        tables: of all classes.
        names: of COCO's twelve metrics.
        class_names: in order of label.
        frequencies: of the classes in the training images, in order of label; empty if they are not known.
    """
    ap, recall = ((_mean(table) for table in group) for group in (tables.ap, tables.recall))
    every, *sizes = ap
    all_recall, *recall_sizes = recall
    values = [
        every, _mean(tables.ap[0, 0]), _mean(tables.ap[0, IOU_THRESHOLDS.index(0.75)]), *sizes,
        *(_mean(table) for table in tables.recall_of_few), all_recall, *recall_sizes,
    ]  # fmt: skip
    metrics = dict(zip(names, values, strict=True))
    if frequencies:
        groups = np.asarray(frequencies)
        for name, frequency in zip(FREQUENCY_METRICS, get_args(Frequency), strict=True):
            metrics[name] = _mean(tables.ap[0][:, groups == frequency])
    metrics |= {f"map/{name}": float(value) for name, value in zip(class_names, tables.ap[0].mean(0), strict=True)}
    return metrics


def _mean(table: NDArray[np.float64]) -> float:
    """Over thresholds and the classes that have objects; nan if none has."""
    return float(mean_over_classes(np.atleast_2d(table).mean(0)))


def _count_objects(records: Records, num_classes: int) -> NDArray[np.int64]:
    """Objects of each class that count in each range of areas, [A, C]."""
    label, areas = records.fields.object_label, records.fields.object_areas
    return np.stack(
        [np.bincount(label[areas >> index & 1 > 0], minlength=num_classes).astype(np.int64) for index in range(_RANGES)]
    )


def _unpack(flags: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The bits of all ranges and thresholds, [A * T, N]."""
    bits = np.empty((_RANGES * _THRESHOLDS, len(flags)), np.bool_)
    for number, bit in enumerate(bits):  # row by row: all at once would take eight times the memory
        np.not_equal(flags & (1 << number), 0, out=bit)
    return bits
