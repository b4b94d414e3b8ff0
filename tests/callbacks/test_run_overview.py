"""What a training says of itself, and the report at its end."""

import re
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_convnext_det.callbacks import pace
from lightning_convnext_det.callbacks.run_overview import RunOverview, duration
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.modules.detection import Batch
from tests.cli.test_main import SMALL
from tests.training import create_batches, create_module, create_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def test_duration__by_hand() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3599.4, 86400)] == ["0 s", "1 min 0 s", "59 min 59 s", "24 h 0 min"]


_NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}


class Clock(Callback):
    """A clock that a step moves by 7 seconds, a batch of a validation by 2 and the start of the fit by 5."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.now += 5

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        self.now += 7

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        self.now += 2


def _log(module: pl.LightningModule, batch: object, batch_idx: int) -> object:
    module.log_dict({"train/loss": 0.5, "train/loss_boxes_aux0": 0.1}, batch_size=1)
    return sum(p.sum() for p in module.parameters() if p.requires_grad) * 0.0


@pytest.fixture
def overview(monkeypatch: pytest.MonkeyPatch) -> tuple[RunOverview, Clock]:
    clock = Clock()
    monkeypatch.setattr(pace, "monotonic", clock.monotonic)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    module = "lightning_convnext_det.modules.detection.DetectionModule"
    monkeypatch.setattr(f"{module}.training_step", _log)
    monkeypatch.setattr(f"{module}.detect", lambda self, images: [_NOTHING for _ in images])
    return RunOverview(), clock


@pytest.mark.heavy
def test_run_overview__forecast_by_hand(
    overview: tuple[RunOverview, Clock], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches = DataLoader[Batch](create_batches(12), batch_size=None)
    validation = DataLoader[Batch](create_batches(3), batch_size=None)
    trainer = create_trainer(tmp_path, max_epochs=3, callbacks=list(overview), num_sanity_val_steps=2)
    with caplog.at_level("INFO"):
        trainer.fit(create_module(), batches, validation)
    # the start and a batch of the sanity check come first; the clock's callback is called after the overview
    steps, validations, start = 36 * 7, 3 * 3 * 2, 5 + 2 * 2
    assert overview[1].now - 100 == steps + validations + start
    assert overview[0].forecast == steps + validations + start
    lines = [line for line in caplog.messages if line.startswith(("forecast", "trained in"))]
    assert lines == [
        "forecast: 7.00 s a step, 3 validations of 6 s, 3 min 20 s to go, 4 min 39 s in all",
        "forecast: 7.00 s a step, 2 validations of 6 s, 3 min 0 s to go, 4 min 39 s in all",
        "trained in 4 min 39 s; forecast: 4 min 39 s",
    ]


@pytest.mark.heavy
def test_run_overview__a_line_a_minute_without_a_terminal(
    overview: tuple[RunOverview, Clock], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches = DataLoader[Batch](create_batches(12), batch_size=None)
    trainer = create_trainer(tmp_path, max_epochs=2, callbacks=list(overview))
    with caplog.at_level("INFO"):
        trainer.fit(create_module(), batches, DataLoader[Batch](create_batches(1), batch_size=None))
    lines = [line for line in caplog.messages if "train/loss" in line]
    # 24 steps of 7 seconds and a validation of 2 in between: 63 seconds are 9 steps, 126 are 18 less the validation
    assert lines[0] == "epoch 0, step 9 of 24, 1 min 45 s to go: train/loss 0.500"
    assert re.fullmatch(r"epoch 1, step 18 of 24, 44 s to go: train/loss 0.500, val/map [\d.]+", lines[1])
    assert len(lines) == 2


def test_run_overview__says_nothing_more_in_a_terminal(
    overview: tuple[RunOverview, Clock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    trainer = create_trainer(tmp_path, callbacks=list(overview), accumulate_grad_batches=2, limit_val_batches=0)
    with caplog.at_level("INFO"):
        trainer.fit(create_module(), *(DataLoader[Batch](create_batches(n), batch_size=None) for n in (24, 1)))
    assert not [line for line in caplog.messages if "train/loss" in line]
    # a step is two batches; the rest of 12 steps is two
    assert "forecast: 14.00 s a step, 28 s to go, 2 min 53 s in all" in caplog.messages


@pytest.mark.heavy
def test_fit__shows_itself_and_reports(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_synthetic_coco(tmp_path / "shapes", num_train=24, num_val=4)
    places = [f"--data.root={root}", f"--trainer.default_root_dir={tmp_path}", "--data.batch_size=2"]
    with caplog.at_level("INFO"):
        assert main(["fit", *places, "--trainer.max_epochs=1", "--report=true", *SMALL]) == 0
    said = caplog.text
    assert re.search(r"data: 24 training images, \d+ objects of 5 classes", said)
    assert "backbone test_convnext, " in said
    assert re.search(r"steps: 12; learning rate [\d.e-]+ at the start, [\d.e-]+ at its peak", said)
    assert re.search(r"forecast: [\d.]+ s a step, 1 validations of \d+ s, \d+ s to go, \d+ s in all", said)
    folder = tmp_path / "version_0"
    for name in ("training_images.jpg", "validation_images.jpg", "learning_curves.png"):
        with Image.open(folder / name) as sheet:
            assert sheet.width > 900, name
    assert re.search(r"val/map +[\d.]+ +[\d.]+\n", said)
    assert re.search(r"learning curves +\S*version_0/learning_curves.png\n", said)
    page = (folder / "report.html").read_text()
    assert '<section id="training">' in page  # the curves of metrics.csv
    assert (folder / "report.json").is_file()
    events = EventAccumulator(str(folder)).Reload()
    assert events.Tags()["images"] == ["val/images"]
    assert [event.step for event in events.Images("val/images")] == [12]
