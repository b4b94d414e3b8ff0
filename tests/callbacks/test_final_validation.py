from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_convnext_det.callbacks.best_checkpoint import BestCheckpoint
from lightning_convnext_det.modules.detection import Batch
from tests.training import create_module, create_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


class Steps(Callback):
    """Notes the steps after which a validation has ended."""

    def __init__(self) -> None:
        self.validated: list[int] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated.append(trainer.global_step)


ROWS = [
    ({"max_steps": 2}, [2]),  # below an epoch of three batches
    ({"max_steps": 4}, [3, 4]),  # its last part is one batch
    ({"max_steps": 6}, [3, 6]),  # nothing twice
    ({"max_steps": 4, "check_val_every_n_epoch": 5}, [4]),
    ({"max_steps": 4, "val_check_interval": 2}, [2, 4]),
    ({"max_steps": 5, "val_check_interval": 4, "check_val_every_n_epoch": None}, [4, 5]),
    ({"max_steps": 2, "accumulate_grad_batches": 2}, [2]),
    ({"max_epochs": 2}, [3, 6]),
    ({"max_epochs": 2, "check_val_every_n_epoch": 5}, [6]),
    ({"max_epochs": 2, "val_check_interval": 2}, [2, 5, 6]),
    ({"max_steps": 2, "limit_val_batches": 0}, []),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("options", "validated"), ROWS, ids=[str(row[0]) for row in ROWS])
def test_fit__validates_after_the_last_step(
    options: dict[str, object], validated: list[int], tmp_path: Path, loader: DataLoader[Batch]
) -> None:
    steps = Steps()
    monitor = "val/map" if validated else None
    best = BestCheckpoint(tmp_path, "best", monitor, mode="max", save_last=True, enable_version_counter=False)
    limits = {"max_epochs": -1, **options}
    trainer = create_trainer(tmp_path, callbacks=[steps, best], **limits)
    trainer.fit(create_module(score_threshold=0.0), loader, loader)

    assert steps.validated == validated
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}
    assert trainer.check_val_every_n_epoch == options.get("check_val_every_n_epoch", 1)
