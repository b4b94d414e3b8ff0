"""Time and memory of COCO's metrics on random detections: this package, pycocotools, faster-coco-eval, torchmetrics.

``python benchmarks/evaluation.py [--images 5000] [--rounds 1] [--only NAME ...]``: 100 boxes an image, 80 classes, one
thread; each way in a process of its own. Times include what each needs to get from tensors to metrics: building its
dataset, matching, the twelve metrics and the AP of each class. Memory is the growth of the process.
"""

import argparse
import contextlib
import io
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from diagnosis import CLASSES, random_results

BATCH = 16
Results = tuple[list[dict], list[dict]]


def ours(results: Results) -> dict[str, float]:
    from lightning_convnext_det.metrics.coco_map import DetectionEvaluator

    evaluator = DetectionEvaluator([f"c{i}" for i in range(CLASSES)])
    detections, targets = results
    for start in range(0, len(targets), BATCH):
        batch = slice(start, start + BATCH)
        evaluator.update(detections[batch], targets[batch])
    return evaluator.compute()


def _coco(results: Results) -> tuple[dict[str, list], list[dict]]:
    annotations: list[dict] = []
    found: list[dict] = []
    for image, (detection, target) in enumerate(zip(*results, strict=True), 1):
        for box, label in zip(_bboxes(target["boxes"]), target["labels"].tolist(), strict=True):
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": label + 1, "bbox": box,
                "area": box[2] * box[3], "iscrowd": 0,
            })  # fmt: skip
        boxes, labels, scores = _bboxes(detection["boxes"]), detection["labels"].tolist(), detection["scores"].tolist()
        found.extend(
            {"image_id": image, "category_id": label + 1, "bbox": box, "score": score}
            for box, label, score in zip(boxes, labels, scores, strict=True)
        )
    images = [{"id": i + 1, "width": 700, "height": 700} for i in range(len(results[0]))]
    categories = [{"id": i + 1, "name": f"c{i}"} for i in range(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}, found


def _bboxes(boxes: torch.Tensor) -> list[list[float]]:
    wide = boxes.double()
    return torch.cat([wide[:, :2], wide[:, 2:] - wide[:, :2]], 1).tolist()


def _coco_eval(results: Results, coco_class: Any, eval_class: Any, **options: Any) -> dict[str, float]:
    annotations, found = _coco(results)
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = coco_class()
        ground_truth.dataset = annotations
        ground_truth.createIndex()
        evaluation = eval_class(ground_truth, ground_truth.loadRes(found), iouType="bbox", **options)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    classes = {f"map/c{i}": float(precision[:, :, i].mean()) for i in range(CLASSES)}
    return {"map": float(evaluation.stats[0]), "map_small": float(evaluation.stats[3]), **classes}


def pycocotools(results: Results) -> dict[str, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return _coco_eval(results, COCO, COCOeval)


def faster_coco_eval(results: Results) -> dict[str, float]:
    from faster_coco_eval import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    return _coco_eval(results, COCO, COCOeval_faster)


def torchmetrics(results: Results) -> dict[str, float]:
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(class_metrics=True)
    metric.warn_on_many_detections = False
    detections, targets = results
    for start in range(0, len(targets), BATCH):
        metric.update(detections[start : start + BATCH], targets[start : start + BATCH])
    with contextlib.redirect_stdout(io.StringIO()):
        found = metric.compute()
    return {"map": float(found["map"]), "map_small": float(found["map_small"])}


WAYS: dict[str, Callable[[Results], dict[str, float]]] = {
    "this package": ours, "pycocotools": pycocotools, "faster-coco-eval": faster_coco_eval,
    "torchmetrics, default": torchmetrics,
}  # fmt: skip


def measure(name: str, images: int, answer: Any) -> None:
    torch.set_num_threads(1)
    results = random_results(images)
    if name == "this package":
        ours(random_results(8))  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, used = time.perf_counter(), time.process_time()
    values = WAYS[name](results)
    seconds, processor = time.perf_counter() - start, time.process_time() - used
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    answer.send((seconds, processor, grown, values["map"], values["map_small"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(WAYS))
    options = parser.parse_args()
    print(f"{options.images} images x 100 boxes x {CLASSES} classes, best of {options.rounds}")
    print(f"{'':<24}{'seconds':>9}{'processor':>11}{'memory':>10}   mAP, mAP small")
    measured: dict[str, list[tuple]] = {name: [] for name in options.only}
    context = multiprocessing.get_context("spawn")
    for _ in range(options.rounds):
        for name in options.only:
            there, here = context.Pipe()
            process = context.Process(target=measure, args=(name, options.images, here))
            process.start()
            measured[name].append(there.recv())
            process.join()
    least = {name: min(row[1] for row in rows) for name, rows in measured.items()}
    for name, rows in measured.items():
        grown = statistics.median(row[2] for row in rows)
        print(f"{name:<24}{min(r[0] for r in rows):>9.2f}{least[name]:>11.2f}{grown:>7.0f} MB   "
              f"{rows[0][3]:.12f}, {rows[0][4]:.12f}", flush=True)  # fmt: skip
    if "this package" in least:
        ratios = {name: least["this package"] / seconds for name, seconds in least.items() if name != "this package"}
        print("this package takes " + ", ".join(f"{ratio:.2f} of {name}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
