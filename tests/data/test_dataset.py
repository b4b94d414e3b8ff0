import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_convnext_det.data.batch import UnreadableImage, collate, pack, unpack
from lightning_convnext_det.data.dataset import DetectionDataset, ImageDataset
from lightning_convnext_det.data.formats.discovery import find_splits, read_split
from lightning_convnext_det.data.io.inputs import find_images
from lightning_convnext_det.data.transforms import create_transforms
from lightning_convnext_det.errors import DataError
from tests.data.builders import Box, TinyImage, make_annotations

IMAGES = [
    TinyImage(20, 30, (Box((1, 2, 11, 12), 1), Box((5, 5, 25, 15), 0, crowd=True, area=77.0))),
    TinyImage(30, 20),
    TinyImage(24, 24, (Box((0, 0, 24, 24)),)),
]


def test_getitem__training_leaves_crowd_boxes_out(tmp_path: Path) -> None:
    image, target = DetectionDataset(make_annotations(tmp_path, IMAGES), training=True)[0]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 20, 30)
    assert target["boxes"].tolist() == [[1.0, 2.0, 11.0, 12.0]]
    assert target["labels"].tolist() == [1]
    assert target["image_id"] == 100
    assert target["file_name"] == str(tmp_path / "00.png")
    assert "iscrowd" not in target


def test_getitem__evaluation_keeps_crowd_and_area(tmp_path: Path) -> None:
    _, target = DetectionDataset(make_annotations(tmp_path, IMAGES), training=False)[0]
    assert target["labels"].tolist() == [1, 0]
    assert target["iscrowd"].tolist() == [False, True]
    assert target["area"].tolist() == [100.0, 77.0]
    assert {key: value.dtype for key, value in target.items() if isinstance(value, torch.Tensor)} == {
        "boxes": torch.float32,
        "labels": torch.int64,
        "iscrowd": torch.bool,
        "area": torch.float32,
    }


def test_getitem__image_without_boxes(tmp_path: Path) -> None:
    for training in (True, False):
        _, target = DetectionDataset(make_annotations(tmp_path, IMAGES), training=training)[1]
        assert target["boxes"].shape == (0, 4)
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].dtype == torch.int64


def test_getitem__the_table_cannot_be_changed_through_a_sample(tmp_path: Path) -> None:
    dataset = DetectionDataset(make_annotations(tmp_path, IMAGES), training=True)
    dataset[2][1]["boxes"].zero_()
    assert dataset[2][1]["boxes"].tolist() == [[0.0, 0.0, 24.0, 24.0]]


def test_getitem__key_decides_the_transform_and_the_global_generator_is_left(tmp_path: Path) -> None:
    table = make_annotations(tmp_path, IMAGES)
    dataset = DetectionDataset(table, create_transforms("lsj", crop_size=32), training=True, seed=5)
    before = torch.random.get_rng_state()
    first = dataset[(3, 0)]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    again = dataset[(3, 0)]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1]["boxes"], again[1]["boxes"])
    other_seed = DetectionDataset(table, create_transforms("lsj", crop_size=32), training=True, seed=6)
    assert not torch.equal(first[0], dataset[(4, 0)][0])
    assert not torch.equal(first[0], other_seed[(3, 0)][0])
    assert torch.equal(dataset[0][0], dataset[(0, 0)][0])


def test_getitem__list_of_keys(tmp_path: Path) -> None:
    dataset = DetectionDataset(make_annotations(tmp_path, IMAGES), training=True)
    images, targets = collate(dataset[[(0, 2), (0, 0)]])
    assert [image.shape[-2:] for image in images] == [(24, 24), (20, 30)]
    assert [target["image_id"] for target in targets] == [102, 100]


