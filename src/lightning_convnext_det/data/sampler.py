"""Which images make up which batch, on which process, in which epoch.

Both samplers are subclasses of ``DistributedSampler`` *and* of ``SequentialSampler`` for Lightning's sake: it replaces
the sampler of a loader by its own under several processes unless it is the first, and under ``overfit_batches`` unless
it is the second (``trainer/connectors/data_connector.py``, lightning 2.6). So ``use_distributed_sampler`` may stay on.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import SequentialSampler
from torch.utils.data.distributed import DistributedSampler

Key = tuple[int, int]
"""Epoch and index of an image: together with the seed they decide every random choice made for it."""


def batch_sizes(num_images: int, batch_size: int, num_replicas: int, drop_last: bool) -> list[int]:
    """Sizes of all batches of an epoch, in order; every ``num_replicas`` of them make up one step.

    All are ``batch_size`` but those of the last step, which shares the rest evenly. Fewer images than processes are
    shared out over the last two steps. Only with ``batch_size=1`` that is impossible: they then sit out this epoch.
    """
    full_steps, rest = divmod(num_images, batch_size * num_replicas)
    sizes = [batch_size] * (full_steps * num_replicas)
    if rest == 0 or drop_last or (rest < num_replicas and batch_size == 1):
        return sizes
    shares = num_replicas
    if rest < num_replicas and full_steps:
        sizes = sizes[:-num_replicas]
        rest += batch_size * num_replicas
        shares = 2 * num_replicas
    return sizes + [rest // shares + (share < rest % shares) for share in range(shares)]


class TrainingBatches(DistributedSampler[list[Key]], SequentialSampler):
    """The batches of one process: lists of ``(epoch, index)``, landscape with landscape and portrait with portrait.

    The order is a function of the seed and the epoch alone. Over all processes an epoch holds each image exactly once
    (with ``drop_last`` at most once), each process has the same number of batches, and only what is left over when the
    two groups are cut into whole batches is mixed, at the epoch's end.

    Attributes:
        start: how many batches the next pass leaves out at its beginning; 0 again after that, or with another epoch.

    Args:
        landscape: whether an image is at least as wide as it is high, bool [N].
        batch_size: images per batch and process.
        seed: of the order.
        shuffle: ``False`` gives the same batches in every epoch, by rising index.
        drop_last: leave out the last step of an epoch when it is smaller than the others.
        num_replicas: number of processes.
        rank: which of them this is.

    Raises:
        ValueError: if there are fewer images than an epoch needs for one batch on each process.
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
        self.sizes = batch_sizes(len(landscape), batch_size, num_replicas, drop_last)
        if not self.sizes or min(self.sizes) == 0:
            kind = "full batch" if drop_last else "image"
            raise ValueError(
                f"{len(landscape)} training images do not give each of {num_replicas} processes one {kind} at "
                f"batch_size={batch_size}, drop_last={drop_last}; lower batch_size or use fewer processes."
            )

    def __len__(self) -> int:
        """Number of batches per process and epoch, whatever ``start`` is."""
        return len(self.sizes) // self.num_replicas

    def __iter__(self) -> Iterator[list[Key]]:  # type: ignore[override]  # SequentialSampler is a mark, see above
        # taken at once, so that a later set_epoch, while a loader prefetches, cannot mix two epochs
        epoch, start, self.start = self.epoch, self.start, 0
        batches = np.split(self._order(epoch), np.cumsum(self.sizes))[: len(self.sizes)]
        for batch in batches[self.rank :: self.num_replicas][start:]:
            yield [(epoch, int(index)) for index in batch]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; another one than before begins at its first batch."""
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """All images such that whole batches hold one orientation, int64 [N]."""
        generator = np.random.default_rng((self.seed, epoch))
        whole: list[NDArray[np.int64]] = []
        rest: list[NDArray[np.int64]] = []
        for orientation in (True, False):
            group = np.flatnonzero(self.landscape == orientation)
            if self.shuffle:
                group = generator.permutation(group)
            cut = len(group) - len(group) % self.batch_size
            whole.append(group[:cut].reshape(-1, self.batch_size))
            rest.append(group[cut:])
        batches, left_over = np.concatenate(whole), np.concatenate(rest)
        if self.shuffle:
            batches, left_over = generator.permutation(batches), generator.permutation(left_over)
        return np.concatenate([batches.ravel(), left_over])


class EvaluationSampler(DistributedSampler[int], SequentialSampler):
    """The contiguous run of images that one process evaluates: each image once, none added to make shares equal.

    Args:
        num_images: of the split.
        num_replicas: number of processes.
        rank: which of them this is.
    """

    def __init__(self, num_images: int, num_replicas: int = 1, rank: int = 0) -> None:
        # rounded up, so that with fewer images than processes the first process is not the idle one
        bounds = [-(-num_images * replica // num_replicas) for replica in (rank, rank + 1)]
        self.indices = range(bounds[0], bounds[1])
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
