"""Callback that shows a training: what is trained, how long it will take, and a line a minute without a terminal."""

import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_convnext_det.callbacks.pace import WARM_UP, Pace, validations_left
from lightning_convnext_det.data.dataset import DetectionDataset
from lightning_convnext_det.visualization import class_colors, contact_sheet, draw_detections

_FORECAST_AFTER = 10  # steps
_EVERY = 60.0  # seconds between two lines
_SHOWN = 12  # augmented images


class RunOverview(Callback):
    """Say what a training is made of, forecast its time after ten steps, and write a sheet of augmented images.

    The forecast includes validations; after the first one, which it could only estimate, a second forecast follows.
    Where the output is not a terminal, a line a minute tells step, losses and the last mAP. The sheet,
    ``training_images.jpg``, lies in the folder of the logs.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[RunOverview()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._pace = Pace()
        self._last_line = 0.0
        self._forecasts_due = 2
        self.forecast: float | None = None
        """Seconds of the whole fit, as foreseen after ten steps."""
        self.seconds = math.nan
        """Seconds that the fit took."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the clock."""
        self._pace.begin()
        self._forecasts_due, self.forecast = 2, None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the overview and write the sheet of images."""
        rank_zero_info("\n".join(overview(trainer, pl_module)))
        folder = trainer.log_dir  # a collective call
        if trainer.is_global_zero and folder:
            _write_sheet(trainer, Path(folder) / "training_images.jpg")
        self._last_line = self._pace.elapsed
        self._pace.train_started(trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forecast after ten steps and after the first validation, and print a line a minute."""
        self._pace.step_ended(trainer.global_step)
        if self._forecasts_due == 2 and self._pace.timed_steps == _FORECAST_AFTER - WARM_UP:
            self._forecasts_due = 1
            self.forecast = self._pace.elapsed + self._pace.seconds_to_go(trainer)
            rank_zero_info(forecast(trainer, self._pace))
        self._print_progress(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time validations apart from steps."""
        self._pace.validation_started()

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        """Time the batches of the sanity check, by which validations are foreseen."""
        if trainer.sanity_checking:
            self._pace.sanity_batch_started()

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Print a line a minute in long validations, too."""
        if trainer.sanity_checking:
            self._pace.sanity_batch_ended()
        elif trainer.training or trainer.validating:
            self._print_progress(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forecast once more when the first validation has been timed."""
        if trainer.sanity_checking:
            return
        self._pace.validation_ended()
        if self._forecasts_due == 1 and validations_left(trainer):
            self._forecasts_due = 0
            rank_zero_info(forecast(trainer, self._pace))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how long it took."""
        self.seconds = self._pace.elapsed
        foreseen = "" if self.forecast is None or not math.isfinite(self.forecast) else duration(self.forecast)
        rank_zero_info(f"trained in {duration(self.seconds)}" + (f"; forecast: {foreseen}" if foreseen else ""))

    @rank_zero_only
    def _print_progress(self, trainer: pl.Trainer) -> None:
        if self._pace.elapsed - self._last_line >= _EVERY and not sys.stdout.isatty():
            self._last_line = self._pace.elapsed
            rank_zero_info(progress_line(trainer, self._pace))


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


def forecast(trainer: pl.Trainer, pace: Pace) -> str:
    """The line that says how long the rest of the training will take, validations included."""
    parts, left = [f"{pace.seconds_per_step:.2f} s a step"], validations_left(trainer)
    if left:
        each = pace.seconds_per_validation(trainer)
        parts.append(f"{left} validations of {duration(each)}" if each else f"{left} validations, not timed yet")
    to_go = pace.seconds_to_go(trainer)
    if math.isfinite(to_go):
        parts.append(f"{duration(to_go)} to go, {duration(pace.elapsed + to_go)} in all")
    device = trainer.lightning_module.device
    if device.type == "cuda":
        parts.append(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB")
    return f"forecast: {', '.join(parts)}"


def progress_line(trainer: pl.Trainer, pace: Pace) -> str:
    """Epoch, step, time to go, losses and last mAP on a line."""
    metrics = {**trainer.logged_metrics, **trainer.callback_metrics}
    # without those of the decoder's inner layers, of which Deformable DETR has fifteen
    names = [name for name in metrics if name.startswith("train/loss") and "_aux" not in name]
    shown = [f"{name} {float(metrics[name]):.3f}" for name in [*names, "val/map"] if name in metrics]
    total, to_go = float(trainer.estimated_stepping_batches), pace.seconds_to_go(trainer)
    of = f" of {total:.0f}" if math.isfinite(total) else ""
    where = "validating, " if trainer.validating else ""
    rest = f", {duration(to_go)} to go" if math.isfinite(to_go) else ""
    return f"{where}epoch {trainer.current_epoch}, step {trainer.global_step}{of}{rest}: {', '.join(shown)}"


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
