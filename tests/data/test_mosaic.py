from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from lightning_convnext_det.data.batch import Batch, Sample
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.mosaic import create_mosaic
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import ArgumentError

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def _one_colour(value: int, height: int, width: int, boxes: list[list[float]]) -> Sample:
    target = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.full((len(boxes),), value)}
    return torch.full((3, height, width), value, dtype=torch.uint8), {**target, "image_id": value}  # type: ignore[misc]


def test_create_mosaic__has_a_part_of_each_image_that_meet_in_one_point() -> None:
    torch.manual_seed(0)
    samples = [_one_colour(i + 1, 20 + 10 * i, 50 - 5 * i, []) for i in range(4)]
    image, target = create_mosaic(samples)
    assert image.shape == (3, 20, 50)
    assert target["image_id"] == 1
    assert target["boxes"].shape == (0, 4)
    ys, xs = int((image[0, :, 0] == 1).sum()), int((image[0, 0] == 1).sum())
    expected = torch.empty(20, 50, dtype=torch.uint8)
    expected[:ys, :xs], expected[:ys, xs:], expected[ys:, :xs], expected[ys:, xs:] = 1, 2, 3, 4
    torch.testing.assert_close(image, expected.expand(3, -1, -1))
    assert 0.3 * 20 <= ys <= 0.7 * 20
    assert 0.3 * 50 <= xs <= 0.7 * 50


@pytest.mark.parametrize("seed", range(20))
def test_create_mosaic__boxes_stay_on_their_objects(seed: int) -> None:
    """A white rectangle on black is its own ground truth: each box is around white pixels, and all have a box."""
    torch.manual_seed(seed)
    samples = []
    for i in range(4):
        image, target = _one_colour(0, 64, 96, [[30.0, 20.0, 60.0, 50.0]])
        image[:, 20:50, 30:60] = 255
        target["labels"] = torch.tensor([i])
        samples.append((image, target))
    mosaic, joined = create_mosaic(samples)
    bright = mosaic[0] > 127
    for box, is_ignored in zip(joined["boxes"].tolist(), joined["iscrowd"].tolist(), strict=True):
        x1, y1, x2, y2 = (round(side) for side in box)
        assert is_ignored or bright[y1:y2, x1:x2].float().mean() > 0.9  # an ignored one may have less than a pixel
        bright[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] = False
    assert bright.sum() == 0
    assert len(joined["labels"]) == len(joined["boxes"]) == len(joined["iscrowd"])


def test_create_mosaic__ignores_objects_that_are_hardly_visible() -> None:
    shares = []
    for seed in range(60):
        torch.manual_seed(seed)
        samples = [_one_colour(i, 64, 64, [[22.0, 22.0, 42.0, 42.0]]) for i in range(4)]  # 20 pixels, scaled by 0.7 on
        _, joined = create_mosaic(samples)
        areas = (joined["boxes"][:, 2:] - joined["boxes"][:, :2]).prod(1)
        shares += zip((areas / 20**2).tolist(), joined["iscrowd"].tolist(), strict=True)
    # by a scale from 0.6 to 1.2, so that areas below 0.4 x 0.6^2 are always ignored and those above 0.4 x 1.2^2 never
    assert all(crowd for share, crowd in shares if share < 0.4 * 0.6**2)
    assert not any(crowd for share, crowd in shares if share > 0.4 * 1.2**2)
    assert {crowd for _, crowd in shares} == {True, False}


class _Counts(Callback):
    """Remembers for each epoch whether its images are mosaics: those have the boxes of several images."""

    def __init__(self) -> None:
        self.epochs: dict[int, set[int]] = {}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, out: object, batch: Batch, i: int) -> None:
        colours = {len(image.unique()) for image in batch[0]}
        self.epochs.setdefault(trainer.current_epoch, set()).update(colours)


class _Idle(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return self.weight

    def validation_step(self, batch: Batch, index: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 11, "max_epochs": -1}], ids=str)
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.heavy)])
def test_datamodule__closes_mosaics_before_the_end(tmp_path: Path, length: dict[str, int], workers: int) -> None:
    root = write_synthetic_coco(tmp_path / "data", 4, 1)
    for number, file in enumerate(sorted((root / "train").iterdir())):  # images of one colour each
        with Image.open(file) as image:
            Image.new("RGB", image.size, (60 * number,) * 3).save(file)
    data = DetectionDataModule(str(root), batch_size=1, num_workers=workers, train_transforms="mosaic", seed=0)
    counts = _Counts()
    trainer = Trainer(
        **length, accelerator="cpu", callbacks=[counts], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(_Idle(), datamodule=data)
    assert sorted(counts.epochs) == [0, 1, 2]
    assert all(max(counts.epochs[epoch]) > 1 for epoch in (0, 1))
    assert counts.epochs[2] == {1}


def test_datamodule__refuses_mosaics_of_foreign_datasets() -> None:
    with pytest.raises(ArgumentError, match="mosaic joins images of a folder"):
        DetectionDataModule(datasets={"train": []}, train_transforms="mosaic")  # type: ignore[dict-item]


def test_create_mosaic__crowd_regions_of_the_parts_stay_such() -> None:
    torch.manual_seed(0)
    samples = [_one_colour(i, 40, 60, [[0.0, 0.0, 60.0, 40.0]]) for i in range(4)]  # visible in each part
    samples[2][1]["iscrowd"] = torch.tensor([True])
    _, before = create_mosaic(samples[:2] * 2)
    torch.manual_seed(0)
    _, joined = create_mosaic(samples)
    assert joined["iscrowd"][joined["labels"] == 2].tolist() == [True]
    assert before["boxes"].shape == joined["boxes"].shape == (4, 4)
