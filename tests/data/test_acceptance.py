# ruff: noqa: E501 - one row, one line
"""Inputs that a reader of datasets must accept, mend aloud, or refuse: one row each, numbered as in the promises.

An outcome is the set of codes that a full check of the dataset reports, each with what becomes of the record, or the
code of the error that ends it. Rows 28 and 29, classes that differ from a checkpoint's or stand in another order, are in
``tests/modules/test_detection.py``; that 2000 objects (row 18) also train is in ``tests/models/test_bounded_memory.py``.
"""

import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from lightning_convnext_det.data.check import check_dataset
from lightning_convnext_det.data.formats.discovery import find_splits, read_split
from lightning_convnext_det.errors import DataError
from tests.data.conftest import coco_annotation, noise

Content = dict[str, list[dict[str, object]]]
WriteXml = Callable[..., Path]
LITERAL = "a number to be replaced"  # json.dumps writes no 1e400 and no integer of 5000 digits


class Folder:
    """A dataset of two images of 48 x 64 and 200 boxes that have nothing wrong with them, to be spoilt."""

    def __init__(self, root: Path, write_xml: WriteXml) -> None:
        self.root, self.write_xml = root, write_xml
        self.options: dict[str, object] = {}
        self.file = root / "annotations" / "instances_train.json"
        self.image = root / "train" / "1.png"
        self.image.parent.mkdir()
        self.file.parent.mkdir()
        for number in (1, 2):
            noise(48, 64, number).save(root / "train" / f"{number}.png")
        boxes = [[1 + i % 20, 1 + i // 20, 5 + i % 3, 6] for i in range(200)]
        self.content: Content = {
            "images": [{"id": i, "file_name": f"{i}.png", "height": 48, "width": 64} for i in (1, 2)],
            "annotations": [coco_annotation(box, i, image_id=1 + i % 2) for i, box in enumerate(boxes, 1)],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }
        self.write()

    def write(self, literal: str = "") -> None:
        self.file.write_text(json.dumps(self.content).replace(f'"{LITERAL}"', literal))

    def raw(self, content: bytes) -> None:
        self.file.write_bytes(content)

    def box(self, *values: object, literal: str = "", **more: object) -> None:
        self.content["annotations"][0] |= {"bbox": list(values)} | more
        self.write(literal)

    def every_box(self, change: Callable[[list[float]], list[float]]) -> None:
        for annotation in self.content["annotations"]:
            annotation["bbox"] = change(annotation["bbox"])  # type: ignore[arg-type]
        self.write()

    def annotation(self, literal: str = "", **more: object) -> None:
        self.content["annotations"][0] |= more
        self.write(literal)

    def members(self, key: str, *members: object) -> None:
        self.content[key] = list(members)  # type: ignore[arg-type]
        self.write()

    def name(self, name: object) -> None:
        self.content["images"][0]["file_name"] = name
        self.write()

    def xml(self, text: str | bytes = "", corners: tuple[object, ...] = (2, 3, 20, 30), name: str = "cat") -> None:
        """Turn the folder into VOC, with an annotation of two objects or the text given."""
        self.file.unlink()
        (self.root / "train" / "2.png").unlink()
        path = self.write_xml(self.root / "train" / "1.xml", [("dog", 2, 2, 9, 9), (name, *corners)], name="1.png")
        if text:
            path.write_bytes(text.encode() if isinstance(text, str) else text)

    def xml_changed(self, old: str, new: str) -> None:
        self.xml()
        path = self.root / "train" / "1.xml"
        path.write_text(path.read_text().replace(old, new, 1))

    def pixels(self, image: Image.Image, name: str = "1.png", **options: object) -> None:
        """Save another image in place of the first one, stated with its size."""
        self.image.unlink()
        self.image = self.image.with_name(name)
        image.save(self.image, **options)  # type: ignore[arg-type]
        self.content["images"][0] |= {"file_name": name, "height": image.height, "width": image.width}
        self.members("annotations", coco_annotation([1, 1, 9, 9]))

    def bytes_of_image(self, content: bytes) -> None:
        self.image.write_bytes(content)

    def turned(self, size: tuple[int, int] | None) -> None:
        """An image with EXIF orientation 6 and the annotated (height, width)."""
        exif = Image.Exif()
        exif[0x0112] = 6
        self.pixels(noise(48, 64), "1.jpg", exif=exif)
        image = self.content["images"][0]
        del image["height"], image["width"]
        self.content["images"][0] = image | ({"height": size[0], "width": size[1]} if size else {})
        self.write()

    def link(self, **options: object) -> None:
        elsewhere = self.root.parent / "elsewhere.png"
        self.image.rename(elsewhere)
        self.image.symlink_to(elsewhere)
        self.options = options

    def twice(self, key: str, **more: object) -> None:
        self.content[key].append(self.content[key][0] | more)
        self.write()


class Row(NamedTuple):
    number: str
    name: str
    spoil: Callable[[Folder], object]
    expected: str
    """``CODE action`` of each kind of problem, or the code of the error; empty for a clean set."""


def damaged_png(folder: Folder) -> None:
    content = bytearray(folder.image.read_bytes())
    content[len(content) // 2] ^= 4
    folder.bytes_of_image(bytes(content))


def png(side: int) -> bytes:
    """An image of black and white pixels that its file states and does not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = chunk(b"IHDR", side.to_bytes(4, "big") * 2 + b"\x01\0\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bomb(folder: Folder, side: int) -> None:
    folder.bytes_of_image(png(side))


def three_frames(folder: Folder) -> None:
    frames = [noise(48, 64, seed).convert("P") for seed in range(3)]
    folder.pixels(frames[0], "1.gif", save_all=True, append_images=frames[1:])


LAUGHS = "<!DOCTYPE a [<!ENTITY a 'lol'>" + "".join(f"<!ENTITY a{i} '{'&a;' * 10}'>" for i in range(9)) + "]>"
QUADRATIC = f"<!DOCTYPE a [<!ENTITY a '{'x' * 3000}'>]><annotation>{'&a;' * 100_000}</annotation>"
EXTERNAL = "<!DOCTYPE a [<!ENTITY a SYSTEM 'file:///etc/hosts'>]><annotation>&a;</annotation>"
NAMES = "<annotation><object><name>caf\xe9</name></object></annotation>".encode("latin-1")

BOXES = [
    Row("1", "zero width", lambda f: f.box(5, 5, 0, 30), "D101 dropped"),
    Row("2", "zero height", lambda f: f.box(5, 5, 30, 0), "D101 dropped"),
    Row("3", "inverted", lambda f: f.box(20, 20, -5, 5), "D102 dropped"),
    Row("3b", "many inverted", lambda f: f.every_box(lambda b: [b[0] + 9, b[1], -b[2], b[3]]), "D102 refused"),
    Row("4", "corners", lambda f: f.every_box(lambda b: [b[0] + 20, b[1] + 20, b[0] + 40, b[1] + 28]), "D108 refused, D105 clipped"),
    Row("5", "NaN", lambda f: f.box(5, 5, float("nan"), 30), "D103 refused"),
    Row("6", "infinity", lambda f: f.box(5, 5, float("inf"), 30), "D103 refused"),
    Row("7", "1e400", lambda f: f.box(5, 5, LITERAL, 30, literal="1e400"), "D103 refused"),
    Row("8", "-0.0", lambda f: f.box(-0.0, -0.0, 30, 30), ""),
    Row("9", "outside", lambda f: f.box(500, 500, 20, 20), "D104 dropped"),
    Row("10", "partly outside", lambda f: f.box(-50, -50, 70, 70), "D105 clipped"),
    Row("11", "1e-6 pixels", lambda f: f.box(5, 5, 1e-6, 30), "D106 dropped"),
    Row("12", "relative", lambda f: f.every_box(lambda b: [b[0] / 64, b[1] / 48, b[2] / 64, b[3] / 48]), "D113 refused"),
    Row("13", "null", lambda f: f.annotation(bbox=None), "D002 refused"),
    Row("14", "3 numbers", lambda f: f.box(1, 2, 3), "D002 refused"),
    Row("15", "5 numbers", lambda f: f.box(1, 2, 3, 4, 5), "D002 refused"),
    Row("16", "strings", lambda f: f.box("1", "1", "9", "9"), "D150 noted"),
    Row("17", "repeated", lambda f: f.twice("annotations", id=999), "D107 dropped"),
    Row("18", "2000 in an image", lambda f: f.members("annotations", *(coco_annotation([i % 50, i // 50, 2, 2 + i / 999], i) for i in range(2000))), ""),
    Row("19", "none in an image", lambda f: f.members("annotations", coco_annotation([1, 1, 5, 5])), ""),
    Row("20", "none at all", lambda f: f.members("annotations"), "D109 noted"),
    Row("21", "crowd only", lambda f: f.members("annotations", coco_annotation([1, 1, 5, 5], iscrowd=1)), ""),
]  # fmt: skip
LABELS = [
    Row("22", "unknown category", lambda f: f.annotation(category_id=7), "D110 refused"),
    Row("23", "ids with gaps", lambda f: f.members("categories", *({"id": i, "name": f"c{i}"} for i in (90, 1, 3))), ""),
    Row("24", "id 0", lambda f: f.members("categories", {"id": 1, "name": "b"}, {"id": 0, "name": "a"}), ""),
    Row("25", "id twice", lambda f: f.twice("categories", name="other"), "D008 refused"),
    Row("26", "name twice", lambda f: f.twice("categories", id=9), "D008 refused"),
    Row("27", "no categories", lambda f: f.members("categories"), "D008 refused"),
]  # fmt: skip
JSON = [
    Row("30", "empty file", lambda f: f.raw(b""), "D004 refused"),
    Row("31", "list", lambda f: f.raw(b"[]"), "D001 refused"),
    Row("32", "number", lambda f: f.raw(b"3"), "D001 refused"),
    Row("33", "truncated", lambda f: f.raw(f.file.read_bytes()[:999]), "D004 refused"),
    Row("34", "byte order mark", lambda f: f.raw(b"\xef\xbb\xbf" + f.file.read_bytes()), ""),
    Row("35", "nested deep", lambda f: f.raw(b'{"images": ' + b"[" * 100_000), "D004 refused"),
    Row("36", "5000 digits", lambda f: f.box(5, 5, LITERAL, 30, literal="9" * 5000), "D004 refused"),
    Row("37", "no annotations", lambda f: (f.content.pop("annotations"), f.write()), "D001 refused"),
    Row("38", "annotations an object", lambda f: (f.content.update(annotations={}), f.write()), "D001 refused"),  # type: ignore[call-overload]
    Row("39", "unknown image", lambda f: f.annotation(image_id=99), "D117 dropped"),
    Row("40", "image id twice", lambda f: f.twice("images"), "D003 refused"),
    Row("41", "annotation id twice", lambda f: f.annotation(id=2), ""),
    Row("42", "ids as strings", lambda f: f.annotation(id="1", image_id="2", category_id="1"), ""),
    Row("43", "iscrowd 2", lambda f: f.annotation(iscrowd=2), "D002 refused"),
    Row("44", "polygon of 1e9", lambda f: f.annotation(segmentation=[[1e9] * 8]), ""),
    Row("45", "malformed RLE", lambda f: f.annotation(iscrowd=1, segmentation={"size": [1e5, 1e5], "counts": "\0~"}), ""),
    Row("46", "no area", lambda f: (f.content["annotations"][0].pop("area"), f.write()), "D116 noted"),
    Row("47a", "area 0", lambda f: f.annotation(area=0), "D116 noted"),
    Row("47b", "area -1", lambda f: f.annotation(area=-1), "D150 noted, D116 noted"),
    Row("47d", "area below 0", lambda f: f.annotation(area=-7), "D002 refused"),
    Row("47c", "area NaN", lambda f: f.annotation(area=float("nan")), "D002 refused"),
]  # fmt: skip
XML = [
    Row("48", "billion laughs", lambda f: f.xml(LAUGHS + "<annotation>&a8;</annotation>"), "D005 refused"),
    Row("49", "quadratic", lambda f: f.xml(QUADRATIC), "D005 refused"),
    Row("50", "external entity", lambda f: f.xml(EXTERNAL), "D005 refused"),
    Row("51", "million deep", lambda f: f.xml("<annotation>" + "<a>" * 1_000_000), "D005 refused"),
    Row("52", "no size", lambda f: f.xml_changed("<size><width>64</width><height>48</height><depth>3</depth></size>", ""), ""),
    Row("53", "no xmax", lambda f: f.xml_changed("<xmax>9</xmax>", ""), "D005 refused"),
    Row("54", "counted from 0", lambda f: f.xml(corners=(0, 0, 20, 30)), "D105 clipped"),
    Row("55", "floats", lambda f: f.xml(corners=("2.5", "3.25", "20.5", "30.0")), ""),
    Row("56", "unknown class", lambda f: (f.xml(), f.options.update(class_names=["dog"])), "D110 refused"),
    Row("57", "latin-1", lambda f: f.xml(NAMES), "D005 refused"),
]  # fmt: skip
PATHS = [
    Row("58", "../../x", lambda f: f.name("../../x.png"), "S001 refused"),
    Row("59", "absolute", lambda f: f.name("/etc/hosts"), "S001 refused"),
    Row("60", "a/../../b", lambda f: f.name("a/../../../b.png"), "S001 refused"),
    Row("61", "NUL", lambda f: f.name("a\0.png"), "S001 refused"),
    Row("62", "empty", lambda f: f.name(""), "S001 refused"),
    Row("63", "dot", lambda f: f.name("."), "S001 refused"),
    Row("64", "address", lambda f: f.name("http://127.0.0.1/a.png"), "S001 refused"),
    Row("65", "other case", lambda f: f.name("1.PNG"), "I003 refused"),
    Row("66a", "link out", lambda f: f.link(), ""),
    Row("66b", "link out, refused", lambda f: f.link(follow_symlinks=False), "S001 refused"),
]
IMAGES = [
    Row("67", "missing", lambda f: f.image.unlink(), "I003 refused"),
    Row("68", "0 bytes", lambda f: f.bytes_of_image(b""), "I001 refused"),
    Row("69", "HTML", lambda f: f.bytes_of_image(b"<html><body>404</body></html>"), "I001 refused"),
    Row("70", "truncated JPEG", lambda f: (f.pixels(noise(48, 64), "1.jpg"), f.bytes_of_image(f.image.read_bytes()[:2000])), "I002 refused"),
    Row("71", "flipped bit in a PNG", damaged_png, "I002 refused"),
    Row("72", "16 bits", lambda f: f.pixels(Image.fromarray(np.full((48, 64), 257 * 99, np.uint16))), "I010 noted"),
    Row("73", "floats", lambda f: f.pixels(Image.new("F", (64, 48)), "1.tif"), "I011 refused"),
    *(Row(f"74 {mode}", mode, lambda f, mode=mode: f.pixels(noise(48, 64).convert("RGB").convert(mode), "1.tif"), "I013 noted" if mode in ("LA", "RGBA") else "") for mode in ("CMYK", "L", "P", "1", "LA", "RGBA")),
    Row("75a", "turned, raw size", lambda f: f.turned((48, 64)), "I026 noted"),
    Row("75b", "turned, upright size", lambda f: f.turned((64, 48)), "I026 noted"),
    Row("75c", "turned, no size", lambda f: f.turned(None), "I024 refused"),
    Row("76a", "100 megapixels", lambda f: bomb(f, 10_000), "I023 refused"),
    Row("76b", "400 megapixels", lambda f: bomb(f, 20_000), "I023 refused"),
    Row("76c", "1 x 2000", lambda f: f.pixels(noise(2000, 1)), "I022 refused"),
    Row("76d", "0 x 0", lambda f: bomb(f, 0), "I001 refused"),
    Row("76e", "three frames", three_frames, "I014 noted"),
]  # fmt: skip
ROWS = [*BOXES, *LABELS, *JSON, *XML, *PATHS, *IMAGES]


def outcome(folder: Folder) -> str:
    try:
        report = check_dataset(folder.root, decode=True, **folder.options)  # type: ignore[arg-type]
    except DataError as error:
        return f"{str(error)[5:9]} refused"
    assert all(problem.file and problem.reason for problem in report.problems)
    kinds = dict.fromkeys(f"{one.code[4:]} {one.action}" for one in report.problems)
    kinds.pop("L004 refused", None)  # that nothing is left is said as well
    if any("refused" in kind for kind in kinds):
        kinds.pop("D109 noted", None)
    return ", ".join(kinds)


@pytest.mark.heavy
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.number} {row.name}".replace(" ", "_"))
def test_check_dataset__acceptance(tmp_path: Path, write_xml: WriteXml, row: Row) -> None:
    (tmp_path / "set").mkdir()
    folder = Folder(tmp_path / "set", write_xml)
    row.spoil(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remark on large images
        assert outcome(folder) == row.expected


def test_check_dataset__acceptance_rows_are_complete() -> None:
    numbers = {int("".join(filter(str.isdigit, row.number.split()[0]))) for row in ROWS}
    assert numbers == set(range(1, 77)) - {28, 29}  # these two: tests/modules/test_detection.py


def test_read_split__what_a_refusal_says(tmp_path: Path, write_xml: WriteXml) -> None:
    """The error that stops training names the code, the file, the record, the value and the way out."""
    (tmp_path / "set").mkdir()
    folder = Folder(tmp_path / "set", write_xml)
    folder.box(5, 5, float("nan"), 30)
    with pytest.raises(DataError) as error:
        read_split(find_splits(folder.root)["train"])
    for part in (
        "[LCD-D103]",
        "annotations/instances_train.json",
        "annotation 1 of '2.png'",
        "nan",
        "invalid_annotations",
    ):
        assert part in str(error.value)
