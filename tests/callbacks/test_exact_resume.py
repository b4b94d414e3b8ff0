"""A training that is interrupted by SIGTERM and resumed gives the weights of one that is not."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch.utils.data import DataLoader

from lightning_convnext_det import DetectionDataModule
from lightning_convnext_det.callbacks.best_checkpoint import BestCheckpoint
from lightning_convnext_det.callbacks.exact_resume import seed_step
from lightning_convnext_det.data.repeat_factors import repeat_factors
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.modules import DeformableDETRModule, DetectionModule, DINOModule, FasterRCNNModule
from tests.training import TINY, create_batches, create_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]

DETR = {
    "backbone": "test_convnext", "min_size": 64, "max_size": 96, "hidden_dim": 32, "num_queries": 12, "num_heads": 2,
    "feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.1,
}  # fmt: skip
DETECTORS: dict[str, Callable[[int], DetectionModule]] = {
    "faster_rcnn": lambda n: FasterRCNNModule(n, **TINY, drop_path_rate=0.2),
    "deformable_detr": lambda n: DeformableDETRModule(n, **DETR),
    "dino": lambda n: DINOModule(n, **DETR, denoising_queries=6),  # which draws noise
}
# 10 images in batches of 4: 3 steps per epoch, 3 epochs
POINTS = {
    "after the first step": ("train", 0),
    "in the first epoch": ("train", 1),
    "in the last step of an epoch": ("train", 2),
    "in a validation": ("val", 3),
    "in the second epoch": ("train", 4),
    "before the last step": ("train", 7),
}


class Interruption(Callback):
    """Sends SIGTERM to this very process at a step, and notes what the training has seen."""

    def __init__(self, kind: str = "", step: int = -1) -> None:
        self.at: tuple[str, int] | None = (kind, step)
        self.seen: list[list[int]] = []
        self.figures: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append([target["image_id"] for target in batch[1]])
        self._strike("train", trainer.global_step)

    def on_validation_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._strike("val", trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        self.figures.append(float(trainer.callback_metrics["val/map"]))

    def _strike(self, kind: str, step: int) -> None:
        if self.at == (kind, step):
            self.at = None
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_coco(tmp_path_factory.mktemp("data"), 10, 3)


class Run:
    def __init__(
        self, detector: str, num_workers: int, data: Path, folder: Path, interruption: Interruption | None = None,
        resume: bool = False, ema: bool = False, accumulate: int = 1, repeat_threshold: float = 0.0,
    ) -> None:  # fmt: skip
        torch.manual_seed(0 if not resume else 99)  # a resumed run takes the seed of the first
        self.watch = interruption or Interruption()
        self.module = DETECTORS[detector](5)
        callbacks: list[Callback] = [self.watch]
        if ema:
            callbacks.append(EMAWeightAveraging(decay=0.8))
        best = BestCheckpoint(folder, "best", "val/map", mode="max", save_last=True, enable_version_counter=False)
        module = DetectionDataModule(
            str(data), batch_size=4, num_workers=num_workers, train_transforms="lsj", crop_size=64,
            repeat_threshold=repeat_threshold,
        )  # fmt: skip
        trainer = create_trainer(
            folder,
            max_epochs=3,
            callbacks=[*callbacks, best],
            num_sanity_val_steps=1,
            accumulate_grad_batches=accumulate,
        )
        self.status = 0
        try:
            trainer.fit(self.module, module, ckpt_path=str(folder / "last.ckpt") if resume else None)
        except SystemExit as error:
            self.status = int(str(error.code))


def check(tmp_path: Path, data: Path, detector: str, num_workers: int, point: str, **more: Any) -> None:
    whole = Run(detector, num_workers, data, tmp_path / "whole", **more)
    before = Run(detector, num_workers, data, tmp_path / "parts", Interruption(*POINTS[point]), **more)
    assert (whole.status, before.status) == (0, 143)
    after = Run(detector, num_workers, data, tmp_path / "parts", resume=True, **more)
    assert after.status == 0
    assert len(before.watch.seen) < len(whole.watch.seen)
    assert before.watch.seen + after.watch.seen == whole.watch.seen
    assert before.watch.figures + after.watch.figures == whole.watch.figures  # each epoch was measured, once
    weights = [run.module.state_dict() for run in (whole, after)]
    assert weights[0].keys() == weights[1].keys()
    assert [k for k in weights[0] if not torch.equal(weights[0][k], weights[1][k])] == []


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("detector", "point"),
    [("faster_rcnn", "in the second epoch"), ("deformable_detr", "in a validation"), ("dino", "in the first epoch")],
)
def test_resume__gives_the_same_weights(tmp_path: Path, data: Path, detector: str, point: str) -> None:
    check(tmp_path, data, detector, 0, point)


@pytest.mark.heavy
def test_resume__repeated_images_go_on(tmp_path: Path, data: Path) -> None:
    """Images with rare classes come several times, each time augmented by numbers of its own."""
    check(tmp_path, data, "faster_rcnn", 0, "in the second epoch", repeat_threshold=1.0)
    annotations = DetectionDataModule(str(data)).annotations("train")
    assert annotations is not None
    assert repeat_factors(annotations, 1.0).max() > 1.2


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("detector", DETECTORS)
def test_resume__gives_the_same_weights_everywhere(
    tmp_path: Path, data: Path, detector: str, num_workers: int, point: str
) -> None:
    check(tmp_path, data, detector, num_workers, point)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["in the first epoch", "in a validation"])
def test_resume__averaged_weights_go_on(tmp_path: Path, data: Path, point: str) -> None:
    check(tmp_path, data, "faster_rcnn", 0, point, ema=True)


@pytest.mark.slow
def test_resume__accumulated_batches_are_finished_first(tmp_path: Path, data: Path) -> None:
    whole = Run("faster_rcnn", 0, data, tmp_path / "whole", accumulate=2)
    before = Run("faster_rcnn", 0, data, tmp_path / "parts", Interruption("train", 0), accumulate=2)
    after = Run("faster_rcnn", 0, data, tmp_path / "parts", resume=True, accumulate=2)
    assert len(before.watch.seen) == 2
    assert before.watch.seen + after.watch.seen == whole.watch.seen
    for name, weight in whole.module.state_dict().items():
        assert torch.equal(weight, after.module.state_dict()[name]), name


def test_seed_step__each_step_and_process_draws_its_own_numbers() -> None:
    import random

    import numpy as np

    drawn = {}
    for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]:
        seed_step(*key)
        drawn[key] = (torch.rand(3).tolist(), random.random(), np.random.rand())  # noqa: NPY002
        seed_step(*key)
        assert drawn[key] == (torch.rand(3).tolist(), random.random(), np.random.rand())  # noqa: NPY002
    for kind in range(3):
        assert len({str(values[kind]) for values in drawn.values()}) == 5


def rates_of(module: FasterRCNNModule, folder: Path, epochs: int, checkpoint: Path | None = None) -> list[float]:
    """The learning rate of each step of a fit, which is saved as ``p.ckpt``."""
    seen: list[float] = []
    module.on_train_batch_start = lambda *_: seen.append(module.optimizers().param_groups[0]["lr"])  # type: ignore[method-assign, union-attr]
    trainer = create_trainer(folder, max_epochs=epochs, enable_checkpointing=False)
    trainer.fit(module, DataLoader(create_batches(3), batch_size=None), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "p.ckpt")
    return seen


class Plateau(FasterRCNNModule):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1, threshold=1e9)
        plan = {"scheduler": schedule, "monitor": "train/loss", "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": plan}


class OneCycle(FasterRCNNModule):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Multiplicative(FasterRCNNModule):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda _: 0.5)]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("kind", [Plateau, OneCycle, Multiplicative])
def test_resume__a_users_schedule_goes_on(tmp_path: Path, kind: type[FasterRCNNModule]) -> None:
    whole = rates_of(kind(2, **TINY), tmp_path, 4)
    assert len(set(whole)) > 2
    half = rates_of(kind(2, **TINY), tmp_path, 2)
    assert half + rates_of(kind(2, **TINY), tmp_path, 4, tmp_path / "p.ckpt") == pytest.approx(whole, rel=1e-12)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_resume__more_epochs_of_a_cosine_have_the_rates_of_the_longer_one(tmp_path: Path) -> None:
    options = {**TINY, "lr": 1e-4, "warmup_steps": 0}
    rates_of(FasterRCNNModule(2, **options), tmp_path, 2)
    found = rates_of(FasterRCNNModule(2, **options), tmp_path, 6, tmp_path / "p.ckpt")
    # a cosine over 6 epochs of 3 steps, from step 6 on
    assert found == pytest.approx([1e-4 * 0.5 * (1 + math.cos(math.pi * i / 18)) for i in range(6, 18)], rel=1e-6)
