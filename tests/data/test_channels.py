"""Grey, RGBA and 16-bit images from file to box."""

import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

from lightning_convnext_det.callbacks.prediction_writer import PredictionWriter
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.io.reader import find_value_range
from lightning_convnext_det.errors import DataError
from lightning_convnext_det.inference.predictor import Predictor
from lightning_convnext_det.modules.registry import load_module, save_module, start_module
from tests.training import create_module, create_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader. does not have many workers")


def write_grey16(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint16)).save(path)
    return path


def write_coco(root: Path, images: list[np.ndarray]) -> Path:
    """A COCO dataset with a split train and a split val, one box in each image; 2-dimensional arrays are 16-bit."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        content = {"images": [], "annotations": [], "categories": [{"id": 5, "name": "cell"}]}
        for i, pixels in enumerate(images, 1):
            image = Image.fromarray(pixels)
            image.save(root / split / f"{i}.png")
            size = {"height": image.height, "width": image.width}
            content["images"].append({"id": i, "file_name": f"{i}.png", **size})
            box = {"bbox": [4, 4, 24, 24], "area": 576, "iscrowd": 0}
            content["annotations"].append({"id": i, "image_id": i, "category_id": 5, **box})
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "CMYK"])
def test_read_image__channels_as_pillow_converts(mode: str, channels: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 4), np.uint8)
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(pixels, "RGBA").convert(mode).save(file)
    with Image.open(file) as image:
        step = image.convert("RGBA") if mode in ("P", "PA") else image
        expected = np.asarray(step.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])).reshape(9, 12, channels)
    found = read_image(file, channels=channels)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_read_image__twelve_bits_by_their_range(channels: int, tmp_path: Path) -> None:
    values = np.arange(4096).reshape(64, 64)
    found = read_image(write_grey16(tmp_path / "a.png", values), channels=channels, value_range=(0, 4095))
    assert found.shape == (channels, 64, 64)
    expected = np.round(values * (255 / 4095))  # none lies at half
    for channel in found[:3]:
        assert np.array_equal(channel.numpy(), expected)
    assert len(found[0].unique()) == 256  # 17 by 1/257
    if channels == 4:
        assert (found[3] == 255).all()


def test_read_image__values_outside_of_the_range(tmp_path: Path) -> None:
    file = write_grey16(tmp_path / "a.png", np.array([[0, 100], [200, 5000]]))
    assert read_image(file, channels=1, value_range=(100, 200)).tolist() == [[[0, 0], [255, 255]]]
    with pytest.raises(DataError, match=r"LCD-I027.*a\.png.*from 0 to 5000 exceed the range \[0, 4095\].*value_range"):
        read_image(file, value_range=(0, 4095), clip=False)


@pytest.mark.parametrize(
    ("peak", "high"),
    [(0, 255), (255, 255), (256, 1023), (1023, 1023), (4095, 4095), (4096, 16383), (16384, 65535), (65535, 65535)],
)
def test_find_value_range__smallest_usual_depth(peak: int, high: int, tmp_path: Path) -> None:
    files = [write_grey16(tmp_path / f"{i}.png", np.full((4, 4), peak >> i)) for i in range(3)]
    assert find_value_range(files) == ((0, high), peak)


def test_find_value_range__none_for_8_bits_and_unreadable_files(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    assert find_value_range([tmp_path / "a.png", tmp_path / "b.png"]) is None
    assert find_value_range([]) is None


def test_data_module__range_of_the_dataset_is_said_once_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    root = write_coco(tmp_path / "a", [ramp, ramp // 8])
    data = DetectionDataModule(str(root), num_workers=0, train_transforms="none", in_chans=1)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
        train, val = data.train_dataloader(), data.val_dataloader()
    assert caplog.text.count("16-bit grey images with values up to 4095: [0, 4095] becomes 0 to 255") == 1
    for loader in (train, val):
        brightest = sorted(int(image.max()) for images, _ in loader for image in images)
        assert brightest == [32, 255]  # 511 / 4095 of 255; a range for each image would give 255 twice
    dark = DetectionDataModule(predict=str(root / "val" / "2.png"), num_workers=0)
    dark.load_state_dict(data.state_dict())  # as Lightning does from a checkpoint
    assert int(next(iter(dark.predict_dataloader()))[0][0].max()) == 32
    given = DetectionDataModule(str(root), num_workers=0, value_range=(0, 511))
    assert sorted(int(i.max()) for images, _ in given.val_dataloader() for i in images) == [255, 255]
    assert DetectionDataModule(str(root)).state_dict() == {}


class Brightest(Callback):
    """Notes the brightest value of each image that is predicted or trained on."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.values += [int(image.max()) for image in batch[0]]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.values += [int(image.max()) for image in batch[0]]


