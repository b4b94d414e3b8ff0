"""Matching against pycocotools' evalImgs, and by hand."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from lightning_convnext_det.metrics.matching import Matches, match_detections

Record = dict[str, Tensor]


def random_dataset(seed: int, num_images: int = 12, num_classes: int = 3) -> tuple[list[Record], list[Record]]:
    """Crowded little images: objects, crowds, and detections near them with equal scores now and then."""
    generator = torch.Generator().manual_seed(seed)

    def boxes(count: int) -> Tensor:
        corners = torch.randint(0, 40, (count, 2), generator=generator).float()
        return torch.cat([corners, corners + torch.randint(1, 40, (count, 2), generator=generator)], 1)

    detections, targets = [], []
    for _ in range(num_images):
        num_objects, extra = torch.randint(0, 7, (2,), generator=generator).tolist()
        objects = boxes(num_objects)
        moved = objects.repeat(2, 1) + torch.randint(-2, 3, (2 * num_objects, 4), generator=generator)
        moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
        found = torch.cat([moved, boxes(extra)])
        labels = torch.randint(0, num_classes, (num_objects,), generator=generator)
        detections.append({
            "boxes": found,
            "labels": torch.cat([labels, labels, torch.randint(0, num_classes, (extra,), generator=generator)]),
            "scores": torch.randint(1, 12, (len(found),), generator=generator) / 16,
        })  # fmt: skip
        targets.append({
            "boxes": objects, "labels": labels, "iscrowd": torch.rand(num_objects, generator=generator) < 0.25,
        })  # fmt: skip
    return detections, targets


def evaluated_by_pycocotools(
    detections: list[Record], targets: list[Record], num_classes: int, max_detections: int
) -> COCOeval:
    annotations, results = [], []
    for image, (detection, target) in enumerate(zip(detections, targets, strict=True)):
        for box, label, crowd in zip(*(target[k].tolist() for k in ("boxes", "labels", "iscrowd")), strict=True):
            size = [box[2] - box[0], box[3] - box[1]]
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": [*box[:2], *size],
                "iscrowd": int(crowd), "area": size[0] * size[1],
            })  # fmt: skip
        for box, label, score in zip(*(detection[k].tolist() for k in ("boxes", "labels", "scores")), strict=True):
            results.append({
                "image_id": image, "category_id": label, "score": score,
                "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]],
            })  # fmt: skip
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(len(targets))], "annotations": annotations,
        "categories": [{"id": i} for i in range(num_classes)],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, max_detections]
        evaluation.evaluate()
    return evaluation


@pytest.mark.parametrize("max_detections", [100, 3])
@pytest.mark.parametrize("seed", range(4))
def test_match_detections__equals_pycocotools(seed: int, max_detections: int) -> None:
    detections, targets = random_dataset(seed)
    evaluation = evaluated_by_pycocotools(detections, targets, 3, max_detections)
    params = evaluation.params
    records = iter(evaluation.evalImgs)
    for label in params.catIds:
        for area in params.areaRng:
            matches = match_detections(detections, targets, 3, params.iouThrs, max_detections, tuple(area))
            counted = 0
            for image in params.imgIds:
                expected = next(records)
                own = (matches.image == image) & (matches.label == label)
                if expected is None:
                    assert not own.any()
                    continue
                counted += int((1 - np.array(expected["gtIgnore"])).sum())
                assert matches.score[own] == pytest.approx(expected["dtScores"], abs=1e-7)
                assert (matches.is_ignored[:, own] == expected["dtIgnore"].astype(bool)).all()
                matched = np.array(expected["dtMatches"]) > 0
                assert ((matches.object[:, own] >= 0) == matched).all()
                assert (matches.is_true_positive[:, own] == (matched & ~expected["dtIgnore"].astype(bool))).all()
                same = [objects_of(targets, image, label, ids) for ids in np.array(expected["dtMatches"])]
                assert (np.array(same).reshape(matched.shape) == matches.object[:, own]).all()
            assert matches.num_objects[label] == counted


def objects_of(targets: list[Record], image: int, label: int, ids: np.ndarray) -> list[int]:
    """Positions in the image's target of annotations, whose ids count from 1 over all images; -1 for id 0."""
    before = sum(len(target["labels"]) for target in targets[:image])
    return [int(i) - 1 - before if i else -1 for i in ids]


def one(detection_boxes: list[list[float]], scores: list[float], **target: Tensor) -> Matches:
    detection = {
        "boxes": torch.tensor(detection_boxes), "labels": torch.zeros(len(scores)).long(),
        "scores": torch.tensor(scores),
    }  # fmt: skip
    return match_detections([detection], [{"labels": torch.zeros(len(target["boxes"])).long(), **target}], 1)


def test_match_detections__a_second_detection_of_an_object_is_false() -> None:
    box = [0.0, 0.0, 10.0, 10.0]
    matches = one([box, box], [0.5, 0.75], boxes=torch.tensor([box]))
    assert matches.detection.tolist() == [1, 0]
    assert matches.is_true_positive.tolist() == [[True, False]]
    assert not matches.is_ignored.any()


@pytest.mark.parametrize("flag", ["iscrowd", "difficult"])
def test_match_detections__crowd_and_difficult_take_any_number(flag: str) -> None:
    box = [0.0, 0.0, 10.0, 10.0]
    matches = one([box, box], [0.5, 0.75], boxes=torch.tensor([box]), **{flag: torch.tensor([True])})
    assert matches.is_ignored.all()
    assert matches.num_objects.tolist() == [0]


def test_match_detections__a_part_of_a_crowd_is_ignored_but_not_of_a_difficult_object() -> None:
    part, whole = [[0.0, 0.0, 10.0, 2.0]], torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    assert one(part, [0.5], boxes=whole, iscrowd=torch.tensor([True])).is_ignored.tolist() == [[True]]
    assert one(part, [0.5], boxes=whole, difficult=torch.tensor([True])).is_ignored.tolist() == [[False]]


def test_match_detections__no_image_and_empty_images() -> None:
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    for count in (0, 2):
        matches = match_detections([nothing] * count, [nothing] * count, 4, [0.5, 0.75])
        assert matches.is_true_positive.shape == (2, 0)
        assert matches.num_objects.tolist() == [0, 0, 0, 0]
