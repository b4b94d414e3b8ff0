"""Datasets whose files are pipes and devices: what waits for nobody must neither hang nor fill the memory."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from lightning_convnext_det.data.check import check_dataset
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.io.files import read_text
from lightning_convnext_det.errors import DataError

SECONDS = 60
XML = "<annotation><size><width>40</width><height>30</height></size></annotation>"


@pytest.fixture(autouse=True)
def _hangs_are_killed() -> Iterator[None]:
    signal.alarm(SECONDS)  # an exception would be taken for one of the file's
    yield
    signal.alarm(0)


def write(root: Path) -> dict[str, Path]:
    """The files of three datasets by name."""
    image = {"id": 1, "file_name": "a.png", "width": 40, "height": 30}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
    texts = {
        "coco/annotations/instances_train.json": json.dumps(content),
        "yolo/data.yaml": "names: [cat]\ntrain: list.txt\n",
        "yolo/list.txt": "images/a.png\n",
        "yolo/labels/a.txt": "0 .5 .5 .2 .2\n",
        "voc/Annotations/a.xml": XML,
        "voc/ImageSets/Main/train.txt": "a\n",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    images = ["coco/train/a.png", "yolo/images/a.png", "voc/JPEGImages/a.png"]
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(root / name)
    return {name: root / name for name in (*texts, *images)}


NAMES = [
    "coco/annotations/instances_train.json", "coco/train/a.png", "yolo/data.yaml", "yolo/list.txt",
    "yolo/images/a.png", "yolo/labels/a.txt", "voc/Annotations/a.xml", "voc/ImageSets/Main/train.txt",
    "voc/JPEGImages/a.png",
]  # fmt: skip
KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_check_dataset__what_is_no_file(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path)[name]
    root = tmp_path / name.partition("/")[0]
    assert not [problem for problem in check_dataset(root).problems if problem.action == "refused"]
    path.unlink()
    KINDS[kind](path)
    try:
        report = check_dataset(root)
    except DataError as error:
        found = str(error).startswith("[LCD-")
    else:
        found = not report.clean or not sum(len(table.boxes) for table in report.tables.values())
    assert found


def test_read_image__pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"LCD-I003.*a.png.*is not a regular file"):
        read_image(tmp_path / "a.png")
    with pytest.raises(OSError, match="is not a regular file"):
        read_text(tmp_path / "a.png")


@pytest.mark.parametrize("relative", [False, True])
def test_check_dataset__a_list_outside_of_the_root_is_not_shown(tmp_path: Path, relative: bool) -> None:
    path = write(tmp_path)["yolo/data.yaml"]
    (tmp_path / "secret.txt").write_text("password\n")
    stated = "../secret.txt" if relative else tmp_path / "secret.txt"
    path.write_text(f"names: [cat]\ntrain: {stated}\n")
    (problem,) = (p for p in check_dataset(path.parent).problems if p.action == "refused")
    assert problem.code == "LCD-D122"
    assert "the list is not below" in str(problem)
    assert "password" not in str(problem)


@pytest.mark.parametrize(
    ("area", "name", "code"),
    [(1e300, "cat", "LCD-D002"), (10**11, "cat", "LCD-D002"), (81, "\ud800", "LCD-D008")],
    ids=["infinite in float32", "beyond COCO's ranges", "half a surrogate pair"],
)
def test_check_dataset__areas_and_names_that_would_be_lost_later(
    tmp_path: Path, area: float, name: str, code: str
) -> None:
    path = write(tmp_path)["coco/annotations/instances_train.json"]
    content = json.loads(path.read_text())
    content["annotations"][0]["area"] = area
    content["categories"][0]["name"] = name
    path.write_text(json.dumps(content))
    refused = [problem.code for problem in check_dataset(tmp_path / "coco").problems if problem.action == "refused"]
    assert code in refused
