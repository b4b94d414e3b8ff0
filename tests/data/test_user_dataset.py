"""A user's own map-style datasets and transforms in the data module."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.user_dataset import UserDataset
from lightning_convnext_det.errors import ArgumentError, DataError
from tests.data.recorder import Recorder, SaveAndStop, make_trainer
from tests.training import TINY, create_module, create_trainer


class Shapes(Dataset):
    """In the form of torchvision's tutorial; each image is 40 high and 30 + index wide, with noise of its own."""

    classes = ("cat", "dog")

    def __init__(self, count: int = 7, noise: bool = False) -> None:
        self.count = count
        self.noise = noise

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not 0 <= index < self.count:
            raise IndexError
        image = torch.full((3, 40, 30 + index), 0.5)
        if self.noise:  # of all generators that augmentations draw from
            image[0, 0, 0], image[0, 0, 1], image[0, 0, 2] = torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002
        return image, {
            "boxes": torch.tensor([[2, 3, 20, 30], [1, 1, 9, 9]]),
            "labels": torch.tensor([1, 0]),
            "masks": torch.zeros(2, 40, 30 + index, dtype=torch.uint8),
            "image_id": torch.tensor([100 + index]),
            "area": torch.tensor([486.0, 50.0]),
            "iscrowd": torch.tensor([0, 1]),
        }


def data_module(**options: object) -> DetectionDataModule:
    defaults = {"datasets": {"train": Shapes(), "val": Shapes(3)}, "batch_size": 2, "num_workers": 0}
    return DetectionDataModule(**{**defaults, "train_transforms": "none", **options})


def test_getitem__evaluation_keeps_what_it_needs() -> None:
    image, target = UserDataset(Shapes(), name="val", training=False)[3]
    assert image.shape == (3, 40, 33)
    assert target["boxes"].tolist() == [[2.0, 3.0, 20.0, 30.0], [1.0, 1.0, 9.0, 9.0]]
    assert target["iscrowd"].tolist() == [False, True]
    assert target["area"].tolist() == [486.0, 50.0]
    assert (target["image_id"], target["file_name"]) == (103, "val[3]")
    assert "masks" not in target


def test_getitem__training_leaves_crowd_boxes_out() -> None:
    _, target = UserDataset(Shapes(), name="train", training=True)[3]
    assert target.keys() == {"boxes", "labels", "image_id", "file_name"}
    assert (target["boxes"].tolist(), target["labels"].tolist()) == ([[2.0, 3.0, 20.0, 30.0]], [1])


