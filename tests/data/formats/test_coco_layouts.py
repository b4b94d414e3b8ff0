import json
import os
from pathlib import Path

import pytest

from lightning_convnext_det.data.formats.coco import read_coco
from lightning_convnext_det.data.formats.coco_layout import find_coco
from lightning_convnext_det.data.formats.discovery import find_splits, make_split, read_split
from tests.data.reading import WriteCoco, WriteImage


def names_of(root: Path) -> dict[str, tuple[str, str]]:
    return {
        key: (os.path.relpath(split.annotations[0], root), os.path.relpath(read_coco(split).image_root, root))
        for key, split in find_coco(root).items()
    }


LAYOUTS = [
    (
        "coco",
        {"annotations/instances_train2017.json": "train2017", "annotations/instances_val2017.json": "val2017"},
        ["train", "val"],
    ),
    (
        "images_folder",
        {"annotations/train.json": "images/train", "annotations/valid.json": "images/valid"},
        ["train", "val"],
    ),
    (
        "one_image_folder",
        {"annotations/instances_train.json": "images", "annotations/instances_test.json": "images"},
        ["train", "test"],
    ),
    ("roboflow", {"train/_annotations.coco.json": "train", "valid/_annotations.coco.json": "valid"}, ["train", "val"]),
    ("beside", {"labels.json": "."}, ["train"]),
    ("beside_roboflow", {"_annotations.coco.json": "."}, ["train"]),
    (
        "two_years",
        {"annotations/instances_val2014.json": "val2014", "annotations/instances_val2017.json": "val2017"},
        ["val2014", "val2017"],
    ),
]


@pytest.mark.parametrize(("files", "keys"), [row[1:] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
def test_find_coco__layouts(tmp_path: Path, write_image: WriteImage, files: dict[str, str], keys: list[str]) -> None:
    for number, (file, folder) in enumerate(files.items()):
        write_image(tmp_path / folder / f"{number}.png")
        image = {"id": 1, "file_name": f"{number}.png", "height": 48, "width": 64}
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
        (tmp_path / file).write_text(json.dumps(content))
    assert names_of(tmp_path) == dict(zip(keys, files.items(), strict=True))
    assert list(find_splits(tmp_path)) == keys


def test_find_coco__other_annotations_of_the_same_images(write_coco: WriteCoco) -> None:
    path = write_coco()
    (path.parent / "captions_train.json").write_text('{"images": [], "annotations": []}')

    assert [split.annotations for split in find_coco(path.parents[1]).values()] == [(path,)]


def test_find_coco__long_list_of_categories_before_the_images(tmp_path: Path) -> None:
    categories = [{"id": i, "name": f"class {i}"} for i in range(3000)]
    (tmp_path / "train.json").write_text(json.dumps({"categories": categories, "images": [], "annotations": []}))

    assert list(find_coco(tmp_path)) == ["train"]


def test_find_coco__other_json_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "list.json").write_text('[{"images": []}]')
    (tmp_path / "notes.json").write_text('{"categories": [{"id": 0, "name": "cat"}], "info": {"year": 2024}}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")

    assert find_coco(tmp_path) == {}


def test_make_split__file_and_folder(write_coco: WriteCoco, tmp_path: Path) -> None:
    path = write_coco(num_images=2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "train").rename(tmp_path / "elsewhere" / "photos")
    moved = path.rename(tmp_path / "boxes.json")

    assert len(read_split(make_split(moved, tmp_path / "elsewhere" / "photos"))) == 2
