"""Lengths decided by a clock that the tests set."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_convnext_det.callbacks import time_budget
from lightning_convnext_det.callbacks.time_budget import TimeBudget
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.modules.detection import Batch
from tests.training import create_module, create_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


class Clock(Callback):
    """A clock that a step moves by ``step`` seconds and a validation by ``validation``."""

    def __init__(self, step: float, validation: float) -> None:
        self.now, self.step, self.validation = 100.0, step, validation
        self.rates: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.now += self.step
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.now += self.validation


def train(
    folder: Path,
    loader: DataLoader[Batch],
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    seconds: float,
    **options: object,
) -> tuple[pl.Trainer, TimeBudget]:
    monkeypatch.setattr(time_budget.time, "monotonic", clock.monotonic)
    budget = TimeBudget(seconds)
    limits = {"max_epochs": -1, "enable_checkpointing": False, **options}
    trainer = create_trainer(folder, callbacks=[budget, clock], **limits)
    trainer.fit(create_module(lr=1.0, warmup_steps=4, optimizer="sgd"), loader, loader)
    return trainer, budget


@pytest.mark.heavy
@pytest.mark.parametrize("validation", [0.0, 6.0])
def test_fit__ends_after_the_time_with_the_schedule_finished(
    validation: float, tmp_path: Path, loader: DataLoader[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    clock = Clock(2.0, validation)
    monkeypatch.setattr("lightning_convnext_det.modules.detection.DetectionModule.training_step", _cheap_step)
    trainer, budget = train(tmp_path, loader, monkeypatch, clock, 60.0, check_val_every_n_epoch=4)
    spent = clock.now - 100.0
    assert 50 <= spent <= 62
    # 12 steps and a validation take 30 s, the last validation 6; 24 s are 9 steps with their share of a validation
    assert trainer.global_step == budget.steps == (21 if validation else 30)
    assert clock.rates[-1] < 0.02 * max(clock.rates)  # cosine to zero at the last step


@pytest.mark.heavy
@pytest.mark.parametrize("limit", [{"max_steps": 14}, {"max_epochs": 5}])  # of three steps
def test_fit__a_limit_of_the_trainer_that_comes_first_ends_the_schedule(
    limit: dict[str, int], tmp_path: Path, loader: DataLoader[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    clock = Clock(2.0, 0.0)
    monkeypatch.setattr("lightning_convnext_det.modules.detection.DetectionModule.training_step", _cheap_step)
    trainer, budget = train(tmp_path, loader, monkeypatch, clock, 60.0, check_val_every_n_epoch=9, **limit)
    assert trainer.global_step == budget.steps == (14 if "max_steps" in limit else 15)
    assert clock.rates[-1] < 0.06 * max(clock.rates)


@pytest.mark.heavy
def test_fit__a_resumed_run_has_the_time_that_was_left(
    tmp_path: Path, loader: DataLoader[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TimeBudget(60.0)
    clock = Clock(2.0, 0.0)
    monkeypatch.setattr(time_budget.time, "monotonic", clock.monotonic)
    first._start = 60.0  # 40 seconds ago
    state = first.state_dict()
    assert state == {"spent": 40.0, "steps": None}
    second = TimeBudget(60.0)
    second.load_state_dict(state)
    monkeypatch.setattr("lightning_convnext_det.modules.detection.DetectionModule.training_step", _cheap_step)
    trainer = create_trainer(tmp_path, max_epochs=-1, enable_checkpointing=False, callbacks=[second, clock])
    trainer.fit(create_module(), loader, loader)
    assert trainer.global_step == 11  # decided after ten: one more is the least


def test_on_train_batch_end__batches_that_accumulate_are_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time_budget.time, "monotonic", lambda: now[0])
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(max_steps=-1))
    trainer: Any = SimpleNamespace(
        global_step=0, accumulate_grad_batches=4, enable_validation=False, fit_loop=loop,
        estimated_stepping_batches=math.inf, strategy=SimpleNamespace(broadcast=lambda value: value),
    )  # fmt: skip
    budget, module = TimeBudget(1000.0), create_module()
    budget.on_fit_start(trainer, module)
    budget.on_train_start(trainer, module)
    for batch in range(1, 41):  # of a second
        now[0], trainer.global_step = float(batch), batch // 4
        budget.on_train_batch_end(trainer, module)
    assert budget.steps == loop.epoch_loop.max_steps == 250  # of four seconds


def test_time_budget__refuses_no_time() -> None:
    with pytest.raises(ArgumentError, match="seconds is 0"):
        TimeBudget(0)


def _cheap_step(module: pl.LightningModule, batch: object, batch_idx: int) -> torch.Tensor:
    return sum((p.sum() * 0.0 for p in module.parameters() if p.requires_grad), torch.zeros(()))
