import math
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_convnext_det.callbacks.best_checkpoint import BestCheckpoint
from lightning_convnext_det.callbacks.divergence import LossWatch, find_non_finite
from lightning_convnext_det.callbacks.run_guard import CHECK_EVERY, RunGuard
from lightning_convnext_det.checkpoints.file import AtomicCheckpointIO, find_damage, read_checkpoint_file
from lightning_convnext_det.errors import CheckpointError, DivergenceError
from lightning_convnext_det.modules import DeformableDETRModule, FasterRCNNModule
from lightning_convnext_det.modules.detection import Batch
from tests.training import TINY, create_batches, create_module, create_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]


def best_in(folder: Path) -> BestCheckpoint:
    return BestCheckpoint(folder, "best", "val/map", mode="max", save_last=True, enable_version_counter=False)


class BadStep(Callback):
    """Makes one loss of one step what it should not be."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value, self.seen = step, value, 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if trainer.global_step == self.step:
            forward = module.detector.forward
            module.detector.forward = lambda *a: forward(*a) | {"loss_box": forward(*a)["loss_box"] * self.value}


@pytest.mark.heavy
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_fit__a_loss_that_is_not_finite_ends_the_run(loader: DataLoader[Batch], tmp_path: Path, value: float) -> None:
    bad = BadStep(4, value)  # the second step of the second epoch
    trainer = create_trainer(tmp_path, max_epochs=9, callbacks=[bad, best_in(tmp_path)])
    with pytest.raises(DivergenceError) as caught:
        trainer.fit(create_module(), loader, loader)
    assert bad.seen == 5  # within one step
    text = str(caught.value)
    assert f"[LCD-N001] loss_box is {value} at epoch 1, step 4, rank 0, images 1_0.png, 1_1.png; " in text
    assert text.endswith(f"the last checkpoint is {tmp_path / 'last.ckpt'}")
    assert find_non_finite(read_checkpoint_file(tmp_path / "last.ckpt")["state_dict"]) is None


def test_fit__what_the_detector_itself_notices_is_said_with_step_and_images(tmp_path: Path) -> None:
    small = {"hidden_dim": 32, "num_queries": 8, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    module = DeformableDETRModule(2, backbone="test_convnext", min_size=64, max_size=96, **small)
    with torch.no_grad():
        next(p for n, p in module.named_parameters() if "class_heads" in n).fill_(math.nan)
    loader = DataLoader(create_batches(2), batch_size=None)
    with pytest.raises(DivergenceError, match=r"\[LCD-N001\] the logits.* at epoch 0, step 0, rank 0, images 0_0"):
        create_trainer(tmp_path, enable_checkpointing=False).fit(module, loader)


def test_fit__losses_may_be_read_every_few_steps(tmp_path: Path) -> None:
    bad, loader = BadStep(1, math.nan), DataLoader(create_batches(8), batch_size=None)
    trainer = create_trainer(tmp_path, callbacks=[bad, RunGuard(check_every=4)], enable_checkpointing=False)
    with pytest.raises(DivergenceError, match=r"loss_box is nan at epoch 0, step 1, .*1_0\.png, .*; no checkpoint has"):
        trainer.fit(create_module(), loader)
    assert bad.seen == 4
    assert CHECK_EVERY == 10  # the README says so
    with pytest.raises(ValueError, match="check_every is 0"):
        RunGuard(0)


def test_fit__losses_left_over_are_read_before_anything_is_saved(loader: DataLoader[Batch], tmp_path: Path) -> None:
    trainer = create_trainer(
        tmp_path, callbacks=[BadStep(2, math.nan), RunGuard(check_every=100), best_in(tmp_path)], max_epochs=2
    )
    with pytest.raises(DivergenceError, match="epoch 0, step 2"):
        trainer.fit(create_module(), loader, loader)
    assert not list(tmp_path.glob("*.ckpt"))


def test_save_checkpoint__weights_that_are_not_finite_are_refused(loader: DataLoader[Batch], tmp_path: Path) -> None:
    trainer, module = create_trainer(tmp_path, enable_checkpointing=False), create_module()
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with torch.no_grad():
        module.detector.backbone.fpn.inner_blocks[0][0].bias[3] = math.inf
    name = r"detector\.backbone\.fpn\.inner_blocks\.0\.0\.bias"
    for weights_only in (False, True):
        with pytest.raises(DivergenceError, match=rf"LCD-N002.*nothing is saved: weight '{name}' is not finite"):
            trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only)
    assert find_non_finite(read_checkpoint_file(tmp_path / "a.ckpt")["state_dict"]) is None
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        with pytest.raises(DivergenceError, match=r"LCD-N002.*evaluation"):
            evaluate(module, loader)


def test_loss_watch__patience_is_for_steps_in_a_row() -> None:
    watch = LossWatch(patience=2)
    good, bad = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, {"a": torch.tensor(1.0), "b": torch.tensor(-math.inf)}
    for step, losses in enumerate([bad, bad, good, bad]):
        watch.add(losses, ["x"], 0, step)
    assert watch.read() is None
    watch.add(bad, ["y"], 0, 4)
    assert watch.read() is None
    watch.add(bad, ["z", "w"], 1, 5)
    assert watch.read(3) == "[LCD-N001] b is -inf at epoch 1, step 5, rank 3, images z, w"
    assert LossWatch().read() is None


class Strike(Callback):
    def __init__(self, number: signal.Signals, hook: str) -> None:
        self.number, self.hook = number, hook
        setattr(self, hook, lambda *_: os.kill(os.getpid(), number))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_fit__a_signal_saves_and_ends_with_143(
    loader: DataLoader[Batch], tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(number)
    trainer = create_trainer(tmp_path, max_epochs=2, callbacks=[Strike(number, "on_train_epoch_start")])
    with pytest.raises(SystemExit) as caught:
        trainer.fit(create_module(), loader, loader)
    assert caught.value.code == 143
    assert trainer.global_step == 1
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert read_checkpoint_file(path)["global_step"] == 1
    assert (
        f"{number.name}: told to stop after step 1 of the training, in epoch 0; continue with --ckpt_path {path}"
        in (caplog.text)
    )
    assert signal.getsignal(number) == before


def test_fit__a_signal_in_the_sanity_check_is_obeyed_after_the_first_step(
    loader: DataLoader[Batch], tmp_path: Path
) -> None:
    strike = Strike(signal.SIGTERM, "on_validation_batch_start")
    trainer = create_trainer(tmp_path, callbacks=[strike], num_sanity_val_steps=2)
    with pytest.raises(SystemExit):
        trainer.fit(create_module(), loader, loader)
    assert trainer.global_step == 1


@pytest.mark.parametrize(
    ("method", "hook"), [("validate", "on_validation_epoch_start"), ("predict", "on_predict_epoch_start")]
)
def test_evaluation__a_signal_ends_it_at_once(
    loader: DataLoader[Batch], tmp_path: Path, method: str, hook: str
) -> None:
    trainer, module = create_trainer(tmp_path, callbacks=[Strike(signal.SIGTERM, hook)]), create_module()
    module.validation_step = module.predict_step = lambda *_: pytest.fail("went on")  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as caught:
        getattr(trainer, method)(module, loader)
    assert caught.value.code == 143


def test_setup__puts_atomic_checkpoints_into_any_trainer(loader: DataLoader[Batch], tmp_path: Path) -> None:
    trainer = create_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(create_module(), loader)
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert b"lightning_convnext_det sha256 " in (tmp_path / "a.ckpt").read_bytes()[-120:]
    assert find_damage(tmp_path / "a.ckpt") is None

    class Theirs(TorchCheckpointIO):
        pass

    trainer = create_trainer(tmp_path, enable_checkpointing=False, plugins=[Theirs()])
    trainer.fit(create_module(), loader)
    assert type(trainer.strategy.checkpoint_io) is Theirs


def test_resume__weights_of_another_network_are_refused_in_one_line(loader: DataLoader[Batch], tmp_path: Path) -> None:
    trainer = create_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(create_module(), loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"LCD-K014.*does not fit.*is \[32.*expected \[16") as caught:
        create_trainer(tmp_path).fit(create_module(fpn_channels=16), loader, ckpt_path=tmp_path / "a.ckpt")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.heavy
def test_resume__the_learning_rate_given_replaces_the_checkpoints(loader: DataLoader[Batch], tmp_path: Path) -> None:
    def rates(lr: float, checkpoint: Path | None, epochs: int, **options: object) -> list[float]:
        module, found = create_module(lr=lr, warmup_steps=0, **options), []
        module.on_train_batch_start = lambda *_: found.append(module.optimizers().param_groups[0]["lr"])  # type: ignore[method-assign]
        trainer = create_trainer(tmp_path, max_epochs=epochs, enable_checkpointing=False)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        decays = {g["weight_decay"] for g in trainer.optimizers[0].param_groups}
        assert decays == {0.0, options.get("weight_decay", 0.05)}
        return found

    assert rates(1e-3, None, 1, schedule="constant") == pytest.approx([1e-3] * 3)
    changed = rates(4e-3, tmp_path / "a.ckpt", 2, schedule="constant", weight_decay=0.2)
    assert changed == pytest.approx([4e-3] * 3)
    assert rates(4e-3, tmp_path / "a.ckpt", 3, schedule="constant", weight_decay=0.2) == pytest.approx([4e-3] * 3)


class LeavesOut(FasterRCNNModule):
    """Does nothing in its second step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class ReturnsLoss(FasterRCNNModule):
    """Returns the loss alone."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)["loss"]


class ReturnsOther(FasterRCNNModule):
    """Adds what is no scalar."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx)["loss"], "losses": {"map": torch.ones(3)}}


