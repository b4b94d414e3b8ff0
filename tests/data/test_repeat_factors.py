"""Repeat factors against the formula, and sampling by them over ranks, epochs and resumptions."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.repeat_factors import draw_repeats, repeat_factors
from lightning_convnext_det.data.sampler import TrainingBatchSampler
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import ArgumentError


def test_repeat_factors__equal_the_formula(tmp_path: Path) -> None:
    root = write_synthetic_coco(tmp_path / "shapes", num_train=25, num_val=2)
    annotations = DetectionDataModule(str(root), num_workers=0).annotations("train")
    threshold = 0.9
    found = repeat_factors(annotations, threshold)
    classes = [set(annotations.labels[annotations.rows(i)].tolist()) for i in range(len(annotations))]
    for own, factor in zip(classes, found, strict=True):
        shares = [sum(label in other for other in classes) / len(classes) for label in own]
        assert factor == pytest.approx(max([1.0, *(max(1.0, (threshold / share) ** 0.5) for share in shares)]))
    assert found.max() > 1
    assert (repeat_factors(annotations, 1e-6) == 1).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 60))
def test_draw_repeats__rounds_every_factor_down_or_up(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    factors = 1 + generator.exponential(1.0, count) * (generator.random(count) < 0.4)
    total = round(factors.sum())
    drawn = draw_repeats(factors, total, generator)
    assert len(drawn) == total
    assert len(set(drawn.tolist())) == total
    times = np.bincount(drawn % count, minlength=count)
    scaled = factors * total / factors.sum()
    assert (times >= np.floor(scaled - 1e-9)).all()
    assert (times <= np.ceil(scaled + 1e-9)).all()


def test_draw_repeats__meets_the_factors_in_the_mean() -> None:
    factors = np.array([1.0, 1.0, 1.5, 3.25, 1.0, 1.25])
    generator = np.random.default_rng(0)
    counts = sum(np.bincount(draw_repeats(factors, 9, generator) % 6, minlength=6) for _ in range(4000))
    assert counts / 4000 == pytest.approx(factors, abs=0.03)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_training_batch_sampler__repeats_alike_over_ranks(replicas: int) -> None:
    factors = np.where(np.arange(30) % 5 == 0, 2.5, 1.0)
    landscape = np.arange(30) % 3 > 0

    def epoch(num_replicas: int, rank: int, start: int = 0) -> list[list[tuple[int, int]]]:
        sampler = TrainingBatchSampler(
            landscape, 2, seed=1, num_replicas=num_replicas, rank=rank, repeat_factors=factors
        )
        sampler.set_epoch(3)
        sampler.start = start
        return list(sampler)

    parts = [epoch(replicas, rank) for rank in range(replicas)]
    alone = epoch(1, 0)
    seen = Counter(index for part in parts for batch in part for _, index in batch)
    assert seen == Counter(index for batch in alone for _, index in batch)
    assert len(seen) == 39  # 24 + 6 * 2.5
    assert {index % 30 for index in seen} == set(range(30))
    assert epoch(replicas, replicas - 1, start=2) == parts[-1][2:]


def test_repeat_threshold__is_refused_for_own_datasets() -> None:
    with pytest.raises(ArgumentError, match="repeat_threshold"):
        DetectionDataModule(datasets={"train": []}, class_names=["a"], repeat_threshold=0.1)


def test_detection_dataset__augments_copies_differently(tmp_path: Path) -> None:
    root = write_synthetic_coco(tmp_path / "shapes", num_train=4, num_val=2)
    data = DetectionDataModule(str(root), num_workers=0, seed=0, train_transforms="multiscale", repeat_threshold=1.0)
    loader = data.train_dataloader()
    assert loader.sampler.num_draws > 4
    with pytest.raises(IndexError):
        loader.dataset[4]  # iteration over the dataset ends
    first, copy = loader.dataset[(0, 1)][1], loader.dataset[(0, 5)][1]
    assert first["image_id"] == copy["image_id"]
    assert any(
        loader.dataset[(0, i)][0].shape != loader.dataset[(0, i + 4)][0].shape
        or not torch.equal(loader.dataset[(0, i)][0], loader.dataset[(0, i + 4)][0])
        for i in range(4)
    )
    assert sum(len(images) for images, _ in loader) == loader.sampler.num_draws
