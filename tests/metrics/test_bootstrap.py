"""Bootstrap of AP against copies of images, and the coverage of its intervals."""

import math

import numpy as np
import pytest
import torch

from lightning_convnext_det.metrics.average_precision import (
    average_precision,
    bootstrap_ap,
    interval,
    mean_over_classes,
    resampling_weights,
)
from lightning_convnext_det.metrics.matching import match_detections
from lightning_convnext_det.metrics.objects import flatten_targets
from tests.metrics.random_datasets import random_dataset

IOUS = [0.5, 0.75]


@pytest.mark.parametrize("seed", range(12))
def test_bootstrap_ap__equals_the_evaluation_of_copies(seed: int) -> None:
    dataset = random_dataset(seed, equal_scores=False)
    num_images = len(dataset.targets)
    matches = match_detections(dataset.detections, dataset.targets, dataset.num_classes, IOUS)
    weights = resampling_weights(num_images, samples=4, seed=seed)
    found = bootstrap_ap(matches, flatten_targets(dataset.targets).per_image(dataset.num_classes), weights)
    for row, drawn in enumerate(weights):
        indices = np.repeat(np.arange(num_images), drawn)
        copies = match_detections(
            [dataset.detections[i] for i in indices], [dataset.targets[i] for i in indices], dataset.num_classes, IOUS
        )
        ap = average_precision(copies)
        np.testing.assert_allclose(found.per_class[row], ap.mean(0), atol=1e-12)
        np.testing.assert_allclose(found.map[row], mean_over_classes(ap.mean(0)), atol=1e-12)
        np.testing.assert_allclose(found.map_50[row], mean_over_classes(ap[0]), atol=1e-12)


def test_resampling_weights__draw_as_many_images() -> None:
    weights = resampling_weights(7, samples=50, seed=3)
    assert weights.shape == (50, 7)
    assert (weights.sum(1) == 7).all()
    assert (weights == resampling_weights(7, samples=50, seed=3)).all()


def test_interval__is_the_percentiles_without_bias() -> None:
    samples = np.arange(1, 1000) / 1000
    low, high = interval(samples, estimate=0.5)
    assert (low, high) == pytest.approx((0.025, 0.975), abs=2e-3)
    assert all(math.isnan(bound) for bound in interval(np.full(10, np.nan), estimate=0.5))


def simulated(generator: np.random.Generator, num_images: int) -> tuple[list, list]:
    """Images of one to four objects of one class; three of four are found, some boxes are on nothing."""
    detections, targets = [], []
    for _ in range(num_images):
        count = int(generator.integers(1, 5))
        boxes = np.stack(
            [np.arange(count) * 20.0, np.zeros(count), np.arange(count) * 20.0 + 10, np.full(count, 10)], 1
        )
        quality = generator.normal()  # some images are harder than others
        found = boxes[generator.random(count) < 1 / (1 + np.exp(-1 - quality))]
        wrong = boxes[: generator.poisson(0.7)] + np.array([0, 50, 0, 50])
        scores = np.concatenate([generator.beta(4, 2, len(found)), generator.beta(2, 3, len(wrong))])
        detections.append({
            "boxes": torch.tensor(np.concatenate([found, wrong])), "labels": torch.zeros(len(scores)).long(),
            "scores": torch.tensor(scores),
        })  # fmt: skip
        targets.append({"boxes": torch.tensor(boxes), "labels": torch.zeros(count).long()})
    return detections, targets


def sampled_map(detections: list, targets: list) -> tuple[float, np.ndarray]:
    matches = match_detections(detections, targets, 1, [0.5])
    weights = resampling_weights(len(targets), samples=400, seed=0)
    samples = bootstrap_ap(matches, flatten_targets(targets).per_image(1), weights)
    return float(average_precision(matches)[0, 0]), samples.map


@pytest.mark.slow
def test_interval__covers_the_ap_of_the_population() -> None:
    # 160,000 images: the AP of 20,000 is off by a tenth of the deviation of 150, which costs two points of coverage
    populations = [match_detections(*simulated(np.random.default_rng([0, i]), 20_000), num_classes=1) for i in range(8)]
    expected = np.mean([average_precision(population)[0, 0] for population in populations])
    covered = 0
    for trial in range(1000):
        estimate, samples = sampled_map(*simulated(np.random.default_rng(trial + 1), 150))
        low, high = interval(samples, estimate)
        covered += low <= expected <= high
    assert 0.92 <= covered / 1000 <= 0.98