@pytest.mark.heavy
def test_checkpoint__holds_the_range_of_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    root = write_coco(tmp_path / "a", [ramp, ramp])
    dark = write_coco(tmp_path / "b", [ramp // 8, ramp // 8])
    options = {"num_workers": 0, "train_transforms": "none"}

    def trainer() -> tuple[pl.Trainer, list[int]]:
        notes = Brightest()
        return create_trainer(tmp_path, enable_checkpointing=False, callbacks=[notes]), notes.values

    module = create_module(1, in_chans=1)
    fitting, _ = trainer()
    fitting.fit(module, datamodule=DetectionDataModule(str(root), **options))
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_module(tmp_path / "a.ckpt")
    started = start_module(tmp_path / "a.ckpt", 1)
    assert module.grey_range == loaded.grey_range == started.grey_range == (0, 4095, False)
    for one in (module, loaded):  # 511 of 4095; the range of these images alone would give 255
        predicting, values = trainer()
        predicting.predict(one, datamodule=DetectionDataModule(predict=str(dark / "val"), **options))
        assert set(values) == {32}
    continuing, values = trainer()
    continuing.fit(started, datamodule=DetectionDataModule(str(dark), **options))
    assert set(values) == {32}
    caplog.set_level(logging.INFO)
    predicting, values = trainer()
    given = DetectionDataModule(predict=str(dark / "val"), value_range=(0, 511), **options)
    predicting.predict(loaded, datamodule=given)
    assert set(values) == {255}
    assert "data.value_range [0, 511] replaces the model's [0, 4095]" in caplog.text


def test_predictor__range_of_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (64, 72), dtype=np.uint16)
    file = write_grey16(tmp_path / "a.png", values)
    module = create_module(1, in_chans=1, score_threshold=0.0)
    module.grey_range = (0, 4095, False)
    save_module(module, tmp_path / "a.ckpt")
    predictor = Predictor.from_checkpoint(tmp_path / "a.ckpt", device="cpu")
    scaled = torch.from_numpy((values.astype(np.int64) * 255 + 2047) // 4095).to(torch.uint8)[None]
    with Image.open(file) as image:
        for source in (file, image, scaled):
            assert torch.equal(predictor(source).scores, predictor(scaled).scores)
    drawn = predictor.draw(file, score_threshold=1.0)
    assert drawn.tobytes() == predictor.draw(scaled, score_threshold=1.0).tobytes()
    Predictor.from_checkpoint(tmp_path / "a.ckpt", value_range=(0, 511))
    assert "value_range (0, 511) replaces the checkpoint's (0, 4095)" in caplog.text
    with pytest.raises(DataError, match=r"LCD-I032.*shape \[3, 64, 72\]; the detector takes 1 channels: \[1, height"):
        predictor(torch.zeros(3, 64, 72, dtype=torch.uint8))
    with pytest.raises(DataError, match="LCD-I027"):
        predictor(write_grey16(tmp_path / "b.png", values * 8))


@pytest.mark.parametrize("in_chans", [1, 4])
def test_trainer__channels_from_file_to_box(in_chans: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 56, 4), np.uint8)
    root = write_coco(tmp_path / "data", [noise[..., 0] if in_chans == 1 else noise] * 2)
    data = DetectionDataModule(str(root), batch_size=2, num_workers=0, predict=str(root / "val"))
    statistics = {"image_mean": [0.5] * in_chans, "image_std": [0.25] * in_chans}
    module = create_module(1, in_chans=in_chans, **statistics)
    writer = PredictionWriter(tmp_path / "out", score_threshold=0.0)
    trainer = create_trainer(tmp_path, enable_checkpointing=False, callbacks=[writer])
    trainer.fit(module, datamodule=data)
    assert next(iter(data.train_dataloader()))[0][0].shape[0] == in_chans
    assert "val/map" in trainer.callback_metrics
    trainer.predict(module, datamodule=data)
    assert (tmp_path / "out" / "predictions.json").exists()
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_data_module__channels_that_files_do_not_have(tmp_path: Path) -> None:
    root = write_coco(tmp_path, [np.zeros((32, 32), np.uint8)])
    trainer = create_trainer(tmp_path, enable_checkpointing=False)
    with pytest.raises(ValueError, match="the model takes 2 channels; images have 1, 3 or 4"):
        trainer.fit(create_module(1, in_chans=2), datamodule=DetectionDataModule(str(root), num_workers=0))
