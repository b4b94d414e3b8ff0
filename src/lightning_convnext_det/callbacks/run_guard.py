"""Callback that saves and ends a training on SIGTERM, on SIGUSR1 (requeue), and on divergence.

All ranks decide together, at the end of a step, by one exchange between their processors that no accelerator has to
wait for. Lightning 2.6 ends with status 0 and saves nothing on SIGTERM, and waits for its time limit when there are
several ranks; it takes a loss of nan for a result.
"""

import logging
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from lightning_convnext_det.arguments import Count, check_arguments
from lightning_convnext_det.callbacks import slurm
from lightning_convnext_det.callbacks.divergence import REMEDY, LossWatch, check_weights
from lightning_convnext_det.checkpoints.content import readable
from lightning_convnext_det.checkpoints.file import AtomicCheckpointIO
from lightning_convnext_det.errors import CheckpointError, DataError, DivergenceError, WeightsError

_logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else (signal.SIGTERM,)
EXIT_STATUS = 143  # 128 + SIGTERM, what a shell reports of a process that SIGTERM has ended
_FAILURE = "lightning_convnext_det/failure"  # what the ranks call it among themselves
CHECK_EVERY = 10  # steps between two readings of the losses on an accelerator, which has to be waited for
SCALER_PATIENCE = 20  # steps in a row that fp16's scaler may leave out; it halves its scale with each, from 2**16


