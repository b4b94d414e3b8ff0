import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_convnext_det.callbacks.best_checkpoint import BestCheckpoint
from lightning_convnext_det.modules.detection import Batch
from tests.training import create_batches, create_module, create_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


class Scored(BoringModel):
    """Logs the scores given, one per epoch; its weight says in which epoch it was saved."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores
        self.register_buffer("epoch", torch.zeros(1))

    def on_validation_epoch_start(self) -> None:
        self.epoch.fill_(self.current_epoch)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("val/map", self.scores[self.current_epoch])


def fit(
    folder: Path, scores: list[float], epochs: int, checkpoint: Path | None = None, **options: Any
) -> BestCheckpoint:
    defaults = {"mode": "max", "save_last": True, "auto_insert_metric_name": False, "enable_version_counter": False}
    best = BestCheckpoint(folder, "best", "val/map", **{**defaults, **options})
    trainer = create_trainer(
        folder, max_epochs=epochs, callbacks=[best], limit_train_batches=1, limit_val_batches=1, num_sanity_val_steps=0
    )
    trainer.fit(Scored(scores), ckpt_path=checkpoint)
    return best


def epoch_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["state_dict"]["epoch"])


def test_best_checkpoint__last_is_the_last_epoch_and_best_the_best(tmp_path: Path) -> None:
    best = fit(tmp_path, [0.1, 0.5, 0.3, 0.2], 4)
    assert (epoch_of(tmp_path / "best.ckpt"), epoch_of(tmp_path / "last.ckpt")) == (1, 3)
    assert float(best.best_model_score) == pytest.approx(0.5)
    assert {p.name for p in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}


def test_best_checkpoint__undefined_is_never_the_best(tmp_path: Path) -> None:
    best = fit(tmp_path / "a", [math.nan, math.nan], 2)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["last.ckpt"]
    assert best.best_model_path == ""
    best = fit(tmp_path / "b", [math.nan, 0.0, math.nan], 3)
    assert (epoch_of(tmp_path / "b" / "best.ckpt"), epoch_of(tmp_path / "b" / "last.ckpt")) == (1, 2)
    assert float(best.best_model_score) == 0.0


@pytest.mark.parametrize("same_folder", [True, False])
def test_best_checkpoint__a_resumed_training_keeps_the_best(tmp_path: Path, same_folder: bool) -> None:
    scores = [0.2, 0.7, 0.4, 0.6, 0.9]
    first = tmp_path / "first"
    second = first if same_folder else tmp_path / "second"
    fit(first, scores, 3)
    best = fit(second, scores, 4, first / "last.ckpt")  # 0.6 is not better than the earlier 0.7
    assert (epoch_of(second / "best.ckpt"), epoch_of(second / "last.ckpt")) == (1, 3)
    assert float(best.best_model_score) == pytest.approx(0.7)
    assert best.best_model_path == str(second / "best.ckpt")
    assert (first / "best.ckpt").is_file()
    best = fit(second, scores, 5, second / "last.ckpt")
    assert epoch_of(second / "best.ckpt") == 4
    assert {p.name for p in second.iterdir()} == {"best.ckpt", "last.ckpt"}


def test_best_checkpoint__several_are_taken_along_and_the_worst_replaced(tmp_path: Path) -> None:
    scores = [0.2, 0.7, 0.4, 0.6]

    def run(folder: Path, epochs: int, checkpoint: Path | None = None) -> BestCheckpoint:
        best = BestCheckpoint(folder, "{epoch}", "val/map", mode="max", save_last=True, save_top_k=2)
        trainer = create_trainer(
            folder, max_epochs=epochs, callbacks=[best], limit_train_batches=1, limit_val_batches=1
        )
        trainer.fit(Scored(scores), ckpt_path=checkpoint)
        return best

    run(tmp_path / "a", 3)
    best = run(tmp_path / "b", 4, tmp_path / "a" / "last.ckpt")
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"epoch=1.ckpt", "epoch=3.ckpt", "last.ckpt"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"}
    assert Path(best.best_model_path).name == "epoch=1.ckpt"


def test_best_checkpoint__an_earlier_best_that_is_gone_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path / "a", [0.9, 0.1, 0.2], 2)
    (tmp_path / "a" / "best.ckpt").unlink()
    best = fit(tmp_path / "b", [0.9, 0.1, 0.2], 3, tmp_path / "a" / "last.ckpt")
    assert "best.ckpt is gone" in caplog.text
    assert float(best.best_model_score) == pytest.approx(0.2)


def test_best_checkpoint__a_figure_that_nothing_logs_is_refused_before_training(tmp_path: Path) -> None:
    loader: DataLoader[Batch] = DataLoader(create_batches(1), batch_size=None)
    for monitor, hint in (("val/mAP", r"did you mean 'val/map'\?"), ("loss", r"logged are val/map, .* and train/")):
        trainer: pl.Trainer = create_trainer(tmp_path, callbacks=[BestCheckpoint(tmp_path, monitor=monitor)])
        with pytest.raises(ValueError, match=rf"LCD-C020.*nothing logs '{monitor}'.*{hint}"):
            trainer.fit(create_module(), loader, loader)
