from pathlib import Path

import numpy as np
import pytest

from lightning_convnext_det.data.formats.discovery import find_splits, read_split
from lightning_convnext_det.data.formats.yolo_labels import label_files
from lightning_convnext_det.data.formats.yolo_layout import find_yolo
from lightning_convnext_det.errors import DataError
from tests.data.reading import WriteImage, found
from tests.data.reading import read_root as read


def write_labels(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def two_classes(flat: Path) -> Path:
    """A folder with a.png of 48 x 64 and the class names cat and dog."""
    (flat / "classes.txt").write_text("cat\ndog\n\n")
    return flat


def test_read_yolo__equals_the_boxes_that_were_written(shared_data: Path, tmp_path: Path) -> None:
    """Real COCO boxes, written as YOLO with six digits, come back to a hundredth of a pixel."""
    coco = read_split(find_splits(shared_data / "coco_mini")["val"])
    (tmp_path / "images" / "val").mkdir(parents=True)
    for index in range(len(coco)):
        path = coco.path(index)
        (tmp_path / "images" / "val" / path.name).symlink_to(path)
        height, width = coco.sizes[index]
        lines = []
        for label, (x1, y1, x2, y2) in zip(coco.labels[coco.rows(index)], coco.boxes[coco.rows(index)], strict=True):
            box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{label} " + " ".join(f"{value:.6f}" for value in box))
        if lines:
            write_labels(tmp_path / "labels" / "val" / f"{path.stem}.txt", *lines)
    names = "\n".join(f"  {label}: {name}" for label, name in enumerate(coco.class_names))
    (tmp_path / "data.yaml").write_text(f"path: .\ntrain: images/none\nval: images/val\nnames:\n{names}\n")

    table = read(tmp_path, "val", collect=False)

    by_name = {coco.path(index).name: index for index in range(len(coco))}
    order = [by_name[table.path(index).name] for index in range(len(table))]
    assert table.class_names == coco.class_names
    assert table.category_ids == tuple(range(80))
    np.testing.assert_array_equal(table.sizes, coco.sizes[order])
    rows = np.concatenate([np.arange(coco.rows(index).start, coco.rows(index).stop) for index in order])
    np.testing.assert_allclose(table.boxes, coco.boxes[rows], atol=0.01)
    np.testing.assert_array_equal(table.labels, coco.labels[rows])
    assert found(table) == [("LCD-D124", "noted")]  # the two images without objects have no label file


def test_read_yolo__boxes(two_classes: Path) -> None:
    write_labels(two_classes / "a.txt", "0 0.5 0.5 0.25 0.5", "", "1 0.875 0.5 0.5 1.0", "1.0 0.25 0.25 .5 5e-1")
    table = read(two_classes, collect=False)

    assert table.boxes.tolist() == [[24, 12, 40, 36], [40, 0, 64, 48], [0, 0, 32, 24]]
    assert table.labels.tolist() == [0, 1, 1]
    assert table.class_names == ("cat", "dog")
    assert [(p.code, p.file, p.record) for p in table.problems] == [("LCD-D105", "a.txt", "line 3")]


def test_read_yolo__outline(two_classes: Path) -> None:
    write_labels(two_classes / "a.txt", "0 0.25 0.5 0.5 0.25 0.75 1.0")
    table = read(two_classes, collect=False)

    assert table.boxes.tolist() == [[16, 12, 48, 48]]
    assert found(table) == [("LCD-D123", "noted")]


LINES = [
    ("four", "0 0.5 0.5 0.5", "LCD-D006", "4 numbers; expected class, centre x"),
    ("six", "0 0.5 0.5 0.5 0.5 0.9", "LCD-D006", r"6 numbers; expected class, .*\(are these detections with scores"),
    ("eight", "0 0.5 0.5 0.5 0.5 0.9 0.8 0.7", "LCD-D006", "8 numbers"),
    ("word", "0 0.5 0.5 0.5 x", "LCD-D006", "expected numbers, found '0.5 0.5 0.5 x'"),
    ("class_word", "cat 0.5 0.5 0.5 0.5", "LCD-D006", "class 'cat'; expected 0, 1, 2"),
    ("class_half", "0.5 0.5 0.5 0.5 0.5", "LCD-D006", "class '0.5'"),
    ("class_negative", "-1 0.5 0.5 0.5 0.5", "LCD-D006", "class '-1'"),
    ("class_2", "2 0.5 0.5 0.5 0.5", "LCD-D110", "class 2, but there are 2 class names; classes run from 0 to 1"),
    ("pixels", "0 30 20 10 10", "LCD-D006", "'30 20 10 10' is not relative to the image"),
    ("negative", "0 0.5 0.5 -0.5 0.5", "LCD-D006", "is not relative to the image"),
    ("infinite", "0 0.5 0.5 inf 0.5", "LCD-D006", "is not relative to the image"),
    ("nan", "0 0.5 0.5 nan 0.5", "LCD-D103", "is not finite"),
]


@pytest.mark.parametrize(("line", "code", "reason"), [row[1:] for row in LINES], ids=[row[0] for row in LINES])
def test_read_yolo__bad_line(two_classes: Path, line: str, code: str, reason: str) -> None:
    write_labels(two_classes / "a.txt", "0 0.5 0.5 0.25 0.5", line)

    with pytest.raises(DataError, match=rf"\[{code}\] a.txt: line 2: .*{reason}"):
        read(two_classes, collect=False)
    table = read(two_classes, invalid_annotations="drop", collect=False)
    assert len(table.boxes) == 1
    assert found(table) == [(code, "dropped")]


def test_read_yolo__no_area_and_repetition_are_left_out(two_classes: Path) -> None:
    write_labels(two_classes / "a.txt", "0 0.5 0.5 0.25 0.5", "0 0.5 0.5 0.25 0.5", "0 0.5 0.5 0 0.5")
    table = read(two_classes, collect=False)

    assert [(p.code, p.record, p.action) for p in table.problems] == [
        ("LCD-D101", "line 3", "dropped"),
        ("LCD-D107", "line 2", "dropped"),
    ]


def test_read_yolo__label_file_that_is_no_text(two_classes: Path, write_image: WriteImage) -> None:
    write_image(two_classes / "b.png")
    write_labels(two_classes / "a.txt", "0 0.5 0.5 0.25 0.5")
    (two_classes / "b.txt").write_bytes(b"\xff\xfe0")

    with pytest.raises(DataError, match=r"\[LCD-D006\] b.txt: cannot be read as UTF-8 text"):
        read(two_classes, collect=False)


def test_read_yolo__images_without_label_file_are_negatives(two_classes: Path, write_image: WriteImage) -> None:
    for name in "bcde":
        write_image(two_classes / f"{name}.png")
    write_labels(two_classes / "a.txt", "0 0.5 0.5 0.25 0.5")
    write_labels(two_classes / "b.txt")
    table = read(two_classes, collect=False)

    assert table.offsets.tolist() == [0, 1, 1, 1, 1, 1]
    (problem,) = table.problems
    assert (problem.code, problem.action) == ("LCD-D124", "noted")
    assert problem.reason == "3 images have no label file and count as without objects: c.png, d.png, e.png"


def test_read_yolo__no_label_file_at_all(two_classes: Path) -> None:
    (two_classes / "data.yaml").write_text("train: .\nnames: [cat, dog]\n")

    with pytest.raises(DataError, match=r"\[LCD-D124\].*no image has a label file; looked for 'a.txt'"):
        read(two_classes, collect=False)


def test_read_yolo__no_class_names(flat: Path) -> None:
    write_labels(flat / "a.txt", "2 0.5 0.5 0.25 0.5")

    with pytest.raises(DataError, match=r"\[LCD-D008\].*no class names: expected data.yaml, or classes.txt"):
        read(flat, collect=False)
    assert read(flat, class_names=["a", "b", "c"], collect=False).labels.tolist() == [2]
    assert read(flat, invalid_annotations="drop", collect=False).class_names == ("0", "1", "2")


def test_read_yolo__turned_image(two_classes: Path, write_image: WriteImage) -> None:
    """Its frame cannot be known; stored with 48 rows and 64 columns."""
    write_image(two_classes / "a.png", orientation=6)
    write_labels(two_classes / "a.txt", "0 0.5 0.25 0.5 0.5")

    with pytest.raises(DataError, match=r"\[LCD-I024\] a.png: EXIF orientation 6.*exif: upright or exif: raw"):
        read(two_classes, collect=False)
    raw, upright = (read(two_classes, exif=exif, collect=False) for exif in ("raw", "upright"))
    assert (raw.sizes.tolist(), raw.boxes.tolist()) == ([[48, 64]], [[16, 0, 48, 24]])
    assert (upright.sizes.tolist(), upright.boxes.tolist()) == ([[64, 48]], [[12, 0, 36, 32]])
    assert upright.upright.tolist() == [True]


YAMLS = [
    ("folders", "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]"),
    ("no_path", "train: images/train\nval: images/val\nnames: {1: dog, 0: cat}"),
    ("dots", "path: ./\ntrain: ./images/train/\nval: images/../images/val\nnames: [cat, dog]\nnc: 2"),
    ("roboflow", "train: ../images/train\nval: ../images/val\nnames: ['cat', 'dog']\nnc: 2"),
    ("strange_path", "path: /content/elsewhere\ntrain: images/train\nval: images/val\nnames: [cat, dog]"),
    ("lists", "train: [images/train]\nval: [images/val]\nnames: [cat, dog]"),
    ("files", "train: train.txt\nval: val.txt\nnames: [cat, dog]"),
    ("absolute", "train: ROOT/images/train\nval: ROOT/images/val\nnames: [cat, dog]"),
]


@pytest.fixture
def image_folders(tmp_path: Path, write_image: WriteImage) -> Path:
    """images/train/a.jpg, images/train/more/b.jpg and images/val/c.jpg with a box each, and lists of them."""
    for name in ("train/a", "train/more/b", "val/c"):
        write_image(tmp_path / "images" / f"{name}.jpg")
        write_labels(tmp_path / "labels" / f"{name}.txt", "1 0.5 0.5 0.25 0.5")
    (tmp_path / "train.txt").write_text("./images/train/a.jpg\nimages/train/more/b.jpg\n\n")
    (tmp_path / "val.txt").write_text(f"{tmp_path}/images/val/c.jpg\n")
    return tmp_path


@pytest.mark.parametrize("content", [row[1] for row in YAMLS], ids=[row[0] for row in YAMLS])
@pytest.mark.parametrize("by_file", [False, True], ids=["folder", "file"])
def test_find_yolo__data_yaml(image_folders: Path, content: str, by_file: bool) -> None:
    (image_folders / "data.yaml").write_text(content.replace("ROOT", str(image_folders)))
    splits = find_splits(image_folders / "data.yaml" if by_file else image_folders)

    assert list(splits) == ["train", "val"]
    train, val = (read_split(split) for split in splits.values())
    assert [train.path(i).stem for i in range(len(train))] == ["a", "b"]
    assert [val.path(i).stem for i in range(len(val))] == ["c"]
    assert train.class_names == val.class_names == ("cat", "dog")
    assert train.boxes.tolist() == [[24, 12, 40, 36]] * 2
    assert train.problems == val.problems == ()


def test_find_yolo__test_folder_that_does_not_exist(image_folders: Path) -> None:
    """Roboflow's files name one even if it was not exported."""
    (image_folders / "data.yaml").write_text(
        "train: images/train\nval: images/val\ntest: ../test/images\nnames: [a, b]"
    )

    table = read(image_folders, "train", collect=False)
    assert len(table) == 2
    assert str(table.problems[0]) == (
        "[LCD-D122] data.yaml: test: ../test/images does not exist; there is no split 'test' (noted)"
    )
    assert list(find_splits(image_folders)) == ["train", "val"]


def test_read_yolo__nothing_outside_the_root(image_folders: Path, write_image: WriteImage) -> None:
    inner = image_folders / "labels"
    (inner / "data.yaml").write_text(f"path: {image_folders}\ntrain: images/train\nnames: [cat, dog]")

    with pytest.raises(
        DataError, match=r"\[LCD-D122\] .*images/train: .*no such folder in .*labels; make that the root"
    ):
        read(inner)
    (inner / "train.txt").write_text(f"../images/train/a.jpg\n{image_folders}/images/val/c.jpg\n")
    (inner / "data.yaml").write_text("train: train.txt\nnames: [cat, dog]")
    messages = [str(problem) for problem in read(inner).problems if problem.code == "LCD-S001"]
    assert ["leads out of the root" in messages[0], "is absolute" in messages[1]] == [True, True]


def test_find_yolo__folder_of_the_same_name_outside_the_root(image_folders: Path, write_image: WriteImage) -> None:
    """Roboflow's ``../`` means the folder beside data.yaml, even where the literal one exists."""
    inner = image_folders / "inner"
    write_image(inner / "images" / "train" / "z.jpg")
    write_labels(inner / "labels" / "train" / "z.txt", "0 0.5 0.5 0.25 0.5")
    (inner / "data.yaml").write_text("train: ../images/train\nnames: [cat, dog]")
    table = read(inner, collect=False)

    assert [table.path(i).name for i in range(len(table))] == ["z.jpg"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("names: [a, a]\ntrain: .", "expected unique class names, found"),
        ("names: []\ntrain: .", "expected unique class names"),
        ("names: a.txt\ntrain: .", "names: expected a list of class names"),
        ("names: {0: a, 2: b}\ntrain: .", "names: expected labels 0 to 1, found 0, 2"),
        ("names: [yes, no]\ntrain: .", "the name of class 0 is True, not text; quote it"),
        ("names: [a, b]\nnc: 3\ntrain: .", "nc is 3, but there are 2 names"),
        ("names: [a, [b, c]]\ntrain: .", "the name of class 1 is list"),
        ("names: [a, b\ntrain: .", "no YAML: "),
        ("- a\n- b", "expected keys such as names, train, val"),
        ("names: !!python/object/apply:os.system ['true']\ntrain: .", "no YAML: "),
        ("names: [a, b]\ntrain: 3", "train: expected a folder, a text file, or a list"),
        ("[" * 1500, "no YAML: "),
        ("#" * (1 << 20) + "\nnames: [a]", "larger than 1 MiB"),
    ],
)
def test_read_yolo__unusable_data_yaml(two_classes: Path, content: str, match: str) -> None:
    (two_classes / "data.yaml").write_text(content)

    with pytest.raises(DataError, match=r"\[LCD-D(008|122)\] .*data.yaml: " + match) as error:
        read(two_classes)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


