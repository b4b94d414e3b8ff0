import json
import pickle
import random
from collections import Counter
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lightning_convnext_det.data.check import Report, check_dataset, print_report, summarize_table
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.errors import DataError
from tests.data.reading import Annotate, WriteCoco, WriteXml


def printed(report: Report) -> str:
    console = Console(file=StringIO(), width=100)
    print_report(report, console)
    file = console.file
    assert isinstance(file, StringIO)
    return file.getvalue()


@pytest.mark.heavy
def test_check_dataset__real_set_with_two_boxes_without_area(shared_data: Path) -> None:
    report = check_dataset(shared_data / "bccd" / "BCCD")

    assert Counter((p.code, p.action) for p in report.problems) == {("LCD-D101", "dropped"): 2}
    assert not report.clean
    train, test = (summarize_table(report.tables[name]) for name in ("train", "test"))
    assert (train.images, train.boxes, train.boxes_per_class) == (205, 2804, (209, 2381, 214))
    assert (test.images, test.boxes, test.smallest, test.largest) == (72, 945, (480, 640), (480, 640))
    text = printed(report)
    assert "[LCD-D101] Annotations/BloodImage_00343.xml: object 4 (RBC): box [181, 329, 181, 329] has no area" in text
    assert "not clean (VOC; 2 dropped)" in text
    for part in ("trainval", "Platelets", "2,804", "RGB 205", "640x480"):
        assert part in text


@pytest.mark.heavy
def test_check_dataset__real_set_with_crowds(shared_data: Path) -> None:
    report = check_dataset(shared_data / "coco_mini", decode=True)

    assert report.clean
    assert [(p.code, p.action) for p in report.problems] == [("LCD-D128", "noted")]  # sheep, cows, a keyboard in val
    summary = summarize_table(report.tables["train"])
    areas = [a["area"] for a in json.loads(
        (shared_data / "coco_mini" / "annotations" / "instances_train2017.json").read_text()
    )["annotations"]]  # fmt: skip
    assert (summary.boxes, summary.crowd, summary.images_without_boxes) == (939, 10, 2)
    assert summary.small == sum(area < 1024 for area in areas)
    assert summary.large == sum(area >= 9216 for area in areas)
    assert summary.medium == 939 - summary.small - summary.large
    assert report.modes["train"] == {"RGB": 127, "L": 1}
    assert "coco_mini: clean (COCO; 1 noted)" in printed(report)


QUIRKS = [
    ("raccoon", True, {"LCD-D125": 2}),
    ("plates", True, {"LCD-D154": 1, "LCD-I012": 3, "LCD-I013": 3}),
    ("exif", True, {"LCD-I025": 3, "LCD-I026": 14, "LCD-D126": 1}),
    ("exif_labelimg", False, {"LCD-D008": 1, "LCD-I024": 2}),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("folder", "clean", "codes"), QUIRKS, ids=[row[0] for row in QUIRKS])
def test_check_dataset__oddities_of_real_sets(
    shared_data: Path, folder: str, clean: bool, codes: dict[str, int]
) -> None:
    report = check_dataset(shared_data / "quirks" / folder, decode=True)

    assert Counter(problem.code for problem in report.problems) == codes
    assert report.clean == clean


def test_check_dataset__every_odd_image(shared_data: Path, tmp_path: Path, write_xml: WriteXml) -> None:
    """The collected images of all formats, as a dataset."""
    for path in sorted((shared_data / "quirks" / "pillow").iterdir()):
        (tmp_path / path.name).symlink_to(path)
        write_xml(tmp_path / f"{path.stem}.xml", [("a", 2, 2, 9, 9)], size=None, name=path.name)
    report = check_dataset(tmp_path, exif="raw", decode=True)

    refused = {(p.file, p.code) for p in report.problems if p.action == "refused"}
    assert refused == {
        ("broken.png", "LCD-I001"),
        ("truncated_image.png", "LCD-I002"),
        ("truncated_jpeg.jpg", "LCD-I002"),
    }
    noted = {(p.file, p.code) for p in report.problems if p.action == "noted"}
    assert noted == {
        ("exif_imagemagick_orientation.png", "LCD-I026"),
        ("hopper_orientation_6.jpg", "LCD-I026"),
        ("xmp_tags_orientation.png", "LCD-I026"),
        ("i_trns.png", "LCD-I010"),
        ("iss634.gif", "LCD-I014"),
        ("pil136.png", "LCD-I013"),
        ("uncompressed_la.png", "LCD-I013"),
        ("xmp_tags_orientation.png", "LCD-I013"),
    }


def test_check_dataset__truncated_image_shows_only_when_decoded(write_coco: WriteCoco) -> None:
    root = write_coco(num_images=2).parents[1]
    path = root / "train" / "2.png"
    path.write_bytes(path.read_bytes()[:3000])

    assert check_dataset(root).clean
    report = check_dataset(root, decode=True)
    assert [(p.code, p.file, p.action) for p in report.problems if p.action != "noted"] == [
        ("LCD-I002", "train/2.png", "refused")
    ]


def test_check_dataset__unusable_file_beside_a_good_one(write_coco: WriteCoco, annotate: Annotate) -> None:
    root = write_coco([annotate([1, 1, 5, 5])]).parents[1]
    write_coco(name="val").write_text('{"images": [')
    report = check_dataset(root)

    (problem,) = report.problems
    assert (problem.code, problem.record, problem.action) == ("LCD-D004", "line 1 column 13", "refused")
    assert list(report.tables) == ["train"]
    assert "not clean (COCO; 1 refused)" in printed(report)


