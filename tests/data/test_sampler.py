from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lightning_convnext_det.data.sampler import EvaluationSampler, TrainingBatchSampler, batch_sizes


def mixed_orientations(count: int, seed: int = 0) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random(count) < 0.7


def all_batches(landscape: NDArray[np.bool_], batch_size: int, replicas: int, epoch: int, drop_last: bool = False):
    parts = []
    for rank in range(replicas):
        sampler = TrainingBatchSampler(landscape, batch_size, 3, drop_last=drop_last, num_replicas=replicas, rank=rank)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler)
    return parts


@settings(max_examples=200)
@given(count=st.integers(1, 90), batch_size=st.integers(1, 7), replicas=st.integers(1, 5), drop_last=st.booleans())
def test_training_batch_sampler__covers_each_image_once(
    count: int, batch_size: int, replicas: int, drop_last: bool
) -> None:
    landscape = mixed_orientations(count)
    sizes = batch_sizes(count, batch_size, replicas, drop_last)
    if not sizes or min(sizes) == 0:
        with pytest.raises(ValueError, match="do not give each of"):
            TrainingBatchSampler(landscape, batch_size, drop_last=drop_last, num_replicas=replicas)
        return
    parts = all_batches(landscape, batch_size, replicas, 2, drop_last)
    assert len({len(part) for part in parts}) == 1  # ranks must take the same number of steps
    assert all(1 <= len(batch) <= batch_size for part in parts for batch in part)
    assert {epoch for part in parts for batch in part for epoch, _ in batch} == {2}
    seen = Counter(index for part in parts for batch in part for _, index in batch)
    assert set(seen.values()) == {1}
    left_out = count - len(seen)
    if drop_last:
        assert left_out == count % (batch_size * replicas)
    else:
        assert left_out == (count % replicas if batch_size == 1 and count >= replicas else 0)


def test_batch_sizes__by_hand() -> None:
    assert batch_sizes(10, 4, 1, False) == [4, 4, 2]
    assert batch_sizes(10, 4, 1, True) == [4, 4]
    assert batch_sizes(8, 4, 2, False) == [4, 4]
    assert batch_sizes(11, 4, 2, False) == [4, 4, 2, 1]
    assert batch_sizes(9, 4, 2, False) == [3, 2, 2, 2]  # one image is too few for two ranks: two steps part 9
    assert batch_sizes(5, 1, 2, False) == [1, 1, 1, 1]


def test_training_batch_sampler__orientations_are_not_mixed_before_the_last_step() -> None:
    landscape = mixed_orientations(203)
    for epoch in range(5):
        (batches,) = all_batches(landscape, 4, 1, epoch)
        mixed = [len({bool(landscape[index]) for _, index in batch}) == 2 for batch in batches]
        assert sum(mixed) <= 2
        assert not any(mixed[:-2])
        assert [len(batch) for batch in batches] == [4] * 50 + [3]


def test_training_batch_sampler__order_depends_on_seed_and_epoch_alone() -> None:
    landscape = mixed_orientations(50)
    first = all_batches(landscape, 4, 1, 1)
    assert all_batches(landscape, 4, 1, 1) == first
    other_epoch = all_batches(landscape, 4, 1, 2)
    assert [[i for _, i in b] for b in other_epoch[0]] != [[i for _, i in b] for b in first[0]]
    sampler = TrainingBatchSampler(landscape, 4, seed=4)
    sampler.set_epoch(1)
    assert list(sampler) != first[0]


def test_training_batch_sampler__without_shuffle_every_epoch_has_the_same_batches() -> None:
    sampler = TrainingBatchSampler(np.array([True, False, True, True, False]), 2, shuffle=False)
    assert list(sampler) == [[(0, 0), (0, 2)], [(0, 1), (0, 4)], [(0, 3)]]
    sampler.set_epoch(7)
    assert list(sampler) == [[(7, 0), (7, 2)], [(7, 1), (7, 4)], [(7, 3)]]


def test_training_batch_sampler__start_leaves_out_the_first_batches_once() -> None:
    sampler = TrainingBatchSampler(mixed_orientations(30), 4)
    everything = list(sampler)
    sampler.start = 3
    sampler.set_epoch(0)
    assert list(sampler) == everything[3:]
    assert len(sampler) == len(everything)
    assert list(sampler) == everything
    sampler.start = 3
    sampler.set_epoch(1)
    assert len(list(sampler)) == len(everything)


def test_training_batch_sampler__fewer_images_than_ranks() -> None:
    with pytest.raises(ValueError, match="2 training images do not give each of 3 ranks one image"):
        TrainingBatchSampler(np.ones(2, np.bool_), 4, num_replicas=3)


def test_training_batch_sampler__no_batch_size() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        TrainingBatchSampler(np.ones(2, np.bool_), 0)


@given(count=st.integers(0, 60), replicas=st.integers(1, 9))
def test_evaluation_sampler__contiguous_and_exact(count: int, replicas: int) -> None:
    parts = [EvaluationSampler(count, replicas, rank) for rank in range(replicas)]
    assert [index for part in parts for index in part] == list(range(count))
    assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1
    if count:
        assert len(parts[0]) > 0
