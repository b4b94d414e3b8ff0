import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from lightning_convnext_det.data.formats.discovery import find_splits, read_split
from lightning_convnext_det.errors import DataError
from tests.data.reading import Annotate, WriteCoco, found, read


@pytest.mark.parametrize("name", ["train", "val"])
def test_read_coco__equals_pycocotools(shared_data: Path, name: str) -> None:
    root = shared_data / "coco_mini"
    table = read_split(find_splits(root)[name])
    reference = COCO(root / "annotations" / f"instances_{name}2017.json")

    assert table.problems == ()
    assert sorted(table.image_ids.tolist()) == sorted(reference.imgs)
    assert table.class_names == tuple(one["name"] for one in reference.loadCats(sorted(reference.cats)))
    assert table.category_ids == tuple(sorted(reference.cats))
    for index, image_id in enumerate(table.image_ids.tolist()):
        image = reference.imgs[image_id]
        annotations = reference.loadAnns(reference.getAnnIds([image_id]))
        rows = table.rows(index)
        assert table.path(index).name == image["file_name"]
        assert table.path(index).is_file()
        assert table.sizes[index].tolist() == [image["height"], image["width"]]
        assert table.annotation_ids[rows].tolist() == [one["id"] for one in annotations]
        assert [table.category_ids[label] for label in table.labels[rows]] == [
            one["category_id"] for one in annotations
        ]
        assert table.crowd[rows].tolist() == [bool(one["iscrowd"]) for one in annotations]
        np.testing.assert_allclose(table.area[rows], [one["area"] for one in annotations], rtol=1e-6)
        boxes = np.array([one["bbox"] for one in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(table.boxes[rows], boxes, atol=0.02)
    assert table.crowd.sum() == {"train": 10, "val": 5}[name]


def test_read_coco__dtypes_and_shapes(write_coco: WriteCoco) -> None:
    table = read(write_coco(num_images=2))

    assert (table.boxes.shape, table.boxes.dtype) == ((0, 4), np.float32)
    assert (table.labels.dtype, table.crowd.dtype, table.area.dtype) == (np.int64, np.bool_, np.float32)
    assert table.offsets.tolist() == [0, 0, 0]
    assert table.sizes.dtype == np.int32
    assert found(table) == [("LCD-D109", "noted")]


def test_read_coco__ids_with_gaps_unordered_zero_and_strings(write_coco: WriteCoco, annotate: Annotate) -> None:
    categories = [{"id": 90, "name": "z"}, {"id": "0", "name": "a"}, {"id": 3, "name": "m"}]
    images = [
        {"id": "7", "file_name": "2.png", "height": 48, "width": 64},
        {"id": 0, "file_name": "1.png", "height": 48, "width": 64},
    ]
    annotations = [
        annotate([1, 2, 3, 4], 50, image_id=0, category_id=90),
        annotate([5, 6, 7, 8], "9", image_id=7, category_id="3"),
        annotate([9, 9, 9, 9], 8, image_id="0", category_id=0),
    ]

    table = read(write_coco(annotations, images, categories, num_images=2))

    assert table.problems == ()
    assert table.class_names == ("a", "m", "z")
    assert table.category_ids == (0, 3, 90)
    assert table.image_ids.tolist() == [7, 0]
    assert table.path(0).name == "2.png"
    assert table.annotation_ids.tolist() == [9, 50, 8]
    assert table.labels.tolist() == [1, 2, 0]
    assert table.offsets.tolist() == [0, 1, 3]
    assert table.boxes.tolist() == [[5, 6, 12, 14], [1, 2, 4, 6], [9, 9, 18, 18]]


MALFORMED = [
    ("bbox_null", {"bbox": None}, "annotations[1]", ".bbox: expected 4 numbers, found None"),
    ("bbox_3", {"bbox": [1, 2, 3]}, "annotations[1]", ".bbox: expected 4 numbers, found 3 of them"),
    ("bbox_5", {"bbox": [1, 2, 3, 4, 5]}, "annotations[1]", ".bbox: expected 4 numbers, found 5 of them"),
    ("bbox_words", {"bbox": ["1", "2", "3", "x"]}, "annotations[1]", ".bbox: expected 4 numbers, found 'x'"),
    ("bbox_text_nan", {"bbox": ["1", "2", "3", "nan"]}, "annotations[1]", ".bbox: expected 4 numbers, found 'nan'"),
    ("bbox_true", {"bbox": [True, 2, 3, 4]}, "annotations[1]", ".bbox: expected 4 numbers, found True"),
    ("bbox_huge", {"bbox": [10**400, 2, 3, 4]}, "annotations[1]", "a number is too large"),
    ("image_id_half", {"image_id": 1.5}, "annotations[1]", ".image_id: expected an integer, found 1.5"),
    ("image_id_true", {"image_id": True}, "annotations[1]", ".image_id: expected an integer, found True"),
    ("iscrowd_2", {"iscrowd": 2}, "annotations[1]", ".iscrowd: expected 0 or 1, found 2"),
    ("area_text", {"area": "7a"}, "annotations[1]", ".area: expected a count of square pixels, found '7a'"),
    ("area_negative", {"area": -7}, "annotations[1]", ".area: expected a count of square pixels, found -7"),
    ("area_nan", {"area": float("nan")}, "annotations[1]", ".area: expected a count of square pixels, found nan"),
]


@pytest.mark.parametrize(
    ("change", "record", "reason"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED]
)
def test_read_coco__malformed_annotation(
    write_coco: WriteCoco, annotate: Annotate, change: dict[str, object], record: str, reason: str
) -> None:
    path = write_coco([annotate([1, 2, 3, 4], 1), annotate([5, 5, 5, 5], 2) | change])
    table = read(path)

    (problem,) = table.problems
    assert (problem.code, problem.record, problem.action) == ("LCD-D002", record, "refused")
    assert reason in problem.reason
    assert table.annotation_ids.tolist() == [1]
    assert read_split(find_splits(path.parents[1])["train"], invalid_annotations="drop").problems[0].action == "dropped"


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_read_coco__missing_key(write_coco: WriteCoco, annotate: Annotate, key: str) -> None:
    annotation = annotate([1, 2, 3, 4])
    del annotation[key]

    with pytest.raises(DataError, match=rf"annotations\[0\]: \.{key}: missing"):
        read(write_coco([annotation]), collect=False)


@pytest.mark.parametrize("value", [3, None, "text", [1]])
def test_read_coco__member_that_is_no_object(write_coco: WriteCoco, value: object) -> None:
    with pytest.raises(DataError, match=r"\[LCD-D002\].*annotations\[0\]: expected an object, found"):
        read(write_coco([value]), collect=False)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"annotations": {"a": 1}}, r"\[LCD-D001\].*annotations: expected a list, found an object"),
        ({"images": None}, r"\[LCD-D001\].*images: expected a list, found null"),
        ({"annotations": ...}, r"\[LCD-D001\].*'annotations' missing"),
        ({"categories": ...}, r"\[LCD-D001\].*'categories' missing"),
        ({"categories": []}, r"\[LCD-D008\].*'categories' is empty"),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]},
            r"\[LCD-D008\].*categories\[1\]: id 1 or name",
        ),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, r"\[LCD-D008\].*name 'a' is used twice"),
        ({"categories": [{"id": 1}]}, r"\[LCD-D008\].*categories\[0\]: expected an object with an id and a name"),
        ({"categories": [{"name": "a"}]}, r"\[LCD-D008\].*categories\[0\]: id: missing"),
        ({"categories": ["a"]}, r"\[LCD-D008\].*categories\[0\]"),
    ],
)
def test_read_coco__unusable_file(write_coco: WriteCoco, change: dict[str, object], match: str) -> None:
    """Even where problems are collected."""
    path = write_coco()
    content = {k: v for k, v in (json.loads(path.read_text()) | change).items() if v is not ...}
    path.write_text(json.dumps(content))

    with pytest.raises(DataError, match=match):
        read(path)


