from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_convnext_det.callbacks.stage_unfreezing import StageUnfreezing
from tests.training import create_batches, create_module, create_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class _Recorder(Callback):
    """Which stages of the backbone moved in an epoch."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self._before: dict[str, torch.Tensor] = {}

    def on_train_epoch_start(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
        self._before = {n: p.detach().clone() for n, p in module.detector.backbone.body.net.named_parameters()}

    def on_train_epoch_end(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
        now = dict(module.detector.backbone.body.net.named_parameters())
        self.moved.append({n.split(".")[0] for n, p in self._before.items() if not torch.equal(p, now[n])})


def test_stage_unfreezing__the_deepest_first(tmp_path: Path) -> None:
    module, recorder = create_module(lr=1e-3, warmup_steps=0, layer_decay=0.9), _Recorder()
    trainer = create_trainer(
        tmp_path, max_epochs=4, enable_checkpointing=False, callbacks=[StageUnfreezing([1, 2, 3]), recorder]
    )
    trainer.fit(module, DataLoader(create_batches(1), batch_size=None))
    assert recorder.moved[0] == set()
    assert recorder.moved[1] == {"stages_3"}
    assert recorder.moved[2] == {"stages_2", "stages_3"}
    assert recorder.moved[3] == {"stages_1", "stages_2", "stages_3"}


def test_stage_unfreezing__wrong_epochs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rising, the deepest stage's first"):
        StageUnfreezing([3, 1])
    trainer = create_trainer(tmp_path, enable_checkpointing=False, callbacks=[StageUnfreezing([0, 1, 2, 3, 4])])
    with pytest.raises(ValueError, match="but the backbone has 4 stages"):
        trainer.fit(create_module(), DataLoader(create_batches(1), batch_size=None))


def test_stage_unfreezing__frozen_stages_stay_frozen_and_statistics_rest(tmp_path: Path) -> None:
    module = create_module(backbone="test_resnet", frozen_stages=1, batch_norm="train", warmup_steps=0)
    first = [p for p in module.parameters() if not p.requires_grad]
    before = module.detector.backbone.body.net.layer3[0].bn1.running_mean.clone()
    trainer = create_trainer(
        tmp_path, max_epochs=1, enable_checkpointing=False, callbacks=[StageUnfreezing([0, 1, 2, 3])]
    )
    trainer.fit(module, DataLoader(create_batches(1), batch_size=None))
    assert first
    assert not any(p.requires_grad for p in first)
    assert torch.equal(module.detector.backbone.body.net.layer3[0].bn1.running_mean, before)
    assert module.detector.backbone.body.net.layer4[0].bn1.momentum == 0.1


class _Saver(Callback):
    """Saves a checkpoint after the first step."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if batch_idx == 0:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/half.ckpt")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")  # by this loader
def test_stage_unfreezing__a_training_that_goes_on_inside_of_an_epoch(tmp_path: Path) -> None:
    loader = DataLoader(create_batches(2), batch_size=None)
    create_trainer(tmp_path, max_steps=1, enable_checkpointing=False, callbacks=[_Saver()]).fit(create_module(), loader)
    module = create_module()
    again = create_trainer(tmp_path, max_epochs=1, enable_checkpointing=False, callbacks=[StageUnfreezing([1])])
    again.fit(module, loader, ckpt_path=tmp_path / "half.ckpt")
    assert again.global_step == 2
    assert not any(p.requires_grad for p in module.detector.backbone.body.net.parameters())
