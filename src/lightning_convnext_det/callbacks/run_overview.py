"""Callback that shows a training: what is trained, how long it will take, and a line a minute without a terminal."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_convnext_det.data.dataset import DetectionDataset
from lightning_convnext_det.visualization import class_colors, contact_sheet, draw_detections

_FORECAST_AFTER = 10  # steps; the first two, which warm caches up, do not count
_WARM_UP = 2
_EVERY = 60.0  # seconds between two lines
_SHOWN = 12  # augmented images


class RunOverview(Callback):
    """Say what a training is made of, forecast its time after ten steps, and write a sheet of augmented images.

    Where the output is not a terminal, a line a minute tells step, loss and the last mAP. The sheet,
    ``training_images.jpg``, lies in the folder of the logs.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[RunOverview()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._last_line = 0.0
        self._started: float | None = None  # when the step that ends the warm-up ended
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the overview and write the sheet of images."""
        rank_zero_info("\n".join(overview(trainer, pl_module)))
        self._first_step, self._last_line = trainer.global_step, time.monotonic()
        folder = trainer.log_dir  # a collective call
        if trainer.is_global_zero and folder:
            _write_sheet(trainer, Path(folder) / "training_images.jpg")

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forecast once, and print a line a minute."""
        now, done = time.monotonic(), trainer.global_step - self._first_step
        if self._started is None and done >= _WARM_UP:
            self._started = now
        elif done == _FORECAST_AFTER and self._started is not None and batch_idx >= _FORECAST_AFTER - 1:
            per_step = (now - self._started) / (_FORECAST_AFTER - _WARM_UP)
            rank_zero_info(forecast(trainer, per_step))
        if now - self._last_line >= _EVERY and not sys.stdout.isatty():
            self._last_line = now
            rank_zero_info(progress_line(trainer))


def overview(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """The lines that are printed before the first step."""
    sizes = {True: 0, False: 0}
    for parameter in module.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    data = getattr(trainer, "datamodule", None)
    batch, accumulated = getattr(data, "batch_size", None), trainer.accumulate_grad_batches
    name = f"{type(module).__name__}, backbone {module.hparams.get('backbone')}"
    lines = [
        f"network: {name}, {sizes[True] / 1e6:.1f} M parameters train, {sizes[False] / 1e6:.1f} M are frozen",
        f"batch: {batch} images x {trainer.world_size} devices x {accumulated} accumulated; precision "
        f"{trainer.precision}; device {module.device}",
        f"steps: {_steps(trainer)}; learning rate {_rates(trainer)}",
    ]
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if isinstance(dataset, DetectionDataset):
        table = dataset.annotations
        lines.insert(0, f"data: {len(table)} training images, {int((~table.crowd).sum())} objects of "
                        f"{len(table.class_names)} classes")  # fmt: skip
    return lines


def forecast(trainer: pl.Trainer, seconds_per_step: float) -> str:
    """The line that says how long the training steps will take; validation comes on top."""
    steps = float(trainer.estimated_stepping_batches)
    left = "" if steps == float("inf") else f", {duration(seconds_per_step * (steps - trainer.global_step))} to go"
    device = next(trainer.lightning_module.parameters()).device
    memory = f"; peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB" if device.type == "cuda" else ""
    return f"forecast: {seconds_per_step:.2f} s a step{left}, without validation{memory}"


def progress_line(trainer: pl.Trainer) -> str:
    """Step, loss and last mAP on a line."""
    metrics = {**trainer.logged_metrics, **trainer.callback_metrics}
    shown = [f"{name} {float(metrics[name]):.3f}" for name in ("train/loss", "val/map") if name in metrics]
    step = f"step {trainer.global_step} of {trainer.estimated_stepping_batches}"
    return f"epoch {trainer.current_epoch}, {step}: {', '.join(shown)}"


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(42.4), duration(90), duration(7300)
    ('42 s', '1 min 30 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _steps(trainer: pl.Trainer) -> str:
    steps = trainer.estimated_stepping_batches
    return str(steps) if math.isfinite(steps) else "as many as the time allows, or until it is stopped"


def _rates(trainer: pl.Trainer) -> str:
    """The learning rate now, and without warm-up: the highest of the parameter groups."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if not groups:
        return "unknown"
    now, peak = (max(float(group.get(name, group["lr"])) for group in groups) for name in ("lr", "initial_lr"))
    return f"{now:.2g}" if now == peak else f"{now:.2g} at the start, {peak:.2g} at its peak"


def _write_sheet(trainer: pl.Trainer, destination: Path) -> None:
    """Draw the first training images of the epoch with their boxes, as the network gets them."""
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if not isinstance(dataset, DetectionDataset):
        return
    names = dataset.annotations.class_names
    colors, step = class_colors(names), max(1, len(dataset) // _SHOWN)
    drawn = []
    for index in range(0, len(dataset), step)[:_SHOWN]:
        image, target = dataset[(trainer.current_epoch, index)]
        labels = [names[label] for label in target["labels"].tolist()]
        if image.shape[0] in (1, 3, 4):
            drawn.append(draw_detections(image, target["boxes"], labels, None, colors))
    if drawn:
        destination.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(drawn).save(destination, quality=80)
