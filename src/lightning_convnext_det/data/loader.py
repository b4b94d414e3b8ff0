"""Data loaders: one-line errors from workers, resuming in mid-epoch, and prediction that skips unreadable images."""

import logging
import signal
from collections.abc import Callable, Iterator, Sized
from typing import Any, TypedDict, cast

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import DataLoader

from lightning_convnext_det.data.batch import Batch, PackedBatch, pack, unpack
from lightning_convnext_det.data.dataset import ImageDataset
from lightning_convnext_det.data.main_guard import check_main_guard
from lightning_convnext_det.data.sampler import TrainingBatchSampler
from lightning_convnext_det.data.seeding import SeededDataset
from lightning_convnext_det.errors import DataError

_logger = logging.getLogger(__name__)
_log_once = rank_zero_only(_logger.warning)

_GRACE = 30  # seconds that a worker lives on after SIGTERM


class LoaderState(TypedDict):
    """Position of a training loader."""

    seed: int
    epoch: int
    batches: int
    """Batches of that epoch that training has received, on each rank."""


def outlast_signals(worker: int) -> None:
    """Delay a worker's reaction to SIGTERM, which ``scancel`` and ``timeout`` send to all processes of a run.

    The main process can then finish its step and save; it would fail if a worker died before.
    """
    if hasattr(signal, "SIGALRM"):
        # not ignored: torch ends workers that hang by this signal
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class EvaluationLoader(DataLoader[object]):
    """Data loader for evaluation; a data error in a worker is the same one-line error as without workers.

    ``collate_fn`` must be ``collate``; what it packs is unpacked here. A rank without images yields one empty batch:
    Lightning would otherwise skip the validation on this rank, and the other ranks would wait for it.
    """

    collate: Callable[..., Any] = staticmethod(pack)
    unpack: Callable[..., Any] = staticmethod(unpack)  # batches of other loaders are of other types

    def __len__(self) -> int:
        """Number of batches, at least 1."""
        return max(1, super().__len__())

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader promises an internal class
        """Yield batches.

        Raises:
            DataError: if an image cannot be read.
            SystemExit: if workers would run the user's script again.
        """
        if len(self) > super().__len__():
            yield [], []
            return
        for batch in self._packed():
            yield self.unpack(batch)

    def _packed(self) -> Iterator[PackedBatch]:
        if self.num_workers:
            check_main_guard(self.multiprocessing_context)
        try:
            yield from super().__iter__()
        except DataError as error:
            # torch puts the worker's traceback before the message, whose last line is "module.DataError: message"
            raise DataError(str(error).rstrip().rpartition("DataError: ")[2]) from None


class TrainingLoader(EvaluationLoader):
    """Data loader for training whose position in the epoch is saved in Lightning's checkpoints.

    ``sampler`` must be a ``TrainingBatchSampler`` and ``batch_size`` None. Lightning creates the iterator of a resumed
    epoch before it sets the epoch, so the iterator reads epoch and position only when the first batch is asked for.
    """

    sampler: TrainingBatchSampler
    follows_checkpoint = True
    """Whether the seed of a loaded state replaces the one that the loader was created with."""
    before_epoch: Callable[["TrainingLoader"], None] | None = None
    """Called in the main process before the first batch of an epoch is read."""
    _received = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader promises an internal class
        """Yield the batches of the sampler's epoch, from the position of a loaded state on."""
        if self.before_epoch is not None:
            self.before_epoch(self)
        self._received = self.sampler.start
        for batch in super().__iter__():
            self._received += 1
            yield batch

    def state_dict(self) -> LoaderState:
        """Position in training; Lightning stores it in checkpoints."""
        return {"seed": self.sampler.seed, "epoch": self.sampler.epoch, "batches": self._received}

    def load_state_dict(self, state: LoaderState) -> None:
        """Continue at the position of a state, and with its seed unless another one was given."""
        dataset = cast(SeededDataset, self.dataset)
        if self.follows_checkpoint:
            self.sampler.seed = dataset.seed = state["seed"]
        elif self.sampler.seed != state["seed"]:
            rank_zero_info(f"data.seed {self.sampler.seed} replaces {state['seed']}, the checkpoint's")
        self.sampler.set_epoch(state["epoch"])
        self.sampler.start = self._received = state["batches"]


class ImageLoader(EvaluationLoader):
    """Data loader for prediction that skips unreadable images, names each, and counts them at the end.

    A batch without readable images is not yielded. ``dataset`` must be an ``ImageDataset``,
    which keeps the count: Lightning replaces the loader of a prediction by a copy.
    """

    def __len__(self) -> int:
        """Number of batches; 0 on a rank without images."""
        return DataLoader.__len__(self)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader promises an internal class
        """Yield batches of images and targets.

        Raises:
            DataError: if not one image could be read, and this rank has all.
        """
        counts = cast(ImageDataset, self.dataset).counts
        counts.update(read=0, failed=0)
        said = ""
        for batch in self._packed():
            counts["read"] += len(batch.file_names)
            counts["failed"] += len(batch.unreadable)
            for image in batch.unreadable:
                if image.reason != said:  # all frames of a damaged part of a video have one reason
                    _logger.warning("skipped: %s", image.reason)
                said = image.reason
            if batch.file_names:
                yield unpack(batch)
        num_read, num_failed = counts["read"], counts["failed"]
        if num_read + num_failed == len(cast(Sized, self.dataset)):
            report_unreadable(num_read, num_failed)
        elif num_failed and not num_read:
            _logger.warning("[LCD-P002] none of the %d images of this rank can be read", num_failed)


def report_unreadable(num_read: int, num_failed: int) -> None:
    """Log how many images could not be read.

    Raises:
        DataError: if that is all of them.
    """
    if num_failed and not num_read:
        raise DataError(f"[LCD-P002] none of {num_failed} images can be read; the reasons are given above")
    if num_failed:
        _log_once("%d of %d images could not be read and were skipped", num_failed, num_read + num_failed)
