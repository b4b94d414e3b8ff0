import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch.utils.data import DataLoader

from lightning_convnext_det.modules import load_module
from lightning_convnext_det.modules.detection import Batch
from tests.training import create_batches, create_module, create_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class _Recorder(Callback):
    """The weights after every optimizer step, and those that validation sees."""

    def __init__(self) -> None:
        self.after_step: list[torch.Tensor] = []
        self.in_validation: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, module, *_) -> None:  # type: ignore[no-untyped-def]
        self.after_step.append(module.detector.roi_heads.box_head.fc7.weight.detach().clone())

    def on_validation_batch_end(self, trainer, module, *_) -> None:  # type: ignore[no-untyped-def]
        self.in_validation.append(module.detector.roi_heads.box_head.fc7.weight.detach().clone())


@pytest.mark.heavy
def test_ema__evaluation_checkpoint_and_prediction_use_the_average(tmp_path: Path, loader: DataLoader[Batch]) -> None:
    module, recorder = create_module(lr=1e-2, warmup_steps=0, schedule="constant"), _Recorder()
    key = "detector.roi_heads.box_head.fc7.weight"
    trainer = create_trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.5), recorder], enable_checkpointing=False)
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    # the average by hand: the first step starts it, each later one moves it half of the way
    first, second, third = recorder.after_step
    average = 0.5 * (0.5 * first + 0.5 * second) + 0.5 * third
    assert not torch.allclose(average, third, atol=1e-4)
    assert torch.allclose(recorder.in_validation[0], average, atol=1e-6)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.allclose(content["state_dict"][key], average, atol=1e-6)
    loaded = load_module(tmp_path / "a.ckpt")
    assert torch.allclose(loaded.detector.roi_heads.box_head.fc7.weight, average, atol=1e-6)
    images, _ = create_batches(1)[0]
    with torch.no_grad():
        assert torch.equal(loaded(images)[0]["boxes"], module.eval()(images)[0]["boxes"])


class _Data:
    batch_size = 2


@pytest.mark.parametrize(("reference", "expected"), [(None, 1e-3), (16, 1e-3 * 8 / 16), (8, 1e-3)])
def test_base_batch_size__scales_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reference: int | None, expected: float
) -> None:
    class _Trainer:
        datamodule, world_size, accumulate_grad_batches = _Data(), 2, 2
        estimated_stepping_batches, max_epochs = 100, 1

    module = create_module(lr=1e-3, base_batch_size=reference, backbone_lr_factor=0.1)
    monkeypatch.setattr(type(module), "trainer", _Trainer())
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    found = module.configure_optimizers()
    rates = {g["name"]: g["initial_lr"] for g in found["optimizer"].param_groups}
    assert rates["lr x1, decay"] == pytest.approx(expected)
    assert rates["lr x0.1, decay"] == pytest.approx(0.1 * expected)
    said = [r.getMessage() for r in caplog.records if "total batch" in r.getMessage()]
    if reference == 16:
        assert said == [
            "learning rate 0.001 x 8 / 16 = 0.0005: total batch 8 = 2 images x 2 ranks x 2 accumulated batches"
        ]
    else:
        assert len(said) == (reference is not None)


def test_base_batch_size__without_a_data_module(tmp_path: Path, loader: DataLoader[Batch]) -> None:
    with pytest.raises(ValueError, match="base_batch_size needs a data module"):
        create_trainer(tmp_path, enable_checkpointing=False).fit(create_module(base_batch_size=16), loader)


def test_layer_decay__groups_are_said_when_training_begins(
    tmp_path: Path, loader: DataLoader[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    module = create_module(layer_decay=0.5, lr=1e-3)
    create_trainer(tmp_path, enable_checkpointing=False, max_steps=1).fit(module, loader)
    table = next(r.getMessage() for r in caplog.records if "learning rate  weight decay" in r.getMessage())
    assert "layer 0, lr x0.007812, decay" in table


@pytest.mark.parametrize("max_epochs", [10, -1])
def test_milestones__count_whole_epochs_however_early_the_training_stops(
    tmp_path: Path, loader: DataLoader[Batch], max_epochs: int
) -> None:
    module = create_module(schedule="step", milestones=[1], warmup_steps=0)
    trainer = create_trainer(tmp_path, enable_checkpointing=False, max_epochs=max_epochs, max_steps=1)
    trainer.fit(module, loader)
    factor = module.lr_schedulers().lr_lambdas[0]
    assert [factor(step) for step in (0, 2, 3)] == pytest.approx([1, 1, 0.1])  # 3 batches per epoch


def test_fit__clips_gradients_of_the_fused_step_in_mixed_precision(tmp_path: Path, loader: DataLoader[Batch]) -> None:
    module = create_module()
    trainer = create_trainer(tmp_path, max_steps=1, precision="bf16-mixed", gradient_clip_val=0.1)
    trainer.fit(module, loader)
    assert all(group["fused"] for group in trainer.optimizers[0].param_groups)
