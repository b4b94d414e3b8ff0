import contextlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection import MeanAveragePrecision

from lightning_convnext_det.errors import DataError, DivergenceError
from lightning_convnext_det.metrics import evaluation_records
from lightning_convnext_det.metrics.coco_map import DetectionEvaluator
from lightning_convnext_det.metrics.coco_summary import METRICS
from lightning_convnext_det.types import Detection, Target
from tests.metrics.random_datasets import random_dataset

PAIRS = ["coco_fakebbox100", "coco_fakebbox100_boxarea", "fce_crowd1img", "odm_sample2", "podm_voc38", "voc2012_100"]


def detection(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detection:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "scores": torch.tensor(scores),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def target(image_id: int, boxes: list[list[float]], labels: list[int], **more: Any) -> Target:
    return {
        "image_id": image_id,
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        **more,
    }


def corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def read_pair(truth: dict[str, Any], found: list[dict[str, Any]]) -> tuple[list[Detection], list[Target], list[int]]:
    ids = sorted(c["id"] for c in truth["categories"])
    label = {c: i for i, c in enumerate(ids)}
    detections, targets = [], []
    for image in truth["images"]:
        own = [d for d in found if d["image_id"] == image["id"]]
        boxes = [corners(d["bbox"]) for d in own]
        detections.append(detection(boxes, [d["score"] for d in own], [label[d["category_id"]] for d in own]))
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        targets.append(
            target(
                image["id"],
                [corners(a["bbox"]) for a in own],
                [label[a["category_id"]] for a in own],
                iscrowd=torch.tensor([bool(a.get("iscrowd", 0)) for a in own], dtype=torch.bool),
                area=torch.tensor([float(a["area"]) for a in own]),
            )
        )
    return detections, targets, ids


@pytest.mark.heavy
@pytest.mark.parametrize("pair", PAIRS)
def test_evaluator__equals_pycocotools_on_published_pairs(shared_data: Path, pair: str) -> None:
    folder = shared_data / "metric_refs" / pair
    truth, found, expected = (json.loads((folder / f"{n}.json").read_text()) for n in ("gt", "dt", "expected"))
    detections, targets, ids = read_pair(truth, found)
    evaluator = DetectionEvaluator([str(i) for i in ids])
    evaluator.update(detections, targets)
    metrics = evaluator.compute()
    for name, value in zip(METRICS, expected["pycocotools_stats"].values(), strict=True):
        if value == -1:
            assert math.isnan(metrics[name]), name
        else:
            assert metrics[name] == pytest.approx(value, abs=1e-6), name
    for category, values in expected.get("pycocotools_per_category", {}).items():
        if values["AP"] != -1:
            assert metrics[f"map/{category}"] == pytest.approx(values["AP"], abs=1e-6)


def as_in_torchvision(target: Target) -> Target:
    """The target as torchvision's tutorials have it."""
    boxes = target["boxes"] if len(target["boxes"]) else torch.tensor([])
    image_id, iscrowd = torch.tensor([target["image_id"]]), target["iscrowd"].long()
    return {**target, "boxes": boxes, "image_id": image_id, "iscrowd": iscrowd}


@pytest.mark.parametrize("form", [dict, as_in_torchvision])
def test_evaluator__equals_pycocotools_on_noisy_boxes_of_real_images(
    form: Callable[[Target], Target], shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shared_data / "coco_mini" / "annotations" / "instances_val2017.json"
    truth = json.loads(file.read_text())
    generator = torch.Generator().manual_seed(0)
    found = []
    for annotation in truth["annotations"]:
        shift = (torch.randn(4, generator=generator) * 6).tolist()
        box = [v + s for v, s in zip(annotation["bbox"], shift, strict=True)]
        if min(box[2:]) > 1 and not annotation["iscrowd"]:
            score = round(float(torch.rand((), generator=generator)), 2)  # two digits: many ties
            found.append({**{k: annotation[k] for k in ("image_id", "category_id")}, "bbox": box, "score": score})
    (tmp_path / "dt.json").write_text(json.dumps(found))
    coco = COCO(str(file))
    reference = COCOeval(coco, coco.loadRes(str(tmp_path / "dt.json")), "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    capsys.readouterr()
    detections, targets, ids = read_pair(truth, found)
    evaluator = DetectionEvaluator([str(i) for i in ids])
    for d, t in reversed(list(zip(detections, targets, strict=True))):  # the order of arrival must not matter
        evaluator.update([d], [form(t)])
    metrics = evaluator.compute()
    assert 0.1 < metrics["map"] < 0.9
    for name, value in zip(METRICS, reference.stats, strict=True):
        assert metrics[name] == pytest.approx(value, abs=1e-6), name
    assert capsys.readouterr().out == ""


def test_evaluator__truth_as_prediction_is_exactly_one(shared_data: Path) -> None:
    truth = json.loads((shared_data / "coco_mini" / "annotations" / "instances_val2017.json").read_text())
    _, targets, ids = read_pair(truth, [])
    perfect = [
        detection(
            t["boxes"][~t["iscrowd"]].tolist(), [1.0] * int((~t["iscrowd"]).sum()), t["labels"][~t["iscrowd"]].tolist()
        )
        for t in targets
    ]
    evaluator = DetectionEvaluator([str(i) for i in ids])
    evaluator.update(perfect, targets)
    metrics = evaluator.compute()
    assert metrics["map"] == metrics["map_50"] == metrics["map_75"] == metrics["mar_100"] == 1.0


def test_evaluator__a_image_counts_once_and_reset_forgets() -> None:
    evaluator = DetectionEvaluator(["cat", "dog"])
    box = [[0.0, 0.0, 10.0, 10.0]]
    for _ in range(3):
        evaluator.update([detection(box, [0.9], [0])], [target(1, box, [0])])
    evaluator.update([detection([], [], [])], [target(2, box, [0])])
    metrics = evaluator.compute()
    assert metrics["map_50"] == pytest.approx(
        51 / 101
    )  # one of two found: recall thresholds 0 ... 0.5 have precision 1
    assert metrics["map/cat"] == pytest.approx(51 / 101)
    assert math.isnan(metrics["map/dog"])
    evaluator.reset()
    assert math.isnan(evaluator.compute()["map"])


@pytest.mark.parametrize(
    ("boxes", "labels", "crowd"),
    [([], [], []), ([[0.0, 0.0, 9.0, 9.0]], [0], [True])],
    ids=["no objects", "only a crowd"],
)
def test_evaluator__undefined_is_nan(boxes: list[list[float]], labels: list[int], crowd: list[bool]) -> None:
    evaluator = DetectionEvaluator(["cat"])
    targets = [target(1, boxes, labels, iscrowd=torch.tensor(crowd, dtype=torch.bool))]
    evaluator.update([detection([[0, 0, 5, 5]], [0.5], [0])], targets)
    assert all(math.isnan(value) for value in evaluator.compute().values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_evaluator__refuses_non_finite_predictions(bad: float) -> None:
    evaluator = DetectionEvaluator(["cat"])
    for found in (detection([[0, 0, bad, 5]], [0.5], [0]), detection([[0, 0, 5, 5]], [bad], [0])):
        with pytest.raises(DivergenceError, match=r"LCD-E010.*'a.jpg' are not finite"):
            evaluator.update([found], [target(1, [], [], file_name="a.jpg")])


@pytest.mark.parametrize("form", [int, lambda i: torch.tensor(i), lambda i: torch.tensor([i]), np.int64])
def test_evaluator__equal_image_ids_are_one_image(form: Callable[[int], object]) -> None:
    evaluator = DetectionEvaluator(["cat"])
    box = [[0.0, 0.0, 10.0, 10.0]]
    for _ in range(2):
        evaluator.update([detection(box, [0.9], [0])], [target(form(1), box, [0])])
    evaluator.update([detection([], [], [])], [target(2, box, [0])])
    assert evaluator.compute()["map_50"] == pytest.approx(51 / 101)  # one of two found; of three it would be 34 / 101


def test_evaluator__targets_without_image_id_are_different_images() -> None:
    evaluator = DetectionEvaluator(["cat"])
    one = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.tensor([0])}
    for found in (detection([[0.0, 0.0, 10.0, 10.0]], [0.9], [0]), detection([], [], [])):
        evaluator.update([found], [one])
    assert evaluator.compute()["map_50"] == pytest.approx(51 / 101)


@pytest.mark.parametrize("image_id", ["a", 1.5, torch.tensor([1, 2]), torch.tensor(1.0)])
def test_evaluator__refuses_image_ids_that_are_not_integers(image_id: object) -> None:
    with pytest.raises(TypeError, match=r"image_id is .*; give an int or a tensor with one integer"):
        DetectionEvaluator(["cat"]).update([detection([], [], [])], [target(image_id, [], [])])


def test_evaluator__a_hundred_detections_per_image_count() -> None:
    boxes = [[0.0, 0.0, 10.0, 10.0]] * 150
    evaluator = DetectionEvaluator(["cat"])
    evaluator.update(
        [detection([[50.0, 50.0, 60.0, 60.0]] * 100 + boxes, [0.9] * 100 + [0.5] * 150, [0] * 250)],
        [target(1, [[0.0, 0.0, 10.0, 10.0]], [0])],
    )
    assert evaluator.compute()["map"] == 0.0


def test_evaluator__max_detections_and_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(300, 2, generator=generator) * 2000
    boxes = torch.cat([corner, corner + 20], 1).tolist()
    found = detection(boxes, torch.linspace(0, 1, 300).tolist(), [0] * 300)
    for limit, expected in ((100, 100 / 300), (300, 1.0)):
        evaluator = DetectionEvaluator(["cat"], limit)
        caplog.clear()
        for image_id in (1, 2):
            evaluator.update([found], [target(image_id, boxes, [0] * 300)])
        metrics = evaluator.compute()
        assert metrics[f"mar_{limit}"] == pytest.approx(expected)
        assert list(metrics) == [*evaluator.names, "map/cat"]
        assert metrics["map"] == pytest.approx(34 / 101 if limit == 100 else 1.0, rel=1e-6)
        assert [record.message.partition(" but")[0] for record in caplog.records] == (
            ["[LCD-E002] 'image 1' has 300 objects,"] if limit == 100 else []
        )
    with pytest.raises(ValueError, match="max_detections is 10; it must be at least 11"):
        DetectionEvaluator(["cat"], 10)


def voc_average_precision(
    found: list[tuple[list[float], float]], objects: list[tuple[list[float], bool]], threshold: float
) -> float:
    """AP of one image by the rule of VOC's development kit for difficult objects, with COCO's 101 recall thresholds."""
    hits, taken = [], set()
    for box, _ in sorted(found, key=lambda x: -x[1]):
        overlaps = [iou(box, other) for other, _ in objects]
        best = max(range(len(objects)), key=lambda i: overlaps[i])
        if overlaps[best] >= threshold and objects[best][1]:
            continue  # neither right nor wrong
        hits.append(overlaps[best] >= threshold and best not in taken)
        taken.add(best) if hits[-1] else None
    count = sum(not difficult for _, difficult in objects)
    right = np.cumsum(hits)
    precision, recall = right / np.arange(1, len(hits) + 1), right / count
    return float(np.mean([max(precision[recall >= r - 1e-12], default=0.0) for r in np.linspace(0, 1, 101)]))


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(0.0, width) * max(0.0, height)
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([([50.0, 50, 70, 70], 0.9), ([300.0, 300, 400, 400], 0.5)], 0.5),  # IoU 0.01 with the difficult: wrong
        ([([0.0, 0, 200, 190], 0.9), ([300.0, 300, 400, 400], 0.5)], 1.0),  # IoU 0.95: neither right nor wrong
        ([([0.0, 0, 200, 190], 0.9), ([0.0, 0, 200, 195], 0.8), ([300.0, 300, 400, 400], 0.5)], 1.0),  # nor two
        ([([0.0, 0, 200, 190], 0.9), ([300.0, 300, 400, 400], 0.8), ([300.0, 300, 400, 399], 0.7)], 1.0),
        ([([0.0, 0, 200, 190], 0.9), ([300.0, 300, 400, 230 + 100], 0.8)], 0.0),
    ],
    ids=["inside", "on", "two on", "double", "missed"],
)
def test_evaluator__difficult_objects_are_ignored_by_vocs_rule(
    found: list[tuple[list[float], float]], expected: float
) -> None:
    objects = [([300.0, 300, 400, 400], False), ([0.0, 0, 200, 200], True)]
    evaluator = DetectionEvaluator(["cat"])
    flags = torch.tensor([difficult for _, difficult in objects])
    given = target(1, [box for box, _ in objects], [0, 0], difficult=flags)
    evaluator.update([detection([box for box, _ in found], [s for _, s in found], [0] * len(found))], [given])
    metrics = evaluator.compute()
    assert metrics["map_50"] == pytest.approx(voc_average_precision(found, objects, 0.5))
    assert metrics["map_50"] == pytest.approx(expected, abs=1e-6)
    assert metrics["map_75"] == pytest.approx(voc_average_precision(found, objects, 0.75))


def test_evaluator__equals_pycocotools_to_12_digits() -> None:
    """With crowds, equal scores, empty images, missing classes."""
    seen = 0
    for seed in range(40):
        dataset = random_dataset(seed)
        annotations, results = dataset.coco()
        if not results:
            continue
        ground_truth = COCO()
        ground_truth.dataset = annotations
        with contextlib.redirect_stdout(io.StringIO()):
            ground_truth.createIndex()
            reference = COCOeval(ground_truth, ground_truth.loadRes(results), "bbox")
            reference.evaluate()
            reference.accumulate()
            reference.summarize()
        evaluator = DetectionEvaluator([f"c{i}" for i in range(dataset.num_classes)])
        targets = [{**one, "image_id": i} for i, one in enumerate(dataset.targets)]
        evaluator.update(dataset.detections, targets)
        metrics = evaluator.compute()
        expected = np.where(reference.stats < 0, np.nan, reference.stats)
        np.testing.assert_allclose([metrics[name] for name in METRICS], expected, atol=1e-12)
        precision = reference.eval["precision"][:, :, :, 0, -1].mean((0, 1))
        per_class = [metrics[f"map/c{i}"] for i in range(dataset.num_classes)]
        np.testing.assert_allclose(per_class, np.where(precision < 0, np.nan, precision), atol=1e-12)
        seen += not math.isnan(metrics["map"])
    assert seen > 20


def test_evaluator__equals_torchmetrics() -> None:
    """The detections and targets are torchmetrics', and so are the metrics' names and values."""
    dataset = random_dataset(11)
    metric = MeanAveragePrecision(
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(), rec_thresholds=np.linspace(0, 1, 101).tolist()
    )
    metric.update(dataset.detections, dataset.targets)
    expected = metric.compute()
    evaluator = DetectionEvaluator([f"c{i}" for i in range(dataset.num_classes)])
    evaluator.update(dataset.detections, dataset.targets)
    metrics = evaluator.compute()
    assert metrics["map"] > 0.05
    for name in METRICS:
        value = float(expected[name])
        assert metrics[name] == pytest.approx(math.nan if value == -1 else value, abs=1e-6, nan_ok=True), name


def test_evaluator__keeps_no_boxes() -> None:
    dataset = random_dataset(11)
    evaluator = DetectionEvaluator([f"c{i}" for i in range(dataset.num_classes)])
    evaluator.update(dataset.detections, dataset.targets)
    records = evaluator._records.join()
    num_detections, num_objects = (sum(len(r["labels"]) for r in rows) for rows in dataset[:2])
    assert sum(field.nbytes for field in records.fields) == 28 * num_detections + 5 * num_objects


def test_evaluator__refuses_labels_beyond_the_classes() -> None:
    box = [[0.0, 0.0, 9.0, 9.0]]
    for found, objects in ((2, 0), (0, 2), (-1, 0)):
        with pytest.raises(DataError, match=r"LCD-D110.*label (2|-1) in 'a.jpg'.*2 classes; labels run from 0 to 1"):
            DetectionEvaluator(["cat", "dog"]).update(
                [detection(box, [0.5], [found])], [target(1, box, [objects], file_name="a.jpg")]
            )


@pytest.mark.parametrize("parts", [2, 3, 256])
def test_evaluator__joins_batches_on_the_way(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = random_dataset(12)
    names = [f"c{i}" for i in range(dataset.num_classes)]
    whole, single = DetectionEvaluator(names), DetectionEvaluator(names)
    targets = [{**one, "image_id": 7 - i} for i, one in enumerate(dataset.targets)]
    whole.update(dataset.detections, targets)
    monkeypatch.setattr(evaluation_records, "_PARTS", parts)
    wrong = [{**one, "scores": 1 - one["scores"]} for one in dataset.detections]
    for found in (wrong, dataset.detections):  # the second time counts
        for detection, annotated in zip(found, targets, strict=True):
            single.update([detection], [annotated])
    expected, joined = whole._records.join(), single._records.join()
    assert len(single._records) == 2 * len(whole._records)
    assert np.array_equal(joined.keys, expected.keys)
    for one, other in zip(joined.fields, expected.fields, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    assert single.compute() == pytest.approx(whole.compute(), abs=0, nan_ok=True)