class RunGuard(Callback):
    """Saves and ends a training on SIGTERM or SIGUSR1; ends a training that has diverged.

    A signal to any rank ends all of them after the step under way, or at once in a validation, with ``last.ckpt``
    saved and exit status 143; the validation is repeated when the training is resumed. Under SLURM with
    ``SLURMEnvironment(auto_requeue=True)`` its requeue signal also requeues the job, which then continues from
    ``last.ckpt`` by itself. Evaluation and prediction end at once.

    A loss that is not finite ends the training within ``check_every`` steps with a `DivergenceError` that names loss,
    step, rank and images. Weights that are not finite are neither evaluated nor saved.

    Args:
        check_every: steps between two readings of the losses (default: 1 on a CPU, 10 on an accelerator).
    """

    def __init__(self, check_every: Count | None = None) -> None:
        check_arguments(RunGuard.__init__, locals())
        self.check_every = check_every
        self._received: signal.Signals | None = None
        self._stopping = False  # all ranks know
        self._requeue_signal: signal.Signals | None = None
        self._requeueing = False  # all ranks know
        self._in_validation = False
        self._watch = LossWatch()
        self._group: dist.ProcessGroup | None = None
        self._since_reading = 0

    # ---- training

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare the communication between ranks.

        Raises:
            CheckpointError: if a callback has a state that could be saved, but not read again.
        """
        self._received, self._stopping, self._in_validation, self._since_reading = None, False, False, 0
        self._requeue_signal, self._requeueing = slurm.requeue_signal(trainer), False
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._watch = LossWatch(SCALER_PATIENCE if scaled else 0)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if several else None
        if trainer.checkpoint_callbacks and isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            callbacks: list[Callback] = getattr(trainer, "callbacks", [])
            for callback in callbacks:  # or the first save would fail, after hours
                readable(callback.state_dict(), f"callbacks.{type(callback).__name__}")

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for signals from here; Lightning has just begun to do so itself."""
        _listen(self._note, self._requeue_signal)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for signals from here, if no sanity check came before."""
        _listen(self._note, self._requeue_signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the training if a rank was told to stop or has diverged.

        Raises:
            DivergenceError: if a loss of any rank is not finite.
            SystemExit: with 143, if any rank has received a signal.
        """
        if losses := _losses(outputs):
            reported = outputs.get("reason") if isinstance(outputs, dict) else None
            step = max(0, trainer.global_step - 1)
            self._watch.add(losses, _names(batch), trainer.current_epoch, step, reported)
        self._since_reading += 1
        every = self.check_every or (1 if pl_module.device.type == "cpu" else CHECK_EVERY)
        reason = self._watch.read(trainer.global_rank) if self._since_reading >= every else None
        self._since_reading %= every
        if self._agree_to_stop(reason is not None):
            self._raise_divergence(trainer, reason)
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0 and not trainer.is_last_batch
        # after the last step of an epoch, its validation and its end come first
        if self._stopping and not accumulating and not trainer.is_last_batch and not _validation_follows(trainer):
            self._save_and_exit(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the losses that have not been read yet, before a checkpoint is saved."""
        reason = self._watch.read(trainer.global_rank)
        self._since_reading = 0
        if self._agree(reason is not None)[0]:
            self._raise_divergence(trainer, reason)

    # ---- validation, test and prediction

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to evaluate weights that are not finite."""
        self._on_evaluation_start(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to evaluate weights that are not finite."""
        self._on_evaluation_start(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to predict with weights that are not finite."""
        self._on_evaluation_start(trainer, pl_module)

    def _on_evaluation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _is_fitting(trainer):
            reason = self._watch.read(trainer.global_rank)
            if self._agree(reason is not None)[0]:
                self._raise_divergence(trainer, reason)
        else:
            _listen(_exit)
        check_weights(pl_module.state_dict(), "evaluation")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Skip the rest of an interrupted validation.

        Raises:
            StopIteration: which Lightning takes for the end of the images.
        """
        if _is_fitting(trainer) and (self._stopping or self._received is not None):
            raise StopIteration

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Agree between ranks whether the validation was interrupted; its metrics are then undefined (nan)."""
        if _is_fitting(trainer) and not trainer.sanity_checking:
            self._agree_to_stop()
            discard = getattr(pl_module, "discard_validation", None)
            if self._stopping and discard is not None:
                discard()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the training if the validation was interrupted.

        Raises:
            SystemExit: with 143.
        """
        if _is_fitting(trainer) and not trainer.sanity_checking and self._stopping:
            self._in_validation = True
            self._save_and_exit(trainer)

    # ---- checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record in the state of the loops that an interrupted validation has to run again."""
        if not self._in_validation:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        progress["is_last_batch"] = False
        # Lightning repeats a validation of which one batch was begun and not finished (EvaluationLoop, 2.6)
        done = progress["total"]["completed"]
        progress["total"] |= {"ready": done + 1, "started": done + 1, "processed": done}
        progress["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the link from which a requeued job would continue: the training is complete."""
        if trainer.is_global_zero:
            slurm.forget(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the other ranks of an error on this one, or end with their error if it caused this one.

        Raises:
            ValueError: or whatever error with an exit status another rank has ended with.
        """
        if self._group is None or isinstance(exception, SystemExit | KeyboardInterrupt):
            return
        store = _get_default_store()  # of rank 0: if that one is gone, so are the others
        if (status := getattr(exception, "exit_status", None)) is not None:
            if not store.check([_FAILURE]):
                store.set(_FAILURE, f"{status} {exception}")
        elif isinstance(exception, RuntimeError) and store.check([_FAILURE]):
            status, _, text = store.get(_FAILURE).decode().partition(" ")
            kinds = (DataError, DivergenceError, WeightsError, CheckpointError)
            raise next(kind for kind in kinds if kind.exit_status == int(status))(text) from None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)

    def _agree_to_stop(self, flag: bool = False) -> bool:
        """Agree between ranks whether to stop and to requeue; return whether any rank raises the flag."""
        requeueing = self._received is not None and self._received == self._requeue_signal
        stopping, requeueing, raised = self._agree(self._received is not None, requeueing, flag)
        self._stopping, self._requeueing = self._stopping or stopping, self._requeueing or requeueing
        return raised

    def _agree(self, *flags: bool) -> list[bool]:
        """Tell whether any rank raises each flag; a collective call."""
        if self._group is None:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised.tolist()]

    def _raise_divergence(self, trainer: pl.Trainer, reason: str | None) -> None:
        reasons: list[str | None] = [reason]
        if self._group is not None:
            reasons = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(reasons, reason, group=self._group)
        first = next(reason for reason in reasons if reason is not None)
        raise DivergenceError(f"{first}; {REMEDY}; {_last_saved(trainer)}")

    def _save_and_exit(self, trainer: pl.Trainer) -> None:
        told = "another rank was" if self._received is None else f"{self._received.name}:"
        message = (
            f"{told} told to stop after step {trainer.global_step} of the training, in epoch {trainer.current_epoch}"
        )
        if not getattr(trainer, "fast_dev_run", False):
            path = checkpoint_path(trainer)
            trainer.save_checkpoint(path)
            message += f"; continue with --ckpt_path {path}"
            if self._requeueing and trainer.is_global_zero:
                message += f"; {slurm.requeue(trainer, path)}"
        if trainer.is_global_zero:
            _logger.warning(message)
        raise SystemExit(EXIT_STATUS)


def checkpoint_path(trainer: pl.Trainer) -> str:
    """Return the path of ``last.ckpt``, where a stopped run is saved, beside its other checkpoints; may be remote."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return f"{str(folder or f'{trainer.default_root_dir}/checkpoints').rstrip('/')}/last.ckpt"


def _listen(handler: Any, also: signal.Signals | None = None) -> None:
    # Lightning puts the handlers that it has found back when the trainer is done
    if threading.current_thread() is threading.main_thread():
        for number in {*STOP_SIGNALS, also} - {None}:
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(EXIT_STATUS)


def _is_fitting(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def _validation_follows(trainer: pl.Trainer) -> bool:
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _losses(outputs: Any) -> dict[str, Tensor]:
    """Collect the losses that a training step returned; none for a skipped step or under manual optimization."""
    if isinstance(outputs, Tensor):
        return {"loss": outputs}
    if not isinstance(outputs, dict):
        return {}
    losses = outputs.get("losses", {"loss": outputs.get("loss")})
    return {k: v for k, v in losses.items() if isinstance(v, Tensor) and v.numel() == 1}


def _names(batch: tuple[Sequence[Tensor], Any]) -> list[str]:
    """Return file names or ids of the images of a batch; none if its targets have none."""
    targets = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else []
    named = [t for t in targets if isinstance(t, dict)] if isinstance(targets, list | tuple) else []
    return [str(t.get("file_name", t.get("image_id", "?"))) for t in named]


def _last_saved(trainer: pl.Trainer) -> str:
    callback = trainer.checkpoint_callback
    path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    return f"the last checkpoint is {path}" if path else "no checkpoint has been saved yet"