def test_getitem__damaged_image_is_named_with_its_id(tmp_path: Path) -> None:
    dataset = DetectionDataset(make_annotations(tmp_path, IMAGES), training=True)
    content = (tmp_path / "02.png").read_bytes()
    (tmp_path / "02.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"02\.png.*\(image id 102, epoch 4\)$") as caught:
        dataset[(4, 2)]
    assert "\n" not in str(caught.value)


def test_getitem__size_differs_from_the_annotation(tmp_path: Path) -> None:
    dataset = DetectionDataset(make_annotations(tmp_path, IMAGES), training=True)
    Image.new("RGB", (24, 25)).save(tmp_path / "02.png")
    with pytest.raises(DataError, match=r"LCD-I020.*02\.png is 24x25, but its boxes refer to 24x24 \(image id 102"):
        dataset[2]


def test_pickle__is_small(tmp_path: Path) -> None:
    count = 2000
    images = [TinyImage(20, 30, (Box((1, 2, 11, 12)),) * 7)] * count
    dataset = DetectionDataset(
        make_annotations(tmp_path, images, write=False), create_transforms("multiscale"), training=True
    )
    content = pickle.dumps(dataset)
    assert len(content) / count < 400  # bytes per image with 7 boxes; 118,000 images stay below 50 MB
    assert np.array_equal(pickle.loads(content).annotations.boxes, dataset.annotations.boxes)


def test_image_dataset__numbers_images_from_one(tmp_path: Path) -> None:
    make_annotations(tmp_path, IMAGES)
    image, target = ImageDataset([tmp_path / "02.png", tmp_path / "00.png"])[1]
    assert image.shape == (3, 20, 30)
    assert target["image_id"] == 2
    assert target["file_name"] == str(tmp_path / "00.png")
    assert target["boxes"].shape == (0, 4)


def test_image_dataset__says_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    dataset = ImageDataset([tmp_path / "empty.jpg", tmp_path / "missing.jpg"])
    for index, name in enumerate(["empty.jpg", "missing.jpg"]):
        sample = dataset[index]
        assert isinstance(sample, UnreadableImage)
        assert sample.file_name == str(tmp_path / name)
        assert name in sample.reason


def test_find_images__each_once_in_the_order_given(tmp_path: Path) -> None:
    make_annotations(tmp_path, IMAGES)
    (tmp_path / "below").mkdir()
    for name in ("notes.txt", "below/a.JPG", "odd.dat"):
        (tmp_path / name).touch()
    odd = tmp_path / "odd.dat"
    names = [str(path.relative_to(tmp_path)) for path in find_images([odd, tmp_path, tmp_path / "01.png"])]
    assert names == ["odd.dat", "00.png", "01.png", "02.png"]
    names = [str(path.relative_to(tmp_path)) for path in find_images([tmp_path / "**" / "*"])]
    assert names == ["00.png", "01.png", "02.png", "below/a.JPG"]


@pytest.mark.parametrize(("name", "message"), [("", "holds no images itself"), ("a.jpg", "is not there")])
def test_find_images__none(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_images([tmp_path / name])


def test_find_images__files_passed_over_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_annotations(tmp_path, IMAGES)
    for name in ("a.cr2", "b.CR2", "c.psd", "notes.txt", "labels.json", ".hidden.cr2"):
        (tmp_path / name).write_bytes(b"")
    for source in (tmp_path, tmp_path / "*"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert [file.name for file in find_images([source])] == ["00.png", "01.png", "02.png"]
        (message,) = [record.getMessage() for record in caplog.records]
        assert "LCD-P003" in message
        assert "3 files are skipped" in message
        assert all(str(tmp_path / name) in message for name in ("a.cr2", "b.CR2", "c.psd"))


def test_find_images__heic_needs_pillow_heif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_convnext_det.data.io.inputs.is_image_name", lambda name: name.endswith(".png"))
    (tmp_path / "b.HEIC").write_bytes(b"")
    with pytest.raises(DataError, match=r"only .*b\.HEIC \(for HEIC and HEIF: pip install pillow-heif\)"):
        find_images([tmp_path])


def test_find_images__only_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.cr2").write_bytes(b"")
    with pytest.raises(DataError, match=r"LCD-P001.*holds no image that can be read, only .*a\.cr2"):
        find_images([tmp_path])


def test_dataset__vocs_difficult_objects_are_no_crowd_regions(tmp_path: Path) -> None:
    """They go to evaluation as ``difficult``, also through the loader's packed batches."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg")
    boxes = "".join(
        f"<object><name>cat</name><difficult>{d}</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>{x}</xmax>"
        "<ymax>30</ymax></bndbox></object>"
        for d, x in ((0, 20), (1, 40))
    )
    size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
    (tmp_path / "a.xml").write_text(f"<annotation><filename>a.jpg</filename>{size}{boxes}</annotation>")
    annotations = read_split(next(iter(find_splits(tmp_path).values())))
    sample = DetectionDataset(annotations, training=False)[0]
    for target in (sample[1], unpack(pack([sample]))[1][0]):
        assert target["difficult"].tolist() == [False, True]
        assert "iscrowd" not in target
    assert len(DetectionDataset(annotations, training=True)[0][1]["boxes"]) == 1
