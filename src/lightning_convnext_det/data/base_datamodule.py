"""Common part of the data modules: samplers, loaders and seeds on every rank."""

import logging
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import Sampler

from lightning_convnext_det.arguments import Count, NonNegative, NonNegativeInt, check_arguments
from lightning_convnext_det.data.loader import (
    EvaluationLoader,
    ImageLoader,
    TrainingLoader,
    outlast_signals,
)
from lightning_convnext_det.data.sampler import EvaluationSampler, Key, TrainingBatchSampler
from lightning_convnext_det.data.seeding import SeededDataset, run_seed
from lightning_convnext_det.data.writers.parquet import ImageKey

_logger = logging.getLogger(__name__)
PREFETCH = 2  # batches per worker: torch's default
_Loader = TypeVar("_Loader", TrainingLoader, EvaluationLoader, ImageLoader)


class LoadingDataModule(LightningDataModule):
    """Base of the data modules: creates loaders that share an epoch between ranks and can resume.

    A writer of predictions sets ``find_finished``: it is asked, on all ranks, for the ids of those images, of which it
    is given the ids and file names, that an earlier prediction has finished.

    Args:
        predict: images to predict on.
        batch_size: images per batch on each device.
        num_workers: worker processes that read images; 0 reads in the main process (default: one per core, at most 4).
        seed: of the order of the images and their augmentation (default: that of ``seed_everything``).
        drop_last: leave out the last batch of a training epoch if it is smaller than the others.
        persistent_workers: keep the worker processes from one epoch to the next.
        timeout: seconds to wait for a batch from a worker; 0 waits without limit.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        predict: str | list[str] | None = None,
        batch_size: Count = 4,
        num_workers: NonNegativeInt | None = None,
        seed: NonNegativeInt | None = None,
        drop_last: bool = False,
        persistent_workers: bool = True,
        timeout: NonNegative = 300.0,
    ) -> None:
        super().__init__()
        check_arguments(LoadingDataModule.__init__, locals())
        self.predict = [predict] if isinstance(predict, str) else predict
        self.batch_size = batch_size
        self.num_workers = min(4, _available_cores()) if num_workers is None else num_workers
        self.seed = seed
        self.drop_last = drop_last
        self.persistent_workers = persistent_workers
        self.timeout = timeout
        self.find_finished: Callable[[Sequence[ImageKey]], Collection[int]] | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True  # evaluation of fewer images than devices

    def run_seed(self) -> int:
        """The seed of this run, the same on all ranks; collective where ``seed`` is not given."""
        if self.seed is not None:
            return self.seed
        return run_seed() if self.trainer is None else int(self.trainer.strategy.broadcast(run_seed()))

    def training_loader(
        self,
        kind: type[TrainingLoader],
        dataset: SeededDataset,
        landscape: NDArray[np.bool_],
        repeat_factors: NDArray[np.float64] | None = None,
    ) -> TrainingLoader:
        """Create a loader of this rank's training batches."""
        num_replicas, rank = self._replicas()
        sampler = TrainingBatchSampler(
            landscape,
            self.batch_size,
            dataset.seed,
            shuffle=not getattr(self.trainer, "overfit_batches", 0),  # overfitting needs the same batches in each epoch
            drop_last=self.drop_last,
            num_replicas=num_replicas,
            rank=rank,
            repeat_factors=repeat_factors,
        )
        loader = self._loader(kind, dataset, sampler, None)
        loader.follows_checkpoint = self.seed is None
        return loader

    def evaluation_loader(self, kind: type[_Loader], dataset: SeededDataset) -> _Loader:
        """Create a loader of this rank's part of the images; over all ranks each image comes once."""
        keys = None if self.find_finished is None else dataset.keys()
        images: int | list[int] = len(dataset)
        if keys is not None and self.find_finished is not None:
            finished = self.find_finished(keys)
            images = [i for i, (image_id, _) in enumerate(keys) if image_id not in finished]
        return self._loader(kind, dataset, EvaluationSampler(images, *self._replicas()), self.batch_size)

    def _loader(
        self,
        kind: type[_Loader],
        dataset: SeededDataset,
        sampler: Sampler[int] | Sampler[list[Key]],
        batch_size: int | None,
    ) -> _Loader:
        return kind(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=kind.collate,
            worker_init_fn=outlast_signals,
            num_workers=self.num_workers,
            pin_memory=self._on_cuda(),
            timeout=self.timeout if self.num_workers else 0,
            persistent_workers=self.persistent_workers and self.num_workers > 0,
            generator=torch.Generator().manual_seed(dataset.seed),  # else each iterator would draw from the global one
        )

    def check_shared_memory(self, pixels: int) -> None:
        """Warn before workers die of a bus error for lack of shared memory, as in a container with 64 MB."""
        if self.num_workers == 0 or not os.path.isdir("/dev/shm"):
            return
        needed = 3 * pixels * self.batch_size * self.num_workers * PREFETCH
        free = shutil.disk_usage("/dev/shm").free
        if needed > free:
            _logger.warning(
                "[LCD-R001] batches on their way from %d workers need about %d MB of /dev/shm, which has %d MB free: "
                "lower num_workers or batch_size, or start the container with a larger --shm-size",
                self.num_workers, needed >> 20, free >> 20,
            )  # fmt: skip

    def _replicas(self) -> tuple[int, int]:
        """Return the number of ranks, and this rank."""
        if self.trainer is not None:
            return self.trainer.world_size, self.trainer.global_rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0

    def _on_cuda(self) -> bool:
        if self.trainer is not None:
            return self.trainer.strategy.root_device.type == "cuda"
        return torch.cuda.is_available()


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
