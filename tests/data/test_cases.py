# ruff: noqa: E501 - one case, one line
"""Datasets as annotation tools and exporters write them: each is read with the right boxes, or named with the remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask

from lightning_convnext_det.data.check import check_dataset

WIDTH, HEIGHT = 96, 80
Files = dict[str, str]
BOX = [10.0, 10.0, 40.0, 30.0]
LINE = "0 0.25 0.5 0.25 0.5"  # of 96 x 80: 12, 20, 36, 60
LINE_BOX = [12.0, 20.0, 36.0, 60.0]


class Case(NamedTuple):
    name: str
    files: Files
    """Text by path; images are noise of 96 x 80."""
    codes: str
    """``CODE action`` of each kind of problem."""
    box: list[float] | None
    """The first box of the first split, and of every image; None if nothing is read."""
    images: int = 2


def coco(change: Callable[[dict[str, object]], object] = lambda content: None, **annotation: object) -> str:
    """Two images a.jpg and b.jpg with a box each; ``...`` drops a key of the annotations."""
    images = [
        {"id": i, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT} for i, name in ((1, "a"), (2, "b"))
    ]
    base = {"category_id": 1, "bbox": [10, 10, 30, 20], "area": 600, "iscrowd": 0}
    rows = [{"id": i, "image_id": i, **base, **annotation} for i in (1, 2)]
    content: dict[str, object] = {
        "images": images,
        "annotations": [{key: value for key, value in row.items() if value is not ...} for row in rows],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    change(content)
    return json.dumps(content)


def named(*names: str, key: str = "file_name") -> Callable[[dict[str, object]], object]:
    """Changes the names of the images."""

    def change(content: dict[str, object]) -> None:
        content["images"] = [{"id": i, key: name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(names, 1)]

    return change


def standard(text: str) -> Files:
    return {"annotations/instances_train.json": text, "train/a.jpg": "", "train/b.jpg": ""}


def categories(*members: dict[str, object]) -> Callable[[dict[str, object]], object]:
    return lambda content: content.update(categories=list(members))


def voc(box: tuple[object, ...] = (11, 11, 40, 30), name: str = "cat", more: str = "") -> str:
    corners = "".join(
        f"<{tag}>{v}</{tag}>" for tag, v in zip(("xmin", "ymin", "xmax", "ymax"), box or [0] * 4, strict=True)
    )
    shape = f"<bndbox>{corners}</bndbox>" if box else ""
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    return f"<annotation>{size}<object><name>{name}</name>{more}{shape}</object></annotation>"


CVAT_IMAGE = (
    '<image id="0" name="{}" width="96" height="80"><box label="cat" xtl="10" ytl="10" xbr="40" ybr="30"/></image>'
)
RLE = mask.encode(np.asfortranarray(np.pad(np.ones((20, 30), np.uint8), ((10, 50), (10, 56)))))
RUNS = [10 * HEIGHT + 10, *[20, 60] * 29, 20, 56 * HEIGHT - 20 - 10 + 0]

COCO = [
    Case("area null", standard(coco(area=None, iscrowd=None)), "D116 noted, D150 noted", BOX),
    Case("floats as ids", standard(coco(image_id=1.0, category_id="1.0")), "D107 dropped", None),
    Case("box of text", standard(coco(bbox=["10.0", "10", "30", "2e1"], area="600")), "D150 noted", BOX),
    Case("true as crowd", standard(coco(iscrowd=False)), "D150 noted", BOX),
    Case("score null", standard(coco(score=None, ignore=None)), "", BOX),
    Case("ids of text", standard(coco(id="x-1")), "", BOX),
    Case("no ids", standard(coco(id=...)), "", BOX),
    Case("polygon", standard(coco(bbox=..., segmentation=[[10, 10, 40, 12, 20, 30], [12, 11, 13, 11, 13, 12]])), "D150 noted", BOX),
    Case("compressed mask", standard(coco(bbox=None, segmentation={"size": [HEIGHT, WIDTH], "counts": RLE["counts"].decode()})), "D150 noted", BOX),
    Case("runs", standard(coco(bbox=[], segmentation={"size": [HEIGHT, WIDTH], "counts": RUNS[:-1]})), "D150 noted", BOX),
    Case("empty box", standard(coco(bbox=[], keypoints=[10, 10, 2])), "D101 dropped, D109 noted", None),
    Case("damaged mask", standard(coco(bbox=None, segmentation={"size": [HEIGHT, WIDTH], "counts": "\x00"})), "D002 refused", None),
    Case("other folder", standard(coco(named("x/y/a.jpg", "x/y/b.jpg"))), "D153 noted", BOX),
    Case("backslashes", standard(coco(named("train\\a.jpg", "train\\b.jpg"))), "D153 noted", BOX),
    Case("Windows path", standard(coco(named("C:\\x\\a.jpg", "C:\\x\\b.jpg"))), "D153 noted", BOX),
    Case("Label Studio", standard(coco(named("/data/local-files/?d=x/a.jpg", "../../b.jpg"))), "D153 noted", BOX),
    Case("addresses", standard(coco(named("http://h/t/a.jpg?x=1", "s3://h/b.jpg", key="coco_url"))), "D153 noted", BOX),
    Case("one base name", standard(coco(named("x/a.jpg", "y/a.jpg"))), "I003 refused", None),
    Case("file twice", standard(coco(named("a.jpg", "./a.jpg"))), "D127 noted", BOX),
    Case("percent signs", {"annotations/instances_train.json": coco(named("a%20%C3%A9.jpg", "b.jpg")), "train/a e\u0301.jpg": "", "train/b.jpg": ""}, "D153 noted", BOX),
    Case("root category", standard(coco(categories({"id": 0, "name": "cat", "supercategory": "none"}, {"id": 1, "name": "cat"}))), "D152 noted", BOX),
    Case("name twice", standard(coco(categories({"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}))), "D008 refused", None),
    Case("fewer classes", standard(coco()) | {"annotations/instances_val.json": coco(categories({"id": 1, "name": "cat"})), "val/a.jpg": "", "val/b.jpg": ""}, "D120 noted, D125 noted", BOX),
    Case("FiftyOne per split", {f"{s}/labels.json": coco() for s in ("train", "val")} | {f"{s}/data/{n}.jpg": "" for s in ("train", "val") for n in "ab"}, "D125 noted", BOX),
    Case("annotations.json", {"train/annotations.json": coco(), "train/images/a.jpg": "", "train/images/b.jpg": ""}, "", BOX),
    Case("train.json", {"train.json": coco(), "train/images/a.jpg": "", "train/images/b.jpg": ""}, "", BOX),
    Case("LVIS", {"annotations/lvis_v1_train.json": coco(named("http://h/train2017/a.jpg", "http://h/train2017/b.jpg", key="coco_url")), "train2017/a.jpg": "", "train2017/b.jpg": ""}, "D153 noted", BOX),
    Case("key points", {"annotations/person_keypoints_val2017.json": coco(), "val2017/a.jpg": "", "val2017/b.jpg": ""}, "", BOX),
]  # fmt: skip
VOC = [
    Case("macOS", {"Annotations/._a.xml": "\0\5", "JPEGImages/._a.jpg": "\0\5", "Annotations/a.xml": voc(), "JPEGImages/a.jpg": ""}, "", BOX, 1),
    Case("difficult in words", {"a.xml": voc(more="<difficult>False</difficult>"), "a.jpg": ""}, "", BOX, 1),
    Case("polygon", {"a.xml": voc((), more="<polygon><pt><x>11</x><y>11</y></pt><pt><x>40</x><y>30</y></pt></polygon>"), "a.jpg": ""}, "D123 noted", BOX, 1),
    Case("rotated", {"a.xml": voc((), more="<robndbox><cx>4</cx></robndbox>"), "a.jpg": ""}, "D005 refused", None, 1),
    Case("from 0", {"a.xml": voc((0, 0, 96, 80)), "b.xml": voc((0, 0, 96, 80)), "a.jpg": "", "b.jpg": ""}, "D154 noted", [0, 0, 96, 80]),
    Case("one at 0", {"a.xml": voc((0, 0, 96, 80)), "b.xml": voc((1, 1, 96, 80)), "a.jpg": "", "b.jpg": ""}, "D105 clipped", [0, 0, 96, 80]),
    Case("subfolders", {"Annotations/x/a.xml": voc(), "Annotations/y/a.xml": voc(), "JPEGImages/x/a.jpg": "", "JPEGImages/y/a.jpg": "", "ImageSets/Main/default.txt": "x/a\ny/a.jpg\n"}, "D125 noted", BOX),
    Case("case of names", {"a.xml": voc(name="Big Cat"), "b.xml": voc(name="bigcat"), "a.jpg": "", "b.jpg": ""}, "D159 noted", BOX),
    Case("CVAT", {"annotations.xml": f"<annotations>{CVAT_IMAGE.format('x/a.jpg')}{CVAT_IMAGE.format('b.jpg')}</annotations>", "images/x/a.jpg": "", "images/b.jpg": ""}, "", BOX),
    Case("CVAT video", {"annotations.xml": "<annotations><track/></annotations>", "a.jpg": ""}, "D005 refused", None, 0),
]  # fmt: skip
YOLO = [
    Case("key points", {"data.yaml": "train: images\nnames: [a]\nkpt_shape: [1, 3]", "images/a.jpg": "", "labels/a.txt": LINE + " 0.2 0.4 2"}, "D123 noted", LINE_BOX, 1),
    Case("key points, other number", {"data.yaml": "train: images\nnames: [a]\nkpt_shape: [2, 2]", "images/a.jpg": "", "labels/a.txt": LINE + " 0.2 0.4"}, "D006 refused", None, 1),
    Case("perhaps key points", {"classes.txt": "a", "images/a.jpg": "", "labels/a.txt": LINE + " 0.2 0.4 0.3 0.6"}, "D156 refused", [19.2, 32.0, 28.8, 48.0], 1),
    Case("outlines", {"classes.txt": "a", "images/a.jpg": "", "labels/a.txt": "0 0.125 0.25 0.375 0.25 0.375 0.75"}, "D123 noted", LINE_BOX, 1),
    Case("oriented corners", {"classes.txt": "a", "images/a.jpg": "", "labels/a.txt": "0 0.125 0.25 0.375 0.25 0.375 0.75 0.125 0.75"}, "D123 noted", LINE_BOX, 1),
    Case("labels without image", {"classes.txt": "a", "images/a.jpg": "", "images/b.cr2": "", "labels/a.txt": LINE, "labels/b.txt": LINE, "labels/c.txt": LINE}, "D157 dropped", LINE_BOX, 1),
    Case("two images, one label", {"classes.txt": "a", "images/a.jpg": "", "images/a.png": "", "labels/a.txt": LINE}, "D158 noted", LINE_BOX),
    Case("upper case", {"classes.txt": "a", "Images/train/a.jpg": "", "Labels/train/a.txt": LINE}, "", LINE_BOX, 1),
    Case("JPEGImages", {"classes.txt": "a", "JPEGImages/a.jpg": "", "labels/a.txt": LINE}, "", LINE_BOX, 1),
    Case("names file", {"aerial.names": "a", "a.jpg": "", "a.txt": LINE}, "", LINE_BOX, 1),
    Case("quoted keys", {"data.yaml": "train: images\nnames: {'0': a, '1': b}", "images/a.jpg": "", "labels/a.txt": LINE}, "", LINE_BOX, 1),
    Case("Windows", {"data.yaml": "path: C:\\x\ntrain: images\\train\nnames: [a]", "images/train/a.jpg": "", "labels/train/a.txt": LINE}, "", LINE_BOX, 1),
    Case("other machine", {"data.yaml": "train: /content/x/train/images\nval: /content/x/valid/images\nnames: [a]", "train/images/a.jpg": "", "train/labels/a.txt": LINE}, "D122 noted", LINE_BOX, 1),
    Case("a split of the folder above", {"data.yaml": "train: images/train\ntest: ../test/images\nnames: [a]", "images/train/a.jpg": "", "labels/train/a.txt": LINE}, "D122 noted", LINE_BOX, 1),
    Case("flat labels", {"data.yaml": "train: train/images\nnames: [a]", "train/images/x/y/a.jpg": "", "train/labels/a.txt": LINE}, "", LINE_BOX, 1),
    Case("flat labels of two", {"data.yaml": "train: train/images\nnames: [a]", "train/images/x/a.jpg": "", "train/images/y/a.jpg": "", "train/labels/a.txt": LINE}, "D125 noted, D158 refused", LINE_BOX),
    Case("YAML elsewhere", {"x/p.yaml": "path: ../set\ntrain: images\nnames: [a]", "set/images/a.jpg": "", "set/labels/a.txt": LINE}, "", LINE_BOX, 1),
    Case("CVAT YOLO 1.1", {"obj.data": "classes = 1\ntrain = data/train.txt\nnames = data/obj.names", "obj.names": "a", "train.txt": "data/obj_train_data/x/a.jpg", "obj_train_data/x/a.jpg": "", "obj_train_data/x/a.txt": LINE}, "", LINE_BOX, 1),
    Case("macOS", {"classes.txt": "a", "images/a.jpg": "", "images/._a.jpg": "x", "labels/a.txt": LINE, "labels/._a.txt": "x"}, "", LINE_BOX, 1),
]  # fmt: skip


def write(root: Path, files: Files) -> None:
    for number, (name, text) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".png") and not text:
            seed = 0 if name.endswith("a.jpg") else number
            pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
            Image.fromarray(pixels).save(path)
        else:
            path.write_text(text)


@pytest.mark.parametrize("case", [*COCO, *VOC, *YOLO], ids=lambda case: case.name.replace(" ", "_"))
def test_check_dataset__case(tmp_path: Path, case: Case) -> None:
    write(tmp_path, case.files)
    report = check_dataset(tmp_path)
    assert sorted({f"{one.code[4:]} {one.action}" for one in report.problems} - {"D109 noted", "L004 refused"}) == [
        code for code in case.codes.split(", ") if code not in ("", "D109 noted")
    ]
    if case.box is not None:
        table = next(iter(report.tables.values()))
        assert len(table) == case.images
        np.testing.assert_allclose(table.boxes[0], case.box, atol=1e-4)


def test_check_dataset__gbk(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": ""})
    (tmp_path / "a.xml").write_bytes(f'<?xml version="1.0" encoding="GBK"?>{voc(name="猫")}'.encode("gbk"))
    report = check_dataset(tmp_path)
    assert report.problems == ()
    assert report.tables["train"].class_names == ("猫",)


@pytest.mark.parametrize("exif", ["auto", "upright"])
def test_check_dataset__boxes_of_the_upright_image_with_the_stored_size(tmp_path: Path, exif: str) -> None:
    """Label Studio writes such for phone photos."""
    write(tmp_path, standard(coco(bbox=[10, 60, 40, 30])))
    tag = Image.Exif()
    tag[0x0112] = 6
    for name in ("a", "b"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "train" / f"{name}.jpg", exif=tag)
    table = check_dataset(tmp_path, exif=exif).tables["train"]  # type: ignore[arg-type]
    assert table.upright.tolist() == [True, True]
    assert table.sizes.tolist() == [[WIDTH, HEIGHT]] * 2
    assert table.boxes.tolist() == [[10, 60, 50, 90]] * 2
