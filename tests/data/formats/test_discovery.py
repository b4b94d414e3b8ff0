from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_convnext_det.data.annotations import Problem, canonical_split
from lightning_convnext_det.data.formats.discovery import compare_classes, find_splits, make_split, read_split
from lightning_convnext_det.data.formats.problems import refuse_problems, summarize_problems
from lightning_convnext_det.errors import DataError
from tests.data.reading import Annotate, WriteCoco, WriteImage, WriteXml, read


def test_find_splits__missing_folder_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()

    with pytest.raises(
        DataError, match=rf"\[LCD-L001\] {tmp_path}/x/y: there is no such folder; {tmp_path} holds photos/"
    ):
        find_splits(tmp_path / "x" / "y")


def test_find_splits__empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"\[LCD-L001\] {tmp_path}: the folder is empty"):
        find_splits(tmp_path)


def test_find_splits__unknown_layout_says_what_was_looked_for(tmp_path: Path, write_image: WriteImage) -> None:
    for number in range(12):
        write_image(tmp_path / f"{number:02}.png")

    with pytest.raises(DataError, match=r"\[LCD-L002\]") as error:
        find_splits(tmp_path)
    message = str(error.value)
    for part in ("instances_*.json", "_annotations.coco.json", "ImageSets/Main", "data.yaml", "00.png", "and 4 more"):
        assert part in message
    assert "\n" not in message
    with pytest.raises(DataError, match=r"Looked for VOC: [^;]*Found 00.png"):
        find_splits(tmp_path, format="voc")


def test_find_splits__dataset_one_folder_below(shared_data: Path) -> None:
    with pytest.raises(DataError, match=r"\[LCD-L002\].*Found BCCD/, LICENSE, SOURCE.md. Is .*bccd/BCCD meant\?"):
        find_splits(shared_data / "bccd")


def test_find_splits__two_formats(write_coco: WriteCoco, write_xml: WriteXml) -> None:
    root = write_coco().parents[1]
    write_xml(root / "train" / "1.xml", [("cat", 5, 5, 9, 9)])

    with pytest.raises(DataError, match=r"\[LCD-L003\].*holds COCO and VOC annotations; give format"):
        find_splits(root)
    assert find_splits(root, format="coco")["train"].format == "coco"
    assert find_splits(root, format="voc")["train"].format == "voc"


def test_find_splits__unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format is 'csv'; it can be"):
        find_splits(tmp_path, format="csv")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("folder", "format", "names"),
    [
        ("coco_mini", "coco", ["train", "val"]),
        ("voc2012_mini", "voc", ["train", "trainval", "val"]),
        ("bccd/BCCD", "voc", ["train", "trainval", "val", "test"]),
        ("quirks/raccoon", "voc", ["train"]),
        ("quirks/plates", "voc", ["train"]),
        ("quirks/exif", "coco", ["raw", "upright"]),
        ("quirks/exif_labelimg", "yolo", ["train"]),
        ("metric_refs/voc2012_100", "coco", ["gt"]),
    ],
)
def test_find_splits__real_sets(shared_data: Path, folder: str, format: str, names: list[str]) -> None:
    splits = find_splits(shared_data / folder)

    assert [(split.name, split.format) for split in splits.values()] == [(name, format) for name in names]
    assert list(splits) == names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train2017", "train"),
        ("val_2014", "val"),
        ("Valid", "val"),
        ("validation", "val"),
        ("testing", "test"),
        ("trainval", "trainval"),
        ("minival2014", "minival"),
        ("2017", "2017"),
        ("night", "night"),
    ],
)
def test_canonical_split__names(name: str, expected: str) -> None:
    assert canonical_split(name) == expected


