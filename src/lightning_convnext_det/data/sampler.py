"""Samplers: training batches that are reproducible and grouped by orientation, and evaluation without duplicates.

Both are subclasses of ``DistributedSampler`` *and* of ``SequentialSampler`` for Lightning's sake: it replaces
the sampler of a loader by its own on several ranks unless it is the first, and under ``overfit_batches`` unless
it is the second (``trainer/connectors/data_connector.py``, lightning 2.6). So ``use_distributed_sampler`` may stay on.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_convnext_det.data.repeat_factors import draw_repeats

Key = tuple[int, int]
"""Epoch and index of an image, which with the seed determine its augmentation; an index of N and more is a copy."""


def batch_sizes(num_images: int, batch_size: int, num_replicas: int, drop_last: bool) -> list[int]:
    """Sizes of all batches of an epoch, in order; every ``num_replicas`` of them make up one step.

    All but the last step's are ``batch_size``; the last step divides the remainder evenly over the ranks. A remainder
    smaller than the number of ranks is divided over the last two steps, or left out if ``batch_size`` is 1.
    """
    full_steps, rest = divmod(num_images, batch_size * num_replicas)
    sizes = [batch_size] * (full_steps * num_replicas)
    if rest == 0 or drop_last or (rest < num_replicas and batch_size == 1):
        return sizes
    parts = num_replicas
    if rest < num_replicas and full_steps:
        sizes = sizes[:-num_replicas]
        rest += batch_size * num_replicas
        parts = 2 * num_replicas
    return sizes + [rest // parts + (part < rest % parts) for part in range(parts)]


class TrainingBatchSampler(DistributedSampler[list[Key]], SequentialSampler):
    """Batch sampler of one rank that groups landscape and portrait images and can start in mid-epoch.

    Yields lists of ``(epoch, index)``. The order depends on the seed and the epoch alone. Over all ranks, an epoch
    visits each image exactly once (at most once with ``drop_last``), and every rank gets the same number of batches.
    Only the remainders of the two groups are mixed, at the end of the epoch.

    >>> import numpy as np
    >>> sampler = TrainingBatchSampler(np.array([True, False, True, True, False]), batch_size=2, shuffle=False)
    >>> list(sampler)
    [[(0, 0), (0, 2)], [(0, 1), (0, 4)], [(0, 3)]]

    Attributes:
        start: number of batches that the next pass skips; reset to 0 by that pass and by a change of epoch.

    Args:
        landscape: whether an image is at least as wide as it is high, bool [N].
        batch_size: images per batch on each rank.
        seed: of the order.
        shuffle: ``False`` gives the same batches in every epoch, by ascending index.
        drop_last: leave out the last step of an epoch when it is smaller than the others.
        num_replicas: number of ranks.
        rank: this rank.
        repeat_factors: how often each image comes in an epoch, rounded down or up, [N]; None for once.

    Raises:
        ValueError: if there are too few images for one batch on each rank.
    """

    def __init__(
        self,
        landscape: NDArray[np.bool_],
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        repeat_factors: NDArray[np.float64] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.landscape = landscape
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self.start = 0
        self.repeat_factors = repeat_factors
        self.num_draws = len(landscape) if repeat_factors is None else round(float(repeat_factors.sum()))
        self.sizes = batch_sizes(self.num_draws, batch_size, num_replicas, drop_last)
        if not self.sizes or min(self.sizes) == 0:
            kind = "full batch" if drop_last else "image"
            raise ValueError(
                f"{len(landscape)} training images do not give each of {num_replicas} ranks one {kind} at "
                f"batch_size={batch_size}, drop_last={drop_last}; lower batch_size or use fewer devices."
            )

    def __len__(self) -> int:
        """Number of batches per rank and epoch, regardless of ``start``."""
        return len(self.sizes) // self.num_replicas

    def __iter__(self) -> Iterator[list[Key]]:  # type: ignore[override]  # SequentialSampler is a mark, see above
        # taken at once, so that a later set_epoch, while a loader prefetches, cannot mix two epochs
        epoch, start, self.start = self.epoch, self.start, 0
        batches = np.split(self._order(epoch), np.cumsum(self.sizes))[: len(self.sizes)]
        for batch in batches[self.rank :: self.num_replicas][start:]:
            yield [(epoch, int(index)) for index in batch]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; a new epoch begins at its first batch."""
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """All indices, ordered so that full batches hold one orientation, int64 [N]."""
        generator = np.random.default_rng((self.seed, epoch))
        drawn = np.arange(len(self.landscape))
        if self.repeat_factors is not None:
            drawn = draw_repeats(self.repeat_factors, self.num_draws, generator if self.shuffle else None)
        is_landscape = self.landscape[drawn % len(self.landscape)]
        whole: list[NDArray[np.int64]] = []
        rest: list[NDArray[np.int64]] = []
        for orientation in (True, False):
            group = drawn[is_landscape == orientation]
            if self.shuffle:
                group = generator.permutation(group)
            full = len(group) - len(group) % self.batch_size
            whole.append(group[:full].reshape(-1, self.batch_size))
            rest.append(group[full:])
        batches, left_over = np.concatenate(whole), np.concatenate(rest)
        if self.shuffle:
            batches, left_over = generator.permutation(batches), generator.permutation(left_over)
        return np.concatenate([batches.ravel(), left_over])


class EvaluationSampler(DistributedSampler[int], SequentialSampler):
    """Sampler of one rank's contiguous part of a split, without the duplicates of ``DistributedSampler``'s padding.

    >>> [list(EvaluationSampler(5, num_replicas=2, rank=rank)) for rank in (0, 1)]
    [[0, 1, 2], [3, 4]]

    Args:
        images: number of images in the split, or the positions of those to take.
        num_replicas: number of ranks.
        rank: this rank.
    """

    def __init__(self, images: int | Sequence[int], num_replicas: int = 1, rank: int = 0) -> None:
        chosen = range(images) if isinstance(images, int) else images
        num_images = len(chosen)
        # rounded up, so that rank 0 is not the idle one when there are fewer images than ranks
        bounds = [-(-num_images * replica // num_replicas) for replica in (rank, rank + 1)]
        self.indices = chosen[bounds[0] : bounds[1]]
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