def test_read_coco__test_split_without_annotations(write_coco: WriteCoco) -> None:
    path = write_coco(name="test", num_images=2)
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "annotations"}))

    assert len(read_split(find_splits(path.parents[1])["test"])) == 2


def test_read_coco__duplicate_ids(write_coco: WriteCoco, annotate: Annotate) -> None:
    images = [{"id": 1, "file_name": f"{i}.png", "height": 48, "width": 64} for i in (1, 2)]
    path = write_coco([annotate([1, 1, 5, 5]), annotate([2, 2, 5, 5])], images, num_images=2)
    table = read(path)

    assert [(p.code, p.record, p.action) for p in table.problems] == [
        ("LCD-D003", "images[1]", "refused"),
    ]
    assert table.path(0).name == "1.png"
    assert table.boxes.tolist() == [[1, 1, 6, 6], [2, 2, 7, 7]]  # ids of annotations serve for messages only
    assert table.annotation_ids.tolist() == [1, 2]


@pytest.mark.parametrize(("good", "action"), [(99, "dropped"), (98, "refused")])
def test_read_coco__annotation_of_an_unknown_image(
    write_coco: WriteCoco, annotate: Annotate, good: int, action: str
) -> None:
    """One in a hundred is left out, more are refused."""
    annotations = [annotate([1 + i % 50, 1 + i // 50, 5, 5], i) for i in range(good)]

    table = read(write_coco([*annotations, annotate([1, 1, 5, 5], 500, image_id=77)]))

    assert [(p.code, p.record, p.action) for p in table.problems] == [("LCD-D117", "annotation 500", action)]


def test_read_coco__unknown_category_lists_all_and_shows_twenty(write_coco: WriteCoco, annotate: Annotate) -> None:
    path = write_coco([annotate([i, 1, 5, 5], i, category_id=5) for i in range(1, 31)])

    with pytest.raises(DataError, match=r"\[LCD-D110\] 30 records cannot be used .*the first 20") as error:
        read(path, collect=False)
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert (
        "annotations/instances_train.json: annotation 1: category_id 5 is not among the classes read, 1, 2" in lines[1]
    )
    assert len(read(path).problems) == 31  # and that the split holds no box


def test_read_coco__ignore_flag(write_coco: WriteCoco, annotate: Annotate) -> None:
    path = write_coco([annotate([1, 1, 5, 5], 1, ignore=0), annotate([2, 2, 5, 5], 2, ignore=1)])

    with pytest.raises(DataError, match=r"\[LCD-D114\].*annotations\[1\] \(id 2\): ignore is set"):
        read(path, collect=False)


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1e9, 1e9, -1e9, 5, 1e9, 7]],
        {"counts": "\x00nonsense", "size": [100000, 100000]},
        {"counts": [-3], "size": []},
        None,
    ],
    ids=["polygon", "compressed", "counts", "null"],
)
def test_read_coco__segmentation_beside_a_box_is_not_looked_at(
    write_coco: WriteCoco, annotate: Annotate, segmentation: object
) -> None:
    table = read(write_coco([annotate([1, 1, 5, 5], segmentation=segmentation, iscrowd=1)]))

    assert table.problems == ()
    assert table.crowd.tolist() == [True]