def test_make_split__what_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")

    with pytest.raises(DataError, match=r"\[LCD-L001\] .*none.json: there is no such file or folder"):
        make_split(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"\[LCD-L001\] .*photos: there is no such file or folder"):
        make_split(tmp_path / "a.csv", tmp_path / "photos")
    with pytest.raises(DataError, match=r"\[LCD-L002\] .*a.csv: expected a COCO file"):
        make_split(tmp_path / "a.csv")


def test_make_split__images_are_looked_for(write_coco: WriteCoco) -> None:
    path = write_coco(num_images=2)

    assert len(read_split(make_split(path))) == 2
    assert [*find_splits(path)] == ["train"]


def test_compare_classes__names_and_ids(write_coco: WriteCoco, annotate: Annotate) -> None:
    table = read(write_coco([annotate([1, 1, 5, 5])]))
    swapped = replace(table, class_names=table.class_names[::-1])
    fewer = replace(table, class_names=table.class_names[:1], category_ids=table.category_ids[:1])
    other_ids = replace(table, category_ids=(1, 7))

    assert compare_classes({"train": table, "val": replace(table, boxes=np.zeros((0, 4), np.float32))}) == []
    problems = compare_classes({"train": table, "a": swapped, "b": fewer, "c": other_ids})
    assert [p.reason for p in problems] == [
        "the classes differ from those of split 'train': class 'dog' of id 1 is id 2 there",
        "the classes differ from those of split 'train': it has 1 of the 2 classes, which are those of training",
        "the classes differ from those of split 'train': class 'dog' of id 7 is id 2 there",
    ]
    assert [p.action for p in problems] == ["refused", "noted", "refused"]


def test_refuse_problems__only_what_is_refused(write_coco: WriteCoco) -> None:
    table = replace(read(write_coco()), problems=(Problem("LCD-D101", "a", "b", "c", "dropped"),))
    refuse_problems(table)

    one = Problem("LCD-D103", "a.json", "annotation 7", "is not finite", "refused")
    with pytest.raises(
        DataError, match=r"^\[LCD-D103\] a.json: annotation 7: is not finite \(invalid_annotations: drop .*\)$"
    ):
        refuse_problems(replace(table, problems=(*table.problems, one)))


def test_summarize_problems__a_line_for_each_kind() -> None:
    problems = [Problem("LCD-D101", "a.json", f"annotation {i}", f"box {i}", "dropped") for i in range(5)]

    assert summarize_problems([*problems, Problem("LCD-D109", "a.json", "", "none", "noted")]) == [
        "[LCD-D101] 5 dropped: a.json annotation 0, a.json annotation 1, a.json annotation 2, ... - box 0",
        "[LCD-D109] 1 noted: a.json - none",
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "_annotations.createml.json",
            "[]",
            "looks like CreateML's JSON, which is not read: export the dataset as COCO",
        ),
        ("a.json", '{"version": "5", "shapes": []}', "looks like LabelMe's JSON, which is not read: export"),
        ("_annotations.csv", "filename,xmin", "looks like a table, which is not read: export"),
        ("annotations/instances_train.json.gz", "", "looks like a compressed archive, which is not read: unpack it"),
        ("shapes.v1.zip", "", "looks like an archive, which is not read: unpack it"),
    ],
    ids=["CreateML", "LabelMe", "CSV", "gzip", "zip"],
)
def test_find_splits__names_formats_that_are_not_read(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"LCD-L002.*{tmp_path / name} {said}"):
        find_splits(tmp_path)


def test_find_splits__two_folders_deep_is_suggested(tmp_path: Path) -> None:
    folder = tmp_path / "export" / "data" / "annotations"
    folder.mkdir(parents=True)
    (folder / "instances_train.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DataError, match=f"LCD-L002.*Is {tmp_path / 'export' / 'data'} meant"):
        find_splits(tmp_path)


def test_find_splits__voc_in_utf16(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.xml").write_text(
        '<?xml version="1.0" encoding="UTF-16"?><annotation></annotation>', encoding="utf-16"
    )
    assert find_splits(tmp_path)["train"].format == "voc"
