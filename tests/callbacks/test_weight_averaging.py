from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_convnext_det.callbacks.weight_averaging import EMAWithWarmup, decay_of

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


class Line(pl.LightningModule):
    """Its weight is the number of steps so far, and so is its counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.register_buffer("count", torch.tensor(0))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count += 1
        return -self.layer.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_ema_with_warmup__equals_a_loop(tmp_path: Path) -> None:
    module = Line()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, callbacks=[EMAWithWarmup(decay=0.5)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.zeros(20, 1)))
    expected = 1.0  # the first update copies
    for update in range(1, 40):
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * (update + 1)
    assert module.layer.weight.item() == pytest.approx(expected, rel=1e-5)
    assert int(module.count) == 40  # a counter is no average


def test_decay_of__leaves_little_of_the_first_weights_in_a_short_training() -> None:
    kept_before = kept_now = 1.0
    for update in range(1, 336):
        kept_before *= 0.999
        kept_now *= decay_of(0.999, update)
    assert kept_before == pytest.approx(0.715, abs=0.001)
    assert kept_now < 1e-9
    assert decay_of(0.999, 10**6) == 0.999
