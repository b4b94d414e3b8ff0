"""AP, error breakdown, confusion matrix and calibration against hotcoco, TIDE's own package and loops."""

import contextlib
import io
import math

import hotcoco
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_convnext_det.metrics.average_precision import average_precision
from lightning_convnext_det.metrics.calibration import (
    detection_ece,
    localization_aware_ece,
    optimal_lrp,
    reliability,
)
from lightning_convnext_det.metrics.confusion import confusion_matrix
from lightning_convnext_det.metrics.error_breakdown import KINDS, ErrorBreakdown, break_down_errors
from lightning_convnext_det.metrics.matching import Matches, match_detections
from lightning_convnext_det.metrics.objects import Objects, flatten_targets
from lightning_convnext_det.metrics.overlaps import Overlaps, detection_boxes, find_overlaps
from tests.metrics.random_datasets import RandomDataset, random_dataset

IOUS = np.linspace(0.5, 0.95, 10).tolist()
SEEDS = st.integers(0, 10**6)
few = settings(max_examples=12, deadline=None, derandomize=True)
many = settings(max_examples=200, deadline=None, derandomize=True)


def evaluated(dataset: RandomDataset) -> hotcoco.COCOeval | None:
    """hotcoco's evaluation; None for a dataset that it cannot load, without detections or objects."""
    annotations, results = dataset.coco()
    if not results or not annotations["annotations"]:
        return None
    ground_truth = hotcoco.COCO(annotations)
    evaluation = hotcoco.COCOeval(ground_truth, ground_truth.load_res(results), "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.run()
    return evaluation


def diagnosed(dataset: RandomDataset) -> tuple[Matches, Objects, Overlaps, ErrorBreakdown]:
    matches = match_detections(dataset.detections, dataset.targets, dataset.num_classes, IOUS)
    objects = flatten_targets(dataset.targets)
    overlaps = find_overlaps(matches, detection_boxes(matches, dataset.detections), objects)
    return matches, objects, overlaps, break_down_errors(matches, overlaps, objects)


def without_crowds(dataset: RandomDataset) -> RandomDataset:
    targets = [{name: value[~target["iscrowd"]] for name, value in target.items()} for target in dataset.targets]
    return dataset._replace(targets=targets)


def check_against_hotcoco(seed: int) -> None:
    dataset = random_dataset(seed)
    if (oracle := evaluated(dataset)) is None:
        return
    matches, _, overlaps, _ = diagnosed(dataset)
    precision = np.asarray(oracle.eval["precision"])[:, :, :, 0, -1].mean(1)
    np.testing.assert_allclose(average_precision(matches), np.where(precision < 0, np.nan, precision), atol=1e-12)
    table = reliability(matches, overlaps.matched_iou)
    expected = oracle.calibration(n_bins=10)
    if expected["num_detections"]:
        assert detection_ece(table) == pytest.approx(expected["ece"], abs=1e-6)
    assert table.num_detections.tolist() == [bin["count"] for bin in expected["bins"]]


def check_order_free_against_hotcoco(seed: int) -> None:
    """Where no scores are equal and no crowds are annotated; docs/metrics.md says what differs with them."""
    dataset = random_dataset(seed, crowds=False, equal_scores=False)
    if (oracle := evaluated(dataset)) is None:
        return
    *_, breakdown = diagnosed(dataset)
    expected = oracle.tide_errors()
    assert breakdown.num_errors == expected["counts"]
    assert breakdown.loss == pytest.approx(expected["delta_ap"], abs=1e-6)
    assert breakdown.ap == pytest.approx(expected["ap_base"], abs=1e-6)
    for score in (0.0, 0.5):
        matrix = confusion_matrix(dataset.detections, dataset.targets, dataset.num_classes, score)
        assert matrix.tolist() == oracle.confusion_matrix(iou_thr=0.5, min_score=score)["matrix"].tolist()


@pytest.mark.heavy
@given(seed=SEEDS)
@few
def test_average_precision__equals_hotcoco(seed: int) -> None:
    check_against_hotcoco(seed)


@pytest.mark.heavy
@given(seed=SEEDS)
@few
def test_break_down_errors__equals_hotcoco(seed: int) -> None:
    check_order_free_against_hotcoco(seed)


@pytest.mark.slow
@given(seed=SEEDS)
@many
def test_diagnostics__equal_hotcoco_on_many(seed: int) -> None:
    check_against_hotcoco(seed)
    check_order_free_against_hotcoco(seed)


def tide(dataset: RandomDataset) -> dict[str, float]:
    tidecv = pytest.importorskip("tidecv")
    from tidecv.data import Data

    ground_truth, predictions = Data("ground truth"), Data("predictions")
    annotations, results = dataset.coco()
    for category in annotations["categories"]:
        ground_truth.add_class(category["id"], category["name"])
    for image in annotations["images"]:
        ground_truth.add_image(image["id"], str(image["id"]))
    for record in annotations["annotations"]:
        ground_truth.add_ground_truth(record["image_id"], record["category_id"], record["bbox"])
    for record in results:
        predictions.add_detection(record["image_id"], record["category_id"], record["score"], record["bbox"])
    run = tidecv.TIDE()
    run.evaluate(ground_truth, predictions, mode="bbox", pos_threshold=0.5, background_threshold=0.1, name="x")
    errors = run.get_all_errors()
    special = errors["special"]["x"]
    return {**errors["main"]["x"], "FP": special["FalsePos"], "FN": special["FalseNeg"]}


def check_against_tide(seed: int) -> None:
    dataset = random_dataset(seed, crowds=False, equal_scores=False)
    matches, *_, breakdown = diagnosed(dataset)
    # recalls of n objects meet the 101 thresholds between rounding errors unless n and 10 have no common factor;
    # TIDE counts a class that is detected but not annotated as AP 0
    if len(matches.score) == 0 or any(n == 0 or math.gcd(int(n), 10) > 1 for n in matches.num_objects):
        return
    assert {k: 100 * v for k, v in breakdown.loss.items()} == pytest.approx(tide(dataset), abs=1e-6)


@pytest.mark.heavy
@given(seed=SEEDS)
@few
def test_break_down_errors__equals_tide(seed: int) -> None:
    check_against_tide(seed)


@pytest.mark.slow
@given(seed=SEEDS)
@many
def test_break_down_errors__equals_tide_on_many(seed: int) -> None:
    check_against_tide(seed)


def test_break_down_errors__names_each_kind() -> None:
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    far = box + 50
    half = torch.tensor([[0.0, 0.0, 10.0, 4.0]])
    dataset = RandomDataset(
        detections=[
            {"boxes": torch.cat([box, box, far, half]), "labels": torch.tensor([0, 0, 0, 0]),
             "scores": torch.tensor([0.9, 0.8, 0.7, 0.6])},
            {"boxes": torch.cat([box, half]), "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.5, 0.4])},
        ],
        targets=[
            {"boxes": torch.cat([box, far + 100]), "labels": torch.tensor([0, 1]), "iscrowd": torch.zeros(2).bool()},
            {"boxes": box, "labels": torch.tensor([0]), "iscrowd": torch.zeros(1).bool()},
        ],
        num_classes=2,
    )  # fmt: skip
    *_, breakdown = diagnosed(dataset)
    assert [KINDS[k] if k >= 0 else "right" for k in breakdown.kind] == ["right", "Dupe", "Bkg", "Loc", "Cls", "Both"]
    assert breakdown.num_errors == {"Cls": 1, "Loc": 1, "Both": 1, "Dupe": 1, "Bkg": 1, "Miss": 1}
    assert breakdown.is_missed.tolist() == [False, True, False]


def test_confusion_matrix__leaves_crowds_out() -> None:
    dataset = random_dataset(2)
    plain = without_crowds(dataset)
    with_crowds = confusion_matrix(dataset.detections, dataset.targets, dataset.num_classes)
    alone = confusion_matrix(plain.detections, plain.targets, plain.num_classes)
    assert with_crowds[:-1].tolist() == alone[:-1].tolist()
    assert (with_crowds[-1] <= alone[-1]).all()
    assert with_crowds[-1].sum() < alone[-1].sum()


def test_confusion_matrix__a_threshold_for_each_class() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [30.0, 30.0, 40.0, 40.0]])
    labels = torch.tensor([0, 1])
    detection = {"boxes": boxes, "labels": labels, "scores": torch.tensor([0.5, 0.5])}
    matrix = confusion_matrix([detection], [{"boxes": boxes, "labels": labels}], 2, score_threshold=[0.5, 0.6])
    assert matrix.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def lrp_by_loop(matches: Matches, matched_iou: np.ndarray, label: int) -> float:
    """The definition, one threshold after the other."""
    best = 1.0
    for limit in matches.score:
        kept = [
            i
            for i in range(len(matches.score))
            if matches.label[i] == label and matches.score[i] >= limit and not matches.is_ignored[0][i]
        ]
        true = [i for i in kept if matches.is_true_positive[0][i]]
        false, missed = len(kept) - len(true), matches.num_objects[label] - len(true)
        error = (sum((1 - matched_iou[i]) / 0.5 for i in true) + false + missed) / (len(true) + false + missed)
        best = min(best, error)
    return float(best)