class Manual(FasterRCNNModule):
    """Optimizes by hand."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = torch.stack(list(self.detector(*batch).values())).sum()
        self.manual_backward(loss)
        optimizer.step()


class OwnMetric(FasterRCNNModule):
    """Logs a metric of its own."""

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val/f1", 0.5 + self.current_epoch / 10)


@pytest.mark.parametrize("kind", [LeavesOut, ReturnsLoss, ReturnsOther, Manual])
def test_fit__what_a_training_step_may_return(
    loader: DataLoader[Batch], tmp_path: Path, kind: type[FasterRCNNModule]
) -> None:
    module = kind(2, **TINY)
    before = module.detector.roi_heads.box_head.fc7.weight.detach().clone()
    trainer = create_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(module, loader)
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 3
    assert not torch.equal(module.detector.roi_heads.box_head.fc7.weight, before)


def test_fit__divergence_is_noticed_in_a_loss_alone(loader: DataLoader[Batch], tmp_path: Path) -> None:
    trainer = create_trainer(tmp_path, callbacks=[BadStep(1, math.nan)], enable_checkpointing=False)
    with pytest.raises(DivergenceError, match=r"LCD-N001\] loss is nan at epoch 0, step 1, rank 0"):
        trainer.fit(ReturnsLoss(2, **TINY), loader)


def test_fit__a_metric_that_a_subclass_logs_is_monitored(loader: DataLoader[Batch], tmp_path: Path) -> None:
    best = BestCheckpoint(tmp_path, "best", "val/f1", mode="max")
    create_trainer(tmp_path, max_epochs=2, callbacks=[best]).fit(OwnMetric(2, **TINY), loader, loader)
    assert float(best.best_model_score) == pytest.approx(0.6)


class State(Callback):
    """Has any state, from the beginning or from the first epoch on."""

    def __init__(self, state: object, late: bool = False) -> None:
        self.state, self.late, self.loaded = state, late, None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.late else {"best": self.state}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.late = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict["best"]


@pytest.mark.parametrize(
    ("state", "expected"),
    [(np.float64(0.5), 0.5), (Path("runs"), "runs"), ({1, 2}, {1, 2}), ({"a": [np.int64(3)]}, {"a": [3]})],
    ids=["number", "path", "set", "nested"],
)
def test_fit__a_callbacks_state_is_saved_so_that_it_can_be_read(
    loader: DataLoader[Batch], tmp_path: Path, state: object, expected: object
) -> None:
    trainer = create_trainer(tmp_path, callbacks=[State(state)], enable_checkpointing=False)
    trainer.fit(create_module(), loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = State(None)
    create_trainer(tmp_path, max_epochs=2, callbacks=[again], enable_checkpointing=False).fit(
        create_module(), loader, ckpt_path=tmp_path / "a.ckpt"
    )
    assert again.loaded == expected
    assert type(again.loaded) is type(expected)


@pytest.mark.parametrize("late", [False, True], ids=["at the start", "at the first save"])
def test_fit__a_state_that_could_not_be_read_is_refused(loader: DataLoader[Batch], tmp_path: Path, late: bool) -> None:
    trainer = create_trainer(tmp_path, callbacks=[State(LossWatch(), late), best_in(tmp_path)])
    with pytest.raises(CheckpointError, match=r"LCD-K019\] callbacks\.State\S*\.best is a LossWatch, which could not"):
        trainer.fit(create_module(), loader, loader)
    assert trainer.global_step == (3 if late else 0)
    assert not list(tmp_path.glob("*.ckpt"))
    create_trainer(tmp_path, callbacks=[State(LossWatch())], enable_checkpointing=False).fit(create_module(), loader)