def test_read_yolo__numbers_as_names(two_classes: Path) -> None:
    write_labels(two_classes / "a.txt", "1 0.5 0.5 0.25 0.5")
    (two_classes / "data.yaml").write_text("names: [0, 1]\ntrain: .")

    assert read(two_classes, collect=False).class_names == ("0", "1")


def test_read_yolo__list_in_a_folder_of_its_own(image_folders: Path) -> None:
    """Its lines are relative to the root."""
    (image_folders / "lists").mkdir()
    (image_folders / "lists" / "train.txt").write_text("images/train/a.jpg\n")
    (image_folders / "data.yaml").write_text("train: lists/train.txt\nnames: [cat, dog]")

    assert read(image_folders, collect=False).path(0) == image_folders / "images" / "train" / "a.jpg"


def test_find_yolo__several_yaml_files(image_folders: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (image_folders / name).write_text("train: images/train\nnames: [cat, dog]")

    with pytest.raises(DataError, match=r"\[LCD-L003\].*several files name splits: a.yaml, b.yaml; give one"):
        find_splits(image_folders)
    assert list(find_splits(image_folders / "b.yaml")) == ["train"]


FOLDERS = [
    (
        "images_of_splits",
        {"train": ("images/train", "labels/train"), "val": ("images/valid", "labels/valid")},
        "classes.txt",
    ),
    (
        "splits_of_images",
        {"train": ("train/images", "train/labels"), "val": ("val/images", "val/labels")},
        "classes.txt",
    ),
    ("splits", {"train": ("train", "train"), "test": ("test", "test")}, "classes.txt"),
    ("images", {"train": ("images", "labels")}, "labels/classes.txt"),
    ("images_beside", {"train": ("images", "images")}, "images/classes.txt"),
    ("flat", {"train": ("", "")}, "obj.names"),
]


@pytest.mark.parametrize(("folders", "classes"), [row[1:] for row in FOLDERS], ids=[row[0] for row in FOLDERS])
def test_find_yolo__folders(
    tmp_path: Path, write_image: WriteImage, folders: dict[str, tuple[str, str]], classes: str
) -> None:
    for images, labels in folders.values():
        write_image(tmp_path / images / "a.png")
        write_labels(tmp_path / labels / "a.txt", "1 0.5 0.5 0.25 0.5")
    (tmp_path / classes).write_text("cat\ndog\n")
    splits = find_splits(tmp_path)

    assert list(splits) == list(folders)
    for split, (images, _) in zip(splits.values(), folders.values(), strict=True):
        table = read_split(split)
        assert table.path(0) == tmp_path / images / "a.png"
        assert (table.class_names, len(table.boxes)) == (("cat", "dog"), 1)


def test_find_yolo__images_with_other_text(flat: Path) -> None:
    (flat / "a.txt").write_text("a cat that sleeps on a sofa\n")

    assert find_yolo(flat) == {}


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("images/a.jpg", "labels/a.txt"),
        ("images/images/a.b.jpg", "images/labels/a.b.txt"),
        ("train/images/x/a.jpg", "train/labels/x/a.txt"),
        ("images.jpg", "images.txt"),
        ("myimages/a.jpg", "myimages/a.txt"),
    ],
)
def test_label_files__last_folder_called_images(image: str, labels: str) -> None:
    assert label_files(image)[0] == labels
