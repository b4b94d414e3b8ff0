"""Federated evaluation against hotcoco's LVIS mode, and by hand."""

import contextlib
import io
import math

import hotcoco
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.metrics.coco_map import DetectionEvaluator
from lightning_convnext_det.metrics.coco_summary import FREQUENCY_METRICS
from tests.metrics.random_datasets import RandomDataset, random_dataset

FREQUENCIES = ["rare", "common", "frequent", "rare"]
NAMES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", *FREQUENCY_METRICS)


def federated_dataset(seed: int) -> RandomDataset:
    """Random images in which some classes are neither found nor verified as absent, or not exhaustively annotated."""
    dataset = random_dataset(seed, crowds=False)
    generator = np.random.default_rng(seed)
    targets = []
    for number, target in enumerate(dataset.targets):
        present = np.unique(target["labels"].numpy())
        absent = np.setdiff1d(np.arange(dataset.num_classes), present)
        target = {
            **target, "image_id": number,
            "negative_labels": torch.tensor(absent[generator.random(len(absent)) < 0.5], dtype=torch.int64),
            "not_exhaustive_labels": torch.tensor(present[generator.random(len(present)) < 0.4], dtype=torch.int64),
        }  # fmt: skip
        targets.append(target)
    return dataset._replace(targets=targets)


def lvis_files(dataset: RandomDataset) -> tuple[dict[str, list], list[dict]]:
    annotations, results = dataset.coco()
    for image, target in zip(annotations["images"], dataset.targets, strict=True):
        image["neg_category_ids"] = [label + 1 for label in target["negative_labels"].tolist()]
        image["not_exhaustive_category_ids"] = [label + 1 for label in target["not_exhaustive_labels"].tolist()]
    for category in annotations["categories"]:
        category["frequency"] = FREQUENCIES[category["id"] - 1][0]
    return annotations, results


def by_hotcoco(dataset: RandomDataset) -> dict[str, float]:
    annotations, results = lvis_files(dataset)
    ground_truth = hotcoco.COCO(annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = hotcoco.COCOeval(ground_truth, ground_truth.load_res(results), "bbox", lvis_style=True)
        evaluation.run()
    found = evaluation.get_results()
    return dict(
        zip(NAMES, (found[n] for n in ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")), strict=True)
    )


def evaluate(dataset: RandomDataset) -> dict[str, float]:
    classes = [f"c{i}" for i in range(dataset.num_classes)]
    evaluator = DetectionEvaluator(classes, max_detections=300, frequencies=FREQUENCIES[: len(classes)])
    evaluator.update(dataset.detections, dataset.targets)
    return evaluator.compute()


def check(seed: int) -> bool:
    dataset = federated_dataset(seed)
    annotations, results = dataset.coco()
    if not results or not annotations["annotations"]:  # hotcoco cannot load it
        return False
    metrics = evaluate(dataset)
    for name, expected in by_hotcoco(dataset).items():
        assert metrics[name] == pytest.approx(math.nan if expected == -1 else expected, abs=1e-12, nan_ok=True), name
    return not math.isnan(metrics["map"])


def test_evaluator__equals_hotcoco_on_federated_images() -> None:
    assert sum(check(seed) for seed in range(30)) > 15


@pytest.mark.slow
@given(seed=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_evaluator__equals_hotcoco_on_many_federated_images(seed: int) -> None:
    check(seed)


def test_evaluator__detections_of_classes_that_were_not_looked_for_do_not_count() -> None:
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    found = {"boxes": torch.cat([box, box + 50]), "labels": torch.tensor([0, 1]), "scores": torch.tensor([0.5, 0.9])}
    other = {"boxes": box + 50, "labels": torch.tensor([1]), "image_id": 2, "negative_labels": torch.tensor([0])}
    one = {"boxes": box, "labels": torch.tensor([0]), "image_id": 1}
    for negative, ap in (([], 1.0), ([1], 0.5)):
        evaluator = DetectionEvaluator(["cat", "dog"])
        evaluator.update([found, {**found, "scores": torch.tensor([0.1, 0.4])}],
                         [{**one, "negative_labels": torch.tensor(negative, dtype=torch.int64)}, other])  # fmt: skip
        metrics = evaluator.compute()
        assert metrics["map/dog"] == pytest.approx(ap)
        assert metrics["map/cat"] == pytest.approx(1.0)


def test_evaluator__refuses_frequencies_of_other_classes() -> None:
    with pytest.raises(ArgumentError, match="frequencies has 1 entries, but there are 2 classes"):
        DetectionEvaluator(["cat", "dog"], frequencies=["rare"])
