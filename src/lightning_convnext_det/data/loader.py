"""Loaders whose errors are one line, that can continue in the middle of an epoch, and that outlive a broken image."""

import logging
import signal
from collections.abc import Iterator, Sized
from typing import TypedDict, cast

from torch.utils.data import DataLoader

from lightning_convnext_det.data.batch import Batch, PackedBatch, unpack
from lightning_convnext_det.data.sampler import TrainingBatches
from lightning_convnext_det.errors import DataError

_logger = logging.getLogger(__name__)

_GRACE = 30  # seconds that a worker lives on after SIGTERM


class LoaderState(TypedDict):
    """Where in training a loader is."""

    epoch: int
    batches: int
    """Batches of that epoch which training has received, on each process."""


def outlast_signals(worker: int) -> None:
    """Let a worker live on for a while when all processes of a run are told to stop, as scancel and timeout do.

    The main process then takes the step under way and saves; a worker's death would end it with an error before.
    """
    if hasattr(signal, "SIGALRM"):
        # not ignored: torch ends workers that hang by this signal
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class EvaluationLoader(DataLoader[object]):
    """A loader whose data errors read the same with workers as without: one line, no traceback of another process.

    The ``collate_fn`` of all loaders here must be ``pack``; what they yield is unpacked. Where there are fewer images
    than processes, a process without any has one batch without images: Lightning would leave it out of the validation
    altogether, and the others would wait for it.
    """

    unpack = staticmethod(unpack)

    def __len__(self) -> int:
        """Number of batches, at least 1."""
        return max(1, super().__len__())

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader promises an internal class
        """Yield batches.

        Raises:
            DataError: if an image cannot be read.
        """
        if len(self) > super().__len__():
            yield [], []
            return
        for batch in self._packed():
            yield self.unpack(batch)

    def _packed(self) -> Iterator[PackedBatch]:
        try:
            yield from super().__iter__()
        except DataError as error:
            # torch puts the worker's traceback before the message, whose last line is "module.DataError: message"
            raise DataError(str(error).rstrip().rpartition("DataError: ")[2]) from None


class TrainingLoader(EvaluationLoader):
    """A loader of whole batches whose place in the epoch goes into Lightning's checkpoints.

    Its sampler must be a ``TrainingBatches``, its ``batch_size`` None. Lightning creates the iterator of a resumed
    epoch before it sets the epoch; an iterator here asks for epoch and place only with its first batch.
    """

    sampler: TrainingBatches
    _received = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader promises an internal class
        """Yield the batches of the sampler's epoch, from where a loaded state left off."""
        self._received = self.sampler.start
        for batch in super().__iter__():
            self._received += 1
            yield batch

    def state_dict(self) -> LoaderState:
        """Where training is; Lightning stores it in checkpoints."""
        return {"epoch": self.sampler.epoch, "batches": self._received}

    def load_state_dict(self, state: LoaderState) -> None:
        """Continue with the batch after those that a state counts."""
        self.sampler.set_epoch(state["epoch"])
        self.sampler.start = self._received = state["batches"]


class ImageLoader(EvaluationLoader):
    """A loader that leaves out images that cannot be read, reports each as it comes and their number at the end.

    A batch of which nothing is left is not yielded.
    """

    def __len__(self) -> int:
        """Number of batches; 0 on a process without images."""
        return DataLoader.__len__(self)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader promises an internal class
        """Yield batches of images and targets.

        Raises:
            DataError: if not one image could be read.
        """
        num_read = num_failed = 0
        for batch in self._packed():
            num_read += len(batch.sizes)
            num_failed += len(batch.unreadable)
            for image in batch.unreadable:
                _logger.warning("left out: %s", image.reason)
            if batch.sizes:
                yield unpack(batch)
        if num_failed == len(cast(Sized, self.dataset)):
            raise DataError(f"[LCD-P002] none of {num_failed} images can be read; the reasons are given above")
        if num_failed:
            _logger.warning("%d of %d images could not be read and were left out", num_failed, num_read + num_failed)
