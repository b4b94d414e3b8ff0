"""Random datasets with detections: crowds, empty images, equal scores, missing classes; and their form for COCO."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class RandomDataset(NamedTuple):
    detections: list[dict[str, Tensor]]
    targets: list[dict[str, Tensor]]
    num_classes: int

    def coco(self) -> tuple[dict[str, list], list[dict]]:
        """Annotations and results as COCO's JSON has them; ids count from 1."""
        annotations, results = [], []
        for image, (detection, target) in enumerate(zip(self.detections, self.targets, strict=True), 1):
            for i, box in enumerate(_bboxes(target["boxes"])):
                annotations.append({
                    "id": len(annotations) + 1, "image_id": image, "category_id": int(target["labels"][i]) + 1,
                    "bbox": box, "area": box[2] * box[3], "iscrowd": int(target["iscrowd"][i]),
                })  # fmt: skip
            for i, box in enumerate(_bboxes(detection["boxes"])):
                results.append({
                    "image_id": image, "category_id": int(detection["labels"][i]) + 1, "bbox": box,
                    "score": float(detection["scores"][i]),
                })  # fmt: skip
        images = [{"id": i + 1, "width": 100, "height": 100} for i in range(len(self.targets))]
        categories = [{"id": i + 1, "name": f"c{i}"} for i in range(self.num_classes)]
        return {"images": images, "annotations": annotations, "categories": categories}, results


def random_dataset(seed: int, crowds: bool = True, equal_scores: bool = True) -> RandomDataset:
    """Up to six images of up to six objects of up to four classes, with detections near them and elsewhere.

    Coordinates are multiples of 1/8, so that float32 boxes and float64 widths are the same numbers.
    """
    generator = np.random.default_rng(seed)
    num_classes = int(generator.integers(1, 5))
    detections, targets = [], []
    for _ in range(generator.integers(1, 7)):
        count = int(generator.integers(0, 7))
        boxes = _boxes(generator, count)
        labels = generator.integers(0, num_classes, count)
        crowd = generator.random(count) < (0.2 if crowds else 0.0)
        near = np.repeat(boxes, 2, axis=0) + np.round(generator.normal(0, 4, (2 * count, 4)) * 8) / 8
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        found = np.concatenate([near, _boxes(generator, int(generator.integers(0, 5)))])
        classes = generator.integers(0, num_classes, len(found))
        keep_class = np.flatnonzero(generator.random(2 * count) < 0.7)
        classes[keep_class] = np.repeat(labels, 2)[keep_class]
        step = 20 if equal_scores else 10**6
        scores = generator.integers(1, step, len(found)) / step
        order = np.argsort(-scores, kind="stable")
        detections.append({
            "boxes": torch.tensor(found[order], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(classes[order], dtype=torch.int64),
            "scores": torch.tensor(scores[order], dtype=torch.float32),
        })  # fmt: skip
        targets.append({
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64), "iscrowd": torch.tensor(crowd),
        })  # fmt: skip
    return RandomDataset(detections, targets, num_classes)


def _boxes(generator: np.random.Generator, count: int) -> np.ndarray:
    low = generator.integers(0, 500, (count, 2)) / 8
    return np.concatenate([low, low + generator.integers(24, 300, (count, 2)) / 8], axis=1)


def _bboxes(boxes: Tensor) -> list[list[float]]:
    wide = boxes.double()
    return torch.cat([wide[:, :2], wide[:, 2:] - wide[:, :2]], dim=1).tolist()
