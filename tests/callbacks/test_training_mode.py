"""A network is trained in training mode, whatever has been done with it before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_convnext_det import Predictor
from lightning_convnext_det.callbacks.training_mode import enter_training_mode
from lightning_convnext_det.modules import ClassifierModule, FasterRCNNModule, load_module
from lightning_convnext_det.modules.detection import Batch
from lightning_convnext_det.modules.registry import save_module
from tests.training import create_batches, create_module, create_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class Peek(Callback):
    """Predicts with the detector that is being trained."""

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        Predictor(module.detector, ["a", "b"])(create_batches(1)[0][0][0])
        module.eval()  # whatever a predictor gives back


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_fit__after_loading_and_after_predicting(tmp_path: Path, loader: DataLoader[Batch]) -> None:
    trained = create_module()
    create_trainer(tmp_path, enable_checkpointing=False).fit(trained, loader)
    save_module(trained, tmp_path / "a.ckpt")
    Predictor(trained.detector, ["a", "b"])(create_batches(1)[0][0][0])
    loaded = [FasterRCNNModule.load_from_checkpoint(tmp_path / "a.ckpt"), load_module(tmp_path / "a.ckpt")]
    for module in (trained, *loaded):
        module.eval()
        before = weights(module)
        create_trainer(tmp_path, enable_checkpointing=False).fit(module, loader)
        assert all(part.training for part in module.modules())
        assert not torch.equal(weights(module), before)


def test_fit__a_predictor_in_a_callback(tmp_path: Path, loader: DataLoader[Batch]) -> None:
    trainer = create_trainer(tmp_path, max_epochs=3, callbacks=[Peek()], enable_checkpointing=False)
    trainer.fit(create_module(), loader, loader)
    assert trainer.global_step == 9


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_fit__frozen_parts_keep_their_mode(tmp_path: Path, loader: DataLoader[Batch]) -> None:
    module = create_module()
    frozen = module.detector.backbone.fpn.requires_grad_(False).eval()
    module.detector.rpn.eval()  # learns, so it is trained
    create_trainer(tmp_path, enable_checkpointing=False).fit(module, loader)
    assert not any(part.training for part in frozen.modules())
    assert module.detector.rpn.training
    assert module.detector.backbone.training


def test_enter_training_mode__of_a_classifier() -> None:
    module = ClassifierModule(2, backbone="test_convnext").eval()
    enter_training_mode(module)
    assert all(part.training for part in module.modules())