def test_check_dataset__classes_differ(write_coco: WriteCoco, annotate: Annotate) -> None:
    write_coco([annotate([1, 1, 5, 5])])
    path = write_coco(
        [annotate([1, 1, 5, 5])], categories=[{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}], name="val"
    )
    report = check_dataset(path.parents[1])

    assert [(p.code, p.record, p.action) for p in report.problems if p.action != "noted"] == [
        ("LCD-D120", "split 'val'", "refused")
    ]
    assert not report.clean


def test_check_dataset__split_without_images(write_coco: WriteCoco) -> None:
    report = check_dataset(write_coco(images=[]).parents[1])

    assert [(p.code, p.action) for p in report.problems] == [("LCD-L004", "refused")]
    assert summarize_table(report.tables["train"]).smallest == (0, 0)
    assert "0x0" in printed(report)


def test_check_dataset__same_images_in_two_splits(write_coco: WriteCoco, annotate: Annotate) -> None:
    """As the same file by another way, and as files with the same bytes."""
    root = write_coco([annotate([1, 1, 5, 5])], num_images=2).parents[1]
    (root / "val").mkdir()
    (root / "val" / "copy.png").write_bytes((root / "train" / "2.png").read_bytes())
    names = ("../train/1.png", "copy.png")
    images = [{"id": i, "file_name": name, "height": 48, "width": 64} for i, name in enumerate(names)]
    write_coco([annotate([1, 1, 5, 5])], images=images, num_images=0, name="val")
    report = check_dataset(root)

    assert [(p.code, p.file, p.reason) for p in report.problems] == [
        ("LCD-D125", "val/copy.png", "equals train/2.png byte by byte"),
        ("LCD-D126", str(root), "1 images are in 'train' and in 'val', such as 1.png"),
    ]
    assert report.clean


def test_check_dataset__reads_only(write_coco: WriteCoco, annotate: Annotate) -> None:
    root = write_coco([annotate([1, 1, 0, 5])], num_images=2).parents[1]

    def state() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(root.rglob("*"))}

    before = state()
    check_dataset(root, decode=True)
    assert state() == before


def test_check_dataset__no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="LCD-L001"):
        check_dataset(tmp_path)


def test_print_report__brackets_and_colons_are_not_markup(write_coco: WriteCoco, annotate: Annotate) -> None:
    categories = [{"id": 1, "name": "[red]cat[/red]"}, {"id": 2, "name": ":smile:"}]
    root = write_coco([annotate([1, 1, 0, 5])], categories=categories).parents[1]
    text = printed(check_dataset(root))

    assert "[red]cat[/red]" in text
    assert ":smile:" in text
    assert text.startswith("[LCD-D101] annotations/instances_train.json: annotation 1 of '1.png': box [1, 1, 0, 5]")


def test_print_report__all_that_is_bad_and_the_first_notes(write_coco: WriteCoco, annotate: Annotate) -> None:
    root = write_coco([annotate([1, 1, 0, 5], i) for i in range(30)], num_images=25).parents[1]
    for number in range(1, 26):
        Image.new("LA", (64, 48), number).save(root / "train" / f"{number}.png")
    text = printed(check_dataset(root))

    assert text.count("[LCD-D101]") == 30
    assert text.count("[LCD-I013]") == 21
    assert "[LCD-I013] 5 more like these (noted)" in text


def test_unreadable_error__survives_the_way_out_of_a_worker(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")

    with pytest.raises(DataError) as error:
        read_image(tmp_path / "a.jpg")
    copy = pickle.loads(pickle.dumps(error.value))
    assert str(copy) == str(error.value)
    assert copy.problem_of("b").file == "b"
    assert type(copy)("text of a worker").problem_of("b").reason == "text of a worker"


TOKENS = [
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b'"',
    b"{",
    b"]",
    b"</",
    b"&",
    b"\x00",
    b"\xff",
    b"../",
    b"99999999999999999999",
    b" ",
]


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["coco", "voc", "yolo", "yaml"])
def test_check_dataset__damaged_annotations_end_in_a_report(
    tmp_path: Path, write_coco: WriteCoco, write_xml: WriteXml, annotate: Annotate, kind: str
) -> None:
    """Whatever 60 files with random damage say: no crash, and nothing impossible in the tables."""
    root = tmp_path
    files = {"voc": root / "train" / "1.xml", "yolo": root / "train" / "1.txt", "yaml": root / "data.yaml"}
    path = files.get(kind) or write_coco([annotate([1 + i, 2, 9, 9], i) for i in range(5)])
    if kind != "coco":
        write_coco(num_images=1).unlink()
    if kind == "voc":
        write_xml(path, [("cat", 1 + i, 2, 9 + i, 9) for i in range(3)], name="1.png")
    if kind in ("yolo", "yaml"):
        files["yolo"].write_text("0 0.5 0.5 0.25 0.5\n1 0.875 0.5 0.125 1.0\n")
        files["yaml"].write_text("path: .\ntrain: train\nnames:\n  0: cat\n  1: dog\n")
    content = path.read_bytes()
    chance = random.Random(0)
    read = 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 1, 3])):
            place, length = chance.randrange(len(damaged)), chance.randrange(6)
            damaged[place : place + length] = chance.choice([b"", bytes([chance.randrange(256)]), *TOKENS])
        path.write_bytes(damaged)
        try:
            report = check_dataset(root)
        except DataError:
            continue
        for table in report.tables.values():
            read += 1
            assert np.isfinite(table.boxes).all()
            assert (table.boxes[:, 2:] > table.boxes[:, :2]).all()
            assert np.isin(table.labels, np.arange(len(table.class_names))).all()
            assert table.offsets[-1] == len(table.boxes) == len(table.area) == len(table.crowd)
    assert read > 10
