from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import Logger
from PIL import Image
from torch.utils.data import DataLoader

from lightning_convnext_det.callbacks.validation_images import ValidationImages, draw_validation, log_image
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.modules.detection import Batch
from tests.training import create_batches, create_module, create_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


class Recorder:
    """Stands for a logger or its experiment; ``methods`` are those that it has."""

    def __init__(self, *methods: str, **attributes: object) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for name in methods:
            setattr(self, name, lambda *a, _name=name, **k: self.calls.append((_name, a, k)))
        for name, value in attributes.items():
            setattr(self, name, value)


def test_log_image__calls_what_a_logger_has() -> None:
    image = Image.new("RGB", (4, 2))
    wandb = Recorder("log_image")
    assert log_image(wandb, "val/images", image, 7)
    assert wandb.calls == [("log_image", (), {"key": "val/images", "images": [image], "step": 7})]
    board = Recorder("add_image")
    assert log_image(Recorder(experiment=board), "val/images", image, 7)
    name, (key, array, step), options = board.calls[0]
    assert (name, key, array.shape, step, options) == ("add_image", "val/images", (2, 4, 3), 7, {"dataformats": "HWC"})
    mlflow = Recorder("log_image")
    assert log_image(Recorder(experiment=mlflow, run_id="r"), "val/images", image, 7)
    assert mlflow.calls == [("log_image", ("r", image), {"key": "val_images", "step": 7})]
    comet = Recorder("log_image")
    assert log_image(Recorder(experiment=comet), "val/images", image, 7)
    assert comet.calls == [("log_image", (image,), {"name": "val/images", "step": 7})]
    assert not log_image(Recorder(experiment=Recorder()), "val/images", image, 7)


def test_draw_validation__leaves_out_what_is_below_the_threshold_of_its_class() -> None:
    image = torch.full((3, 300, 300), 128, dtype=torch.uint8)
    target: Any = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "file_name": "a/b.png"}
    found: Any = {
        "boxes": torch.tensor([[20.0, 20, 100, 100], [150, 150, 280, 280]]),
        "labels": torch.tensor([0, 1]),
        "scores": torch.tensor([0.6, 0.6]),
    }
    none, second, both = (
        torch.from_numpy(_pixels(draw_validation([(image, target, found)], ["cat", "dog"], thresholds)))
        for thresholds in ([0.7, 0.7], [0.7, 0.5], [0.5, 0.5])
    )
    assert bool((none != second).any())
    assert int((both != second).any(2).sum()) > 100
    middle = none.shape[1] // 2
    assert torch.equal(none[:, : middle - 8], both[:, : middle - 8])  # the half with the annotations


def _pixels(sheet: Image.Image) -> Any:
    import numpy as np

    return np.array(sheet)


@pytest.mark.heavy
def test_fit__draws_images_spread_over_the_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []

    def draw(taken: Any, names: list[str], thresholds: list[float]) -> Image.Image:
        drawn.append([target["file_name"] for _, target, _ in taken])
        return draw_validation(taken, names, thresholds)

    monkeypatch.setattr("lightning_convnext_det.callbacks.validation_images.draw_validation", draw)
    loader = DataLoader[Batch](create_batches(6), batch_size=None)
    logger = _ImageLogger(tmp_path)
    options: dict[str, Any] = {
        "callbacks": [ValidationImages(3)],
        "logger": logger,
        "max_epochs": 2,
        "log_every_n_steps": 1,
    }
    trainer = create_trainer(tmp_path, **options, num_sanity_val_steps=2)
    trainer.fit(create_module(score_threshold=0.0), loader, loader)
    assert drawn == [["0_0.png", "2_0.png", "4_0.png"]] * 2
    assert logger.steps == [6, 12]
    assert (tmp_path / "validation_images.jpg").stat().st_size < 150_000


class _ImageLogger(Logger):
    name = "images"
    version = 0

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.steps = folder, list[int]()

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        return str(self.folder)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log nothing."""

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Log nothing."""

    def log_image(self, key: str, images: list[Image.Image], step: int) -> None:
        self.steps.append(step)


def test_validation_images__refuses_no_images() -> None:
    with pytest.raises(ArgumentError, match="num_images is 0"):
        ValidationImages(0)