def test_getitem__pillow_images_formats_of_boxes_and_missing_entries() -> None:
    boxes = tv_tensors.BoundingBoxes([[2, 3, 18, 27]], format="XYWH", canvas_size=(40, 30))
    samples = [
        (Image.new("RGB", (30, 40), (255, 0, 0)), {"boxes": boxes, "labels": [0]}),
        (torch.zeros(3, 40, 30), {"boxes": torch.tensor([]), "labels": torch.tensor([])}),
    ]
    dataset = UserDataset(samples, name="val", training=False)
    image, target = dataset[0]
    assert (image.dtype, image[:, 0, 0].tolist()) == (torch.uint8, [255, 0, 0])
    assert target["boxes"].tolist() == [[2.0, 3.0, 20.0, 30.0]]
    assert type(target["boxes"]) is Tensor
    empty = dataset[1][1]
    assert (empty["boxes"].shape, empty["labels"].dtype, empty["image_id"]) == ((0, 4), torch.int64, 1)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(3, 4, 4), r"train\[0\] is a Tensor; expected \(image, target\)"),
        ((torch.zeros(4, 4), {}), r"the image of train\[0\] is \[4, 4\]"),
        ((np.zeros((4, 4, 3)), {}), "is a ndarray; expected a tensor"),
        ((torch.zeros(3, 4, 4), {"boxes": torch.zeros(1, 4)}), r"the target of train\[0\] has no labels"),
        ((torch.zeros(3, 4, 4), {"boxes": torch.zeros(2, 4), "labels": torch.tensor([1])}), "2 boxes but 1 labels"),
        ((torch.zeros(3, 4, 4), {"boxes": torch.zeros(1, 4), "labels": torch.ones(1)}), "labels .* torch.float32"),
    ],
)
def test_getitem__what_is_wrong_is_named(sample: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        UserDataset([sample], name="train", training=True)[0]


def test_getitem__random_numbers_depend_on_seed_epoch_and_index() -> None:
    dataset = UserDataset(Shapes(noise=True), name="train", training=True, seed=5)
    before = torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002
    first = dataset[(1, 2)][0][0, 0, :3]
    assert len(set(first.tolist())) == 3
    assert torch.equal(dataset[(1, 2)][0][0, 0, :3], first)
    for other in (dataset[(2, 2)], UserDataset(Shapes(noise=True), name="train", training=True, seed=6)[(1, 2)]):
        assert (other[0][0, 0, :3] != first).all()
    after = torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002
    assert all(one != other for one, other in zip(before, after, strict=True))  # the generators have gone on


def test_datamodule__classes_from_the_dataset_or_an_argument() -> None:
    data = data_module()
    assert (data.class_names, data.category_ids, data.num_classes) == (["cat", "dog"], [0, 1], 2)
    assert data_module(class_names=["a", "b"]).class_names == ["a", "b"]
    nameless = [Shapes()[0]]
    with pytest.raises(DataError, match=r"LCD-D161.*give data\.class_names"):
        data_module(datasets={"train": nameless}).class_names  # noqa: B018


def test_datamodule__each_image_once_and_resumes_with_the_next(tmp_path: Path) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    make_trainer(tmp_path).fit(whole, datamodule=data_module())
    assert sorted(i for batch in whole.seen["train0"] for i in batch) == list(range(100, 107))
    assert whole.seen["val0"] == [[100, 101], [102]]
    assert whole.seen["train0"] != whole.seen["train1"]
    stop = SaveAndStop(tmp_path / "a.ckpt", 3)
    make_trainer(tmp_path, callbacks=[stop], limit_val_batches=0).fit(first, datamodule=data_module())
    options = {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True}
    make_trainer(tmp_path).fit(second, datamodule=data_module(num_workers=1), **options)
    assert first.seen["train0"] + second.seen["train0"] == whole.seen["train0"]
    assert second.seen["train1"] == whole.seen["train1"]


def test_datamodule__fit_validate_test_and_predict_a_detector(tmp_path: Path) -> None:
    data = data_module(predict_split="val", train_transforms=v2.RandomHorizontalFlip(1.0))
    module, trainer = create_module(2), create_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    assert module.class_names == ["cat", "dog"]
    assert "val/map" in trainer.validate(module, datamodule=data, verbose=False)[0]
    assert "test/map" in trainer.test(module, datamodule=data, verbose=False)[0]  # of the validation images
    assert [len(batch) for batch in trainer.predict(module, datamodule=data)] == [2, 1]


def test_datamodule__transforms_change_training_images_alone() -> None:
    data = data_module(train_transforms=v2.RandomHorizontalFlip(1.0), seed=0)
    _, targets = next(iter(data.train_dataloader()))
    width = 30 + targets[0]["image_id"] - 100
    assert targets[0]["boxes"].tolist() == [[width - 20.0, 3.0, width - 2.0, 30.0]]
    _, targets = next(iter(data.val_dataloader()))
    assert targets[0]["boxes"][0].tolist() == [2.0, 3.0, 20.0, 30.0]


def test_datamodule__without_validation(tmp_path: Path) -> None:
    data = data_module(datasets={"train": Shapes()})
    assert not data.validates
    assert data.val_dataloader() == []
    with pytest.raises(DataError, match="LCD-D131"):
        data.setup("validate")


def test_landscape__by_torchvisions_method() -> None:
    class Sized(Shapes):
        def get_height_and_width(self, index: int) -> tuple[int, int]:
            return 40, 37 + index

    assert UserDataset(Sized(), name="train", training=True).landscape.tolist() == [False] * 3 + [True] * 4
    assert UserDataset(Shapes(), name="train", training=True).landscape.all()


def mirrored(image: tv_tensors.Image, target: dict) -> tuple[tv_tensors.Image, dict]:
    return v2.functional.horizontal_flip(image), {**target, "boxes": v2.functional.horizontal_flip(target["boxes"])}


def test_command__own_dataset_and_transform_by_class_path(tmp_path: Path) -> None:
    shapes = {"class_path": f"{__name__}.Shapes", "init_args": {"count": 3}}
    small = [f"--model.{name}={json.dumps(value).strip(chr(34))}" for name, value in TINY.items()]
    data = [
        "--data.datasets",
        json.dumps({"train": shapes, "val": shapes}),
        f"--data.train_transforms={__name__}.mirrored",
    ]
    quiet = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    folder = [f"--trainer.default_root_dir={tmp_path}", "--data.num_workers=0"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, about the size of the run
        assert main(["fit", *small, *data, *quiet, *folder]) == 0


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"datasets": {"training": Shapes()}}, ArgumentError, "datasets has 'training'; its keys are train, val, test"),
        ({"datasets": {}}, DataError, r"data\.datasets has no 'train'"),
        ({"datasets": {"train": Shapes(0)}}, DataError, "'train' is empty"),
        ({"datasets": {"train": Endless()}}, ArgumentError, "needs an index and a length"),
        ({"root": "somewhere"}, ArgumentError, "root and datasets are both given"),
        ({"class_names": ["a", "a"]}, ArgumentError, "'a' for labels 0 and 1"),
        ({"train_transforms": "flipp"}, ArgumentError, "did you mean 'flip'"),
        ({"train_transforms": v2.Identity(), "vertical_flip": True}, ArgumentError, "belong to presets"),
        ({"predict": "a.jpg", "predict_split": "val"}, ArgumentError, "predict and predict_split are both given"),
        ({"value_range": (5, 5)}, ArgumentError, "give the lower value first"),
    ],
)
def test_datamodule__refuses(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        data_module(**options).setup("fit")
