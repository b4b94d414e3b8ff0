from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_convnext_det.data.image_folder import ImageFolderDataModule
from lightning_convnext_det.errors import DataError


def write(root: Path, names: tuple[str, ...] = ("a", "b"), count: int = 5) -> Path:
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 255, (30 + i, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def module(root: Path | None, **options: object) -> ImageFolderDataModule:
    return ImageFolderDataModule(
        str(root) if root else None, **{"image_size": 16, "batch_size": 4, "num_workers": 0, **options}
    )


def test_image_folder__splits_are_found(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("validation", 2), ("test", 3)):
        write(tmp_path / split, count=count)
    data = module(tmp_path)
    assert (data.class_names, data.num_classes, data.category_ids) == (["a", "b"], 2, [0, 1])
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    for loader, count in zip(loaders, (10, 4, 6), strict=True):
        batches = list(loader)
        assert sum(len(batch["images"]) for batch in batches) == count
        assert batches[0]["images"].shape == (4, 3, 16, 16)
        assert batches[0]["images"].dtype == torch.uint8
        for batch in batches:
            assert [Path(f).parent.name for f in batch["file_names"]] == ["ab"[k] for k in batch["labels"]]


def test_image_folder__a_part_is_held_out_by_seed(tmp_path: Path) -> None:
    write(tmp_path, count=10)
    held_out = []
    for seed in (0, 0, 1):
        data = module(tmp_path, val_fraction=0.2, seed=seed)
        train = {f for batch in data.train_dataloader() for f in batch["file_names"]}
        val = {f for batch in data.val_dataloader() for f in batch["file_names"]}
        assert (len(train), len(val), len(train & val)) == (16, 4, 0)
        assert {f for batch in data.test_dataloader() for f in batch["file_names"]} == val
        held_out.append(val)
    assert held_out[0] == held_out[1] != held_out[2]


def test_image_folder__same_seed_same_pixels_with_and_without_workers(tmp_path: Path) -> None:
    write(tmp_path / "train")
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4}
    first, second = (
        list(module(tmp_path, val_fraction=0.0, num_workers=n, **options).train_dataloader()) for n in (0, 2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["images"], other["images"])
        assert one["file_names"] == other["file_names"]


def test_image_folder__evaluation_cuts_as_timm_does(tmp_path: Path) -> None:
    from timm.data import create_transform

    write(tmp_path / "val", count=1)
    batch = next(iter(module(tmp_path, image_size=24).val_dataloader()))
    transform = create_transform(24, interpolation="bicubic", crop_pct=0.875, mean=(0, 0, 0), std=(1, 1, 1))
    expected = transform(Image.open(tmp_path / "val" / "a" / "0.png"))
    torch.testing.assert_close(batch["images"][0] / 255, expected)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("none", "data.root is not given"),
        ("absent", "there is no such folder"),
        ("one class", "fewer than two class folders: a"),
        ("empty class", "b holds no images"),
        ("other class", "c is not a class of the training images"),
    ],
)
def test_image_folder__what_is_wrong_is_said(case: str, message: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    if case == "one class":
        write(root / "train", ("a",))
    elif case == "empty class":
        write(root / "train", ("a",))
        (root / "train" / "b").mkdir()
    elif case == "other class":
        write(root / "train")
        write(root / "val", ("a", "c"))
    data = module(None if case == "none" else root)
    with pytest.raises(DataError, match=message):
        data.num_classes, data.train_dataloader(), data.val_dataloader()


def test_image_folder__validation_images_of_one_class(tmp_path: Path) -> None:
    write(tmp_path / "train", ("a", "b"))
    write(tmp_path / "val", ("b",))
    assert module(tmp_path)._split("val")[1] == [1] * len(module(tmp_path)._split("val")[0])
    alone = ImageFolderDataModule(val=str(tmp_path / "val"))
    assert alone.class_names == ["b"]