def test_read_coco__area_missing_or_zero(write_coco: WriteCoco, annotate: Annotate) -> None:
    missing = annotate([1, 1, 5, 6], 2)
    del missing["area"]

    table = read(write_coco([annotate([1, 1, 5, 5], 1, area=7.5), missing, annotate([2, 2, 5, 4], 3, area=0)]))

    assert table.area.tolist() == [7.5, 30, 20]
    assert [(p.code, p.reason.split()[0], p.action) for p in table.problems] == [("LCD-D116", "2", "noted")]


def test_read_coco__class_names_given(write_coco: WriteCoco, annotate: Annotate) -> None:
    path = write_coco([annotate([1, 1, 5, 5], 1, category_id=1), annotate([2, 2, 5, 5], 2, category_id=2)])

    table = read(path, class_names=["dog", "cat"])
    assert (table.class_names, table.category_ids, table.labels.tolist()) == (("dog", "cat"), (2, 1), [1, 0])
    assert found(read(path, class_names=["dog"])) == [("LCD-D110", "refused")]
    more = read(path, class_names=["dog", "cow", "cat"])
    assert (more.class_names, more.category_ids, more.labels.tolist()) == (("dog", "cow", "cat"), (2, -2, 1), [2, 0])
    assert [str(one) for one in more.problems] == [
        "[LCD-D120] annotations/instances_train.json: class 'cow' is not among the categories ('cat', 'dog'); "
        "the file has no objects of them (noted)"
    ]
    with pytest.raises(DataError, match=r"\[LCD-D120\].*class 'cow' is not among the categories \('cat', 'dog'\)"):
        read(path, class_names=["cow"])


def test_read_coco__no_image_left(write_coco: WriteCoco) -> None:
    path = write_coco(images=[])

    with pytest.raises(DataError, match=r"\[LCD-L004\] .*split 'train' has no images"):
        read(path, collect=False)
    path = write_coco(images=[{"id": 1, "file_name": "none.png"}])
    with pytest.raises(DataError, match=r"\[LCD-L004\].*has no images; the first of 1 problems: \[LCD-I003\]"):
        read(path, collect=False, invalid_annotations="drop")


@pytest.mark.parametrize(
    ("option", "match"),
    [({"exif": "no"}, "exif is 'no'; it can be"), ({"invalid_annotations": "no"}, "invalid_annotations is 'no'")],
)
def test_read_coco__unknown_option(write_coco: WriteCoco, option: dict[str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read(write_coco(), **option)


def test_read_coco__memory_of_a_large_file(tmp_path: Path, annotate: Annotate) -> None:
    """A file of 15 MB, most of it masks, is never in memory as a whole."""
    member = json.dumps(annotate([1, 2, 3, 4], segmentation={"counts": "0" * 10_000}))
    members = ",".join(member.replace('"id": 1,', f'"id": {i},') for i in range(1500))
    start = '{"images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 64}],'
    path = tmp_path / "instances_train.json"
    path.write_text(f'{start} "categories": [{{"id": 1, "name": "a"}}], "annotations": [{members}]}}')
    size = path.stat().st_size
    del members

    tracemalloc.start()
    table = read_split(find_splits(tmp_path)["train"], check_images=False, invalid_annotations="drop")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(table.problems) == 1499  # the repetitions
    assert size > 15e6
    assert peak < size / 2
