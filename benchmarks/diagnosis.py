"""Time and memory of the report's metrics on random detections, beside pycocotools and torchmetrics' default.

``python benchmarks/diagnosis.py [images]``: 100 boxes an image, 80 classes, one process, one thread.
"""

import contextlib
import io
import resource
import sys
import time

import numpy as np
import torch
from torchmetrics.detection import MeanAveragePrecision

from lightning_convnext_det.metrics.average_precision import average_precision, bootstrap_ap, resampling_weights
from lightning_convnext_det.metrics.calibration import localization_aware_ece, optimal_lrp, reliability
from lightning_convnext_det.metrics.confusion import confusion_matrix
from lightning_convnext_det.metrics.error_breakdown import break_down_errors
from lightning_convnext_det.metrics.grouping import image_losses
from lightning_convnext_det.metrics.matching import match_detections
from lightning_convnext_det.metrics.objects import flatten_targets
from lightning_convnext_det.metrics.overlaps import detection_boxes, find_overlaps

CLASSES, BOXES, OBJECTS = 80, 100, 7
IOUS = np.linspace(0.5, 0.95, 10).tolist()


def random_results(images: int) -> tuple[list, list]:
    generator = np.random.default_rng(0)
    detections, targets = [], []
    for _ in range(images):
        low = generator.uniform(0, 500, (OBJECTS, 2))
        boxes = np.concatenate([low, low + generator.uniform(10, 120, (OBJECTS, 2))], 1)
        labels = generator.integers(0, CLASSES, OBJECTS)
        low = generator.uniform(0, 500, (BOXES - OBJECTS, 2))
        others = np.concatenate([low, low + generator.uniform(10, 120, (BOXES - OBJECTS, 2))], 1)
        found = np.concatenate([boxes + generator.normal(0, 4, boxes.shape), others])
        classes = np.concatenate([labels, generator.integers(0, CLASSES, BOXES - OBJECTS)])
        scores = np.concatenate([generator.beta(4, 2, OBJECTS), generator.beta(1, 6, BOXES - OBJECTS)])
        detections.append({
            "boxes": torch.tensor(found, dtype=torch.float32), "labels": torch.tensor(classes),
            "scores": torch.tensor(scores, dtype=torch.float32),
        })  # fmt: skip
        targets.append({"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)})
    return detections, targets


def own(detections: list, targets: list, bootstrap: bool) -> float:
    matches = match_detections(detections, targets, CLASSES, IOUS)
    objects = flatten_targets(targets)
    overlaps = find_overlaps(matches, detection_boxes(matches, detections), objects)
    value = float(np.nanmean(average_precision(matches)))
    break_down_errors(matches, overlaps, objects)
    confusion_matrix(detections, targets, CLASSES, 0.3)
    reliability(matches, overlaps.matched_iou)
    localization_aware_ece(matches, overlaps.matched_iou)
    optimal_lrp(matches, overlaps.matched_iou)
    image_losses(matches, objects)
    if bootstrap:
        bootstrap_ap(matches, objects.per_image(CLASSES), resampling_weights(len(targets), 400))
    return value


def torchmetrics_default(detections: list, targets: list) -> float:
    metric = MeanAveragePrecision(class_metrics=True)
    metric.update(detections, targets)
    with contextlib.redirect_stdout(io.StringIO()):
        return float(metric.compute()["map"])


def main() -> None:
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    torch.set_num_threads(1)
    detections, targets = random_results(images)
    print(f"{images} images x {BOXES} boxes x {CLASSES} classes")
    rows = {
        "metrics of the report, without bootstrap": lambda: own(detections, targets, False),
        "metrics of the report, 400 resamples": lambda: own(detections, targets, True),
        "torchmetrics, default (pycocotools)": lambda: torchmetrics_default(detections, targets),
    }
    for name, run in rows.items():
        start, used = time.perf_counter(), time.process_time()
        value = run()
        seconds, processor = time.perf_counter() - start, time.process_time() - used
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        cost = f"{seconds:7.1f} s  {processor:7.1f} s of the processor  peak {peak} MB"
        print(f"{name:<42} {cost}  mAP {value:.6f}", flush=True)


if __name__ == "__main__":
    main()
