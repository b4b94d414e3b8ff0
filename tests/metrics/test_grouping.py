"""Groups of objects, and the cost of images, against evaluations of parts."""

import numpy as np
import pytest

from lightning_convnext_det.metrics.average_precision import average_precision, mean_over_classes
from lightning_convnext_det.metrics.grouping import group_ap, group_of, image_losses, quantile_edges
from lightning_convnext_det.metrics.matching import match_detections
from lightning_convnext_det.metrics.objects import flatten_targets
from tests.metrics.random_datasets import random_dataset


@pytest.mark.parametrize("seed", range(6))
def test_group_ap__of_images_equals_their_evaluation(seed: int) -> None:
    dataset = random_dataset(seed)
    matches = match_detections(dataset.detections, dataset.targets, dataset.num_classes, (0.5, 0.75))
    objects = flatten_targets(dataset.targets)
    found = group_ap(matches, objects, objects.image % 2, matches.image % 2, groups=2)
    for parity in (0, 1):
        part = match_detections(
            dataset.detections[parity::2], dataset.targets[parity::2], dataset.num_classes, (0.5, 0.75)
        )
        np.testing.assert_allclose(found[:, parity], mean_over_classes(average_precision(part)), atol=1e-12)


def test_quantile_edges__split_evenly() -> None:
    values = np.arange(80.0)
    groups = group_of(values, quantile_edges(values, 8))
    assert np.bincount(groups).tolist() == [10] * 8
    assert len(quantile_edges(np.ones(5), 8)) == 0
    assert len(quantile_edges(np.zeros(0), 8)) == 0


def test_image_losses__rank_an_image_without_detections_first() -> None:
    dataset = random_dataset(5)
    detections = [{name: value[:0] for name, value in d.items()} if i == 2 else
                  {"boxes": t["boxes"], "labels": t["labels"], "scores": t["boxes"][:, 0] * 0 + 0.5}
                  for i, (d, t) in enumerate(zip(dataset.detections, dataset.targets, strict=True))]  # fmt: skip
    matches = match_detections(detections, dataset.targets, dataset.num_classes, (0.5, 0.75))
    losses = image_losses(matches, flatten_targets(dataset.targets))
    assert losses.argmax() == 2
    # all other objects are found, so the loss is the share of objects that the image has
    assert losses.sum() == pytest.approx(1 - mean_over_classes(average_precision(matches)).mean(), abs=0.02)
    assert np.delete(losses, 2) == pytest.approx(0)