def laece_by_loop(matches: Matches, matched_iou: np.ndarray, label: int, bins: int) -> float:
    rows = [i for i in range(len(matches.score)) if matches.label[i] == label and not matches.is_ignored[0][i]]
    error = 0.0
    for j in range(bins):
        inside = [i for i in rows if j / bins <= matches.score[i] < (j + 1) / bins]  # no score is 1
        true = [i for i in inside if matches.is_true_positive[0][i]]
        if not inside:
            continue
        iou = sum(matched_iou[i] for i in true) / len(true) if true else 0.0
        mean = sum(float(matches.score[i]) for i in inside) / len(inside)
        error += len(inside) / len(rows) * abs(mean - len(true) / len(inside) * iou)
    return error


@pytest.mark.parametrize("seed", range(20))
def test_optimal_lrp__and_laece_equal_loops(seed: int) -> None:
    dataset = random_dataset(seed)
    matches, _, overlaps, _ = diagnosed(dataset)
    found = optimal_lrp(matches, overlaps.matched_iou)
    mean, errors = localization_aware_ece(matches, overlaps.matched_iou, bins=7)
    for label, num_objects in enumerate(matches.num_objects):
        if num_objects == 0:
            assert math.isnan(found[label].error)
            assert math.isnan(errors[label])
            continue
        assert found[label].error == pytest.approx(lrp_by_loop(matches, overlaps.matched_iou, label), abs=1e-12)
        if ((matches.label == label) & ~matches.is_ignored[0]).any():
            expected = laece_by_loop(matches, overlaps.matched_iou, label, 7)
            assert errors[label] == pytest.approx(expected, abs=1e-12)
    if not np.isnan(errors).all():
        assert mean == pytest.approx(np.nanmean(errors))


def test_optimal_lrp__components_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    detection = {
        "boxes": torch.tensor([[0.0, 0.0, 10.0, 8.0], [80.0, 80.0, 90.0, 90.0]]),
        "labels": torch.tensor([0, 0]), "scores": torch.tensor([0.75, 0.5]),
    }  # fmt: skip
    target = {"boxes": boxes, "labels": torch.tensor([0, 0]), "iscrowd": torch.zeros(2).bool()}
    matches, _, overlaps, _ = diagnosed(RandomDataset([detection], [target], 1))
    lrp = optimal_lrp(matches, overlaps.matched_iou)[0]
    # one of two found with IoU 0.8: (0.2 / 0.5 + 1) / 2
    assert lrp == pytest.approx((0.7, 0.2, 0.0, 0.5, 0.75))
