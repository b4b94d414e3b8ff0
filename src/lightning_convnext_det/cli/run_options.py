"""Arguments of ``fit``: its length, what it shows, and what is measured before it."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.tuner.tuning import Tuner
from lightning.pytorch.utilities import rank_zero_info

from lightning_convnext_det.callbacks.time_budget import TimeBudget
from lightning_convnext_det.callbacks.validation_images import ValidationImages
from lightning_convnext_det.callbacks.weight_averaging import EMAWithWarmup
from lightning_convnext_det.cli.given import parse_duration
from lightning_convnext_det.cli.inference import add_flag
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.modules.optimization import TrainableModule
from lightning_convnext_det.ops.nms import NMSMethod

LEAST_RATE, GREATEST_RATE = 1e-6, 1.0  # of the search for a learning rate


def add_run_arguments(parser: LightningArgumentParser) -> None:
    """Add the arguments of a run beside those of trainer, model and data."""
    add_flag(parser, "nms", NMSMethod | None, None)
    add_flag(parser, "start_from", str | None, None)
    add_flag(parser, "plan", bool, True)
    add_flag(parser, "time", str | None, None)
    add_flag(parser, "early_stopping", int | None, None)
    add_flag(parser, "ema", bool, False)
    add_flag(parser, "lr_find", bool, False)
    add_flag(parser, "batch_size_find", bool, False)
    add_flag(parser, "log_images", int, 4)
    add_flag(parser, "report", bool, False)


def create_run_callbacks(
    config: Mapping[str, Any], model: LightningModule, given: Sequence[Callback], validates: bool
) -> list[Callback]:
    """The callbacks that the arguments of a fit ask for.

    Args:
        config: the arguments of ``fit``.
        model: tells the metric by which a training is judged.
        given: the user's own callbacks.
        validates: whether there are validations.

    Raises:
        ArgumentError: if an argument has no sense for this training.
    """
    own: list[Callback] = []
    if config["time"] is not None:
        own.append(TimeBudget(parse_duration(config["time"])))
    if config["early_stopping"] is not None:
        own.append(_early_stopping(config["early_stopping"], model, validates))
    if config["ema"]:
        if any(isinstance(callback, WeightAveraging) for callback in given):
            raise ArgumentError("--ema averages the weights, and so does a callback of trainer.callbacks; give one")
        own.append(EMAWithWarmup())
    if config["log_images"] < 0:
        raise ArgumentError(f"--log_images is {config['log_images']}; give a number of images, or 0 for none")
    if config["log_images"] and validates:
        own.append(ValidationImages(config["log_images"]))
    return own


def tune(trainer: Trainer, model: LightningModule, data: LightningDataModule, config: Mapping[str, Any]) -> None:
    """Find the largest batch and then the learning rate, as far as the arguments ask for it.

    Raises:
        ArgumentError: if the batch is to be found without an accelerator, or the rate is meant for another batch.
    """
    if config["batch_size_find"]:
        if trainer.strategy.root_device.type == "cpu":
            raise ArgumentError(
                "--batch_size_find tries batches until an accelerator's memory is full; a CPU has no such limit: "
                "leave it out, and the plan chooses the batch"
            )
        find_batch_size(trainer, model, data)
    if config["lr_find"]:
        find_learning_rate(trainer, model, data)


def find_batch_size(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> int:
    """Double the batch size until the memory is full, and set the data module's to the largest that fits."""
    before = int(data.batch_size)  # type: ignore[attr-defined]  # of this package's data modules
    found = Tuner(trainer).scale_batch_size(model, datamodule=data, init_val=max(1, before))
    size = before if found is None else int(found)
    data.batch_size = size  # type: ignore[attr-defined]
    rank_zero_info(
        f"batch size {size} is the largest that fits, {before} was set; learning rate and number of steps stay"
    )
    return size


def find_learning_rate(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> float:
    """Set the learning rate to that of the steepest descent of the loss (Smith, arXiv:1506.01186).

    Raises:
        ArgumentError: if no rate lets the loss fall, or the module scales its rate by the batch.
    """
    if model.hparams.get("base_batch_size") is not None:
        raise ArgumentError("--lr_find measures the rate of this batch; leave out model.base_batch_size")
    before, epochs = float(model.hparams["lr"]), trainer.fit_loop.max_epochs
    trainer.fit_loop.max_epochs = -1  # the search takes its steps from as many epochs as it needs
    try:
        finder = Tuner(trainer).lr_find(
            model, datamodule=data, min_lr=LEAST_RATE, max_lr=GREATEST_RATE, update_attr=False
        )
    finally:
        trainer.fit_loop.max_epochs = epochs
    found = None if finder is None else finder.suggestion()
    if found is None:
        raise ArgumentError("--lr_find: the loss falls at no learning rate; leave it out, and the plan chooses one")
    model.hparams["lr"] = float(found)
    rank_zero_info(f"learning rate {found:.2g}, where the loss falls fastest, replaces {before:.2g}")
    return float(found)


def _early_stopping(patience: int, model: LightningModule, validates: bool) -> EarlyStopping:
    if patience < 1:
        raise ArgumentError(f"--early_stopping is {patience}; give a number of validations, at least 1")
    if not validates:
        raise ArgumentError("--early_stopping needs validations; set data.val or data.val_fraction")
    monitor = getattr(model, "monitor", TrainableModule.monitor)
    # nan is an undefined metric, of a validation without objects, and no reason to stop; RunGuard ends what diverges
    return EarlyStopping(monitor, mode="max", patience=patience, check_finite=False, verbose=True)
