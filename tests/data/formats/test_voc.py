import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from lightning_convnext_det.data.formats.discovery import find_splits, make_split, read_split
from lightning_convnext_det.data.formats.voc_layout import find_voc
from lightning_convnext_det.errors import DataError
from tests.data.reading import WriteImage, WriteXml, found
from tests.data.reading import read_root as read

SETS = [
    (
        "voc2012_mini",
        "VOCdevkit/VOC2012/Annotations",
        "VOCdevkit/VOC2012/ImageSets/Main",
        ["train", "val", "trainval"],
        38,
    ),
    ("bccd/BCCD", "Annotations", "ImageSets/Main", ["train", "val", "trainval", "test"], 0),
    ("quirks/raccoon", "annotations", "", ["train"], 0),
    ("quirks/plates", "annots", "", ["train"], 0),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("folder", "xml", "lists", "names", "difficult"), SETS, ids=[row[0] for row in SETS])
def test_read_voc__equals_the_xml(
    shared_data: Path, folder: str, xml: str, lists: str, names: list[str], difficult: int
) -> None:
    """Every object of every file is in the table, or among the problems if it has no area."""
    root = shared_data / folder
    splits = find_splits(root)
    assert sorted(splits) == sorted(names)
    all_files = sorted((root / xml).glob("*.xml"))
    all_names = {element.text for file in all_files for element in ET.parse(file).iterfind("object/name")}
    crowds = {}
    for name in names:
        table = read_split(splits[name])
        assert table.class_names == tuple(sorted(all_names))
        stems = (root / lists / f"{name}.txt").read_text().split() if lists else [file.stem for file in all_files]
        assert [table.path(index).stem for index in range(len(table))] == stems
        crowds[name] = table.crowd.sum()
        for index, stem in enumerate(stems):
            document = ET.parse(root / xml / f"{stem}.xml").getroot()
            size = [int(document.findtext(f"size/{side}")) for side in ("height", "width")]
            assert table.path(index).is_file()
            assert table.sizes[index].tolist() == size
            expected = []
            for element in document.iterfind("object"):
                xmin, ymin, xmax, ymax = (
                    float(element.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")
                )
                if xmax > xmin and ymax > ymin:
                    first = 0 if folder == "quirks/plates" else 1  # two of its six boxes begin at 0
                    box = np.clip([xmin - first, ymin - first, xmax, ymax], 0, [size[1], size[0]] * 2)
                    expected.append((element.findtext("name"), element.findtext("difficult") == "1", *box))
            rows = table.rows(index)
            assert [row[0] for row in expected] == [table.class_names[label] for label in table.labels[rows]]
            assert [row[1] for row in expected] == table.crowd[rows].tolist()
            np.testing.assert_allclose(table.boxes[rows], [row[2:] for row in expected], atol=1e-4)
    assert crowds.get("trainval", crowds["train"]) == difficult


@pytest.mark.heavy
def test_read_voc__boxes_without_area_of_real_set(shared_data: Path) -> None:
    table = read(shared_data / "bccd" / "BCCD", "trainval")

    assert [(p.code, p.file, p.record, p.action) for p in table.problems] == [
        ("LCD-D101", "Annotations/BloodImage_00338.xml", "object 13 (RBC)", "dropped"),
        ("LCD-D101", "Annotations/BloodImage_00343.xml", "object 4 (RBC)", "dropped"),
    ]
    assert table.problems[0].reason == "box [504, 337, 504, 337] has no area; VOC expects xmin, ymin, xmax, ymax"
    with pytest.raises(DataError, match=r"\[LCD-D101\] 2 records cannot be used"):
        read(shared_data / "bccd" / "BCCD", "trainval", invalid_annotations="refuse", collect=False)


def test_read_voc__pixels_are_counted_from_one(flat: Path, write_xml: WriteXml) -> None:
    write_xml(flat / "a.xml", [("cat", 1, 1, 64, 48), ("cat", 10.5, 20.25, 30, 40), ("dog", 3, 4, 4, 5)])
    table = read(flat)

    assert table.boxes.tolist() == [[0, 0, 64, 48], [9.5, 19.25, 30, 40], [2, 3, 4, 5]]
    assert table.area.tolist() == [64 * 48, 20.5 * 20.75, 4]
    assert table.problems == ()
    assert (table.class_names, table.category_ids) == (("cat", "dog"), (1, 2))
    assert table.annotation_ids.tolist() == [1, 2, 3]


def test_read_voc__pixels_counted_from_zero_are_clipped_and_reported(flat: Path, write_xml: WriteXml) -> None:
    write_xml(flat / "a.xml", [("cat", 0, 5, 20, 30)])
    table = read(flat, collect=False)

    assert table.boxes.tolist() == [[0, 4, 20, 30]]
    (problem,) = table.problems
    assert (problem.code, problem.record, problem.action) == ("LCD-D105", "object 1 (cat)", "clipped")
    assert "VOC counts pixels from 1" in problem.reason


@pytest.mark.parametrize(
    ("box", "code"),
    [
        ((5, 5, 5, 9), "LCD-D101"),
        ((9, 5, 5, 9), "LCD-D102"),
        ((70, 5, 90, 9), "LCD-D104"),
        (("nan", 5, 9, 9), "LCD-D103"),
    ],
)
def test_read_voc__bad_boxes(flat: Path, write_xml: WriteXml, box: tuple[object, ...], code: str) -> None:
    good = [("cat", 1 + i % 60, 1 + i // 60, 3 + i % 60, 4 + i // 60) for i in range(120)]
    write_xml(flat / "a.xml", [*good, ("dog", *box)])
    table = read(flat)

    assert [(p.code, p.file, p.record) for p in table.problems] == [(code, "a.xml", "object 121 (dog)")]
    assert len(table.boxes) == 120


def test_read_voc__difficult(flat: Path, write_xml: WriteXml) -> None:
    write_xml(flat / "a.xml", [("cat", 5, 5, 9, 9, 1), ("cat", 6, 6, 9, 9, 0), ("cat", 7, 7, 9, 9)])

    assert read(flat).crowd.tolist() == [True, False, False]
    assert read(flat, train_on_difficult=True).crowd.tolist() == [False, False, False]


def test_read_voc__no_object_and_no_size(flat: Path, write_xml: WriteXml) -> None:
    write_xml(flat / "a.xml", size=None)
    table = read(flat, class_names=["cat"])

    assert table.sizes.tolist() == [[48, 64]]
    assert table.offsets.tolist() == [0, 0]
    assert found(table) == [("LCD-D109", "noted")]


def test_read_voc__unknown_class(flat: Path, write_xml: WriteXml) -> None:
    write_xml(flat / "a.xml", [("cat", 5, 5, 9, 9), ("cow", 6, 6, 9, 9)])

    with pytest.raises(DataError, match=r"\[LCD-D110\] a.xml: object 2: class 'cow' is not among \('dog', 'cat'\)"):
        read(flat, class_names=["dog", "cat"], collect=False)
    assert read(flat, class_names=["dog", "cat"]).labels.tolist() == [1]


def test_read_voc__image_named_in_the_file(tmp_path: Path, write_image: WriteImage, write_xml: WriteXml) -> None:
    """Its own name decides; <filename> only where no image, or more than one, has that name."""
    for name in ("one.png", "two.jpg", "two.png", "other.png", "Four.png"):
        write_image(tmp_path / "images" / name)
    objects = [("cat", 5, 5, 9, 9)]
    write_xml(tmp_path / "annotations" / "one.xml", objects, name="other.png")
    write_xml(tmp_path / "annotations" / "two.xml", objects, name="two.png")
    write_xml(tmp_path / "annotations" / "three.xml", objects, name="../../etc/other.png")
    write_xml(tmp_path / "annotations" / "four.xml", objects, name="../../../etc/passwd.png")
    table = read(tmp_path)

    files = {table.path(i).name for i in range(len(table))}
    assert files == {"one.png", "two.png", "other.png"}
    messages = {problem.file: (problem.code, problem.reason) for problem in table.problems}
    assert messages["annotations/four.xml"] == (
        "LCD-I003",
        "no image is called 'four' (is 'Four.png' meant?) in images",
    )
    assert messages["annotations/three.xml"][0] == "LCD-D118"
    assert messages["images"] == (
        "LCD-D121",
        "1 images have no XML file and are left out: Four.png",
    )


def test_read_voc__two_images_of_one_name(tmp_path: Path, write_image: WriteImage, write_xml: WriteXml) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "a.jpg")
    write_xml(tmp_path / "a.xml", [("cat", 5, 5, 9, 9)])

    with pytest.raises(DataError, match=r"\[LCD-I003\] a.xml: several images are called 'a'"):
        read(tmp_path, collect=False)


@pytest.fixture
def devkit(tmp_path: Path, write_image: WriteImage, write_xml: WriteXml) -> Path:
    """VOC2007 with the images a, b, c and VOC2012 with d; a is in train, b in val, c in test, d in train."""
    for year, stems in (("VOC2007", "abc"), ("VOC2012", "d")):
        folder = tmp_path / "VOCdevkit" / year
        (folder / "ImageSets" / "Main").mkdir(parents=True)
        for stem in stems:
            write_image(folder / "JPEGImages" / f"{stem}.jpg")
            write_xml(folder / "Annotations" / f"{stem}.xml", [(f"class_{stem}", 5, 5, 9, 9)])
    for year, name, lines in (
        ("VOC2007", "train", "a\n"),
        ("VOC2007", "val", "b  \n\n"),
        ("VOC2007", "test", "c 1\n"),
        ("VOC2007", "trainval", "a\nb\n"),
        ("VOC2007", "cat_train", "a -1\n"),
        ("VOC2012", "train", "d\n"),
    ):
        (tmp_path / "VOCdevkit" / year / "ImageSets" / "Main" / f"{name}.txt").write_text(lines)
    return tmp_path


@pytest.mark.parametrize("folder", ["", "VOCdevkit"])
def test_find_voc__years_are_joined(devkit: Path, folder: str) -> None:
    root = devkit / folder
    tables = {name: read(root, name, collect=False) for name in find_splits(root)}

    assert list(tables) == ["train", "trainval", "val", "test"]
    stems = {name: [table.path(i).stem for i in range(len(table))] for name, table in tables.items()}
    assert stems == {"train": ["a", "d"], "val": ["b"], "test": ["c"], "trainval": ["a", "b"]}
    assert all(table.class_names == ("class_a", "class_b", "class_c", "class_d") for table in tables.values())


def test_find_voc__one_year(devkit: Path) -> None:
    table = read(devkit / "VOCdevkit" / "VOC2007", collect=False)

    assert table.class_names == ("class_a", "class_b", "class_c")
    assert table.path(0) == devkit / "VOCdevkit" / "VOC2007" / "JPEGImages" / "a.jpg"


def test_read_voc__list_names_what_is_not_there(devkit: Path) -> None:
    lists = devkit / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "train.txt"
    lists.write_text("a\nx\na\n../Annotations/b\n")
    table = read(devkit)

    where = "VOCdevkit/VOC2007/ImageSets/Main/train.txt"
    assert [(p.code, p.file, p.record, p.action) for p in table.problems] == [
        ("LCD-D119", where, "line 2", "refused"),
        ("LCD-D107", where, "line 3", "dropped"),
        ("LCD-D119", where, "line 4", "refused"),
    ]
    assert len(table) == 2


def test_read_voc__damaged_file_of_another_split(devkit: Path) -> None:
    """It does not keep this split from being read, and is reported by its own."""
    (devkit / "VOCdevkit" / "VOC2007" / "Annotations" / "b.xml").write_text("<annotation>")

    assert read(devkit, "train", collect=False).class_names == ("class_a", "class_c", "class_d")
    assert found(read(devkit, "val")) == [("LCD-D005", "refused")]


@pytest.mark.parametrize(
    ("xml", "images"),
    [("", ""), ("Annotations", "JPEGImages"), ("annots", "photos"), ("annotations", "images"), ("labels", "")],
)
@pytest.mark.parametrize("parts", [("",), ("train", "valid")], ids=["one", "split"])
def test_find_voc__folders(
    tmp_path: Path, write_image: WriteImage, write_xml: WriteXml, xml: str, images: str, parts: tuple[str, ...]
) -> None:
    for number, part in enumerate(parts):
        write_image(tmp_path / part / images / f"{number}.png")
        write_xml(tmp_path / part / xml / f"{number}.xml", [(f"class_{number}", 5, 5, 9, 9)])
    splits = find_voc(tmp_path)

    assert list(splits) == (["train", "val"] if len(parts) == 2 else ["train"])
    for number, split in enumerate(splits.values()):
        table = read_split(split)
        assert table.class_names == ("class_0", "class_1")[: len(parts)]
        assert table.path(0) == tmp_path / parts[number] / images / f"{number}.png"


def test_find_voc__other_xml(tmp_path: Path) -> None:
    (tmp_path / "pom.xml").write_text("<project/>")

    assert find_voc(tmp_path) == {}


def test_make_split__folders_of_xml_and_images(tmp_path: Path, write_image: WriteImage, write_xml: WriteXml) -> None:
    write_image(tmp_path / "x" / "photos" / "a.png")
    write_xml(tmp_path / "y" / "boxes" / "a.xml", [("cat", 5, 5, 9, 9)])

    table = read_split(make_split(tmp_path / "y" / "boxes", tmp_path / "x" / "photos"))

    assert table.path(0) == tmp_path / "x" / "photos" / "a.png"


def test_read_voc__real_image_turned_against_its_size(shared_data: Path, tmp_path: Path, write_xml: WriteXml) -> None:
    """labelImg states the size that it showed; the stored one here."""
    source = shared_data / "quirks" / "exif_labelimg" / "cell0005.jpg"
    (tmp_path / "cell0005.jpg").symlink_to(source)
    for size, upright in (((800, 600), False), ((600, 800), True)):
        write_xml(tmp_path / "cell0005.xml", [("cell", 10, 20, 30, 40)], size=size)
        table = read(tmp_path, collect=False)
        assert table.upright.tolist() == [upright]
        assert table.sizes.tolist() == [list(size)]
    write_xml(tmp_path / "cell0005.xml", [("cell", 10, 20, 30, 40)], size=None)
    with pytest.raises(DataError, match=r"\[LCD-I024\] cell0005.jpg: EXIF orientation 6.*exif: upright or exif: raw"):
        read(tmp_path, collect=False)
