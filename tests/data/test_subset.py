from pathlib import Path

import numpy as np
import pytest

from lightning_convnext_det.data.annotations import DetectionAnnotations
from lightning_convnext_det.data.subset import count_shared, select_classes, split_randomly, take_images
from lightning_convnext_det.errors import DataError
from tests.data.builders import Box, TinyImage, make_annotations


@pytest.fixture
def table(tmp_path: Path) -> DetectionAnnotations:
    images = [
        TinyImage(20, 30, (Box((0, 0, 1, 1), 0), Box((0, 0, 2, 2), 1, crowd=True, area=9))),
        TinyImage(30, 20),
        TinyImage(24, 24, (Box((0, 0, 3, 3), 1), Box((0, 0, 4, 4), 0), Box((0, 0, 5, 5), 1))),
    ]
    return make_annotations(tmp_path, images, write=False)


def contents(table: DetectionAnnotations) -> list[tuple[int, list[tuple[str, float, bool, float, int]]]]:
    """TinyImage id, and of each object class, side, crowd, area, annotation id; read by a plain loop."""
    found = []
    for index in range(len(table)):
        objects = []
        for row in range(table.offsets[index], table.offsets[index + 1]):
            name = table.class_names[table.labels[row]]
            fields = float(table.boxes[row, 2]), bool(table.crowd[row]), float(table.area[row])
            objects.append((name, *fields, int(table.annotation_ids[row])))
        found.append((int(table.image_ids[index]), objects))
    return found


def test_take_images__any_order(table: DetectionAnnotations) -> None:
    taken = take_images(table, np.array([2, 0]))
    assert contents(taken) == [contents(table)[2], contents(table)[0]]
    assert taken.path(0).name == "02.png"
    assert taken.sizes.tolist() == [[24, 24], [20, 30]]


def test_take_images__none_and_without_objects(table: DetectionAnnotations) -> None:
    assert contents(take_images(table, np.array([1]))) == [(101, [])]
    assert len(take_images(table, np.array([], np.int64))) == 0


def test_select_classes__subset_keeps_all_images(table: DetectionAnnotations) -> None:
    selected = select_classes(table, ["dog"])
    assert selected.class_names == ("dog",)
    assert selected.category_ids == (2,)
    expected = [(image_id, [one for one in objects if one[0] == "dog"]) for image_id, objects in contents(table)]
    assert contents(selected) == expected
    assert sum(len(objects) for _, objects in expected) == 3


def test_select_classes__other_order(table: DetectionAnnotations) -> None:
    swapped = select_classes(table, ["dog", "cat"])
    assert contents(swapped) == contents(table)
    assert swapped.labels.tolist() == [1, 0, 0, 1, 0]
    assert swapped.category_ids == (2, 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "bird"], "'bird' is not a class of the data; it has cat, dog"),
        ([], "must name one"),
        (["cat"] * 2, "each once"),
    ],
)
def test_select_classes__refuses(table: DetectionAnnotations, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        select_classes(table, names)


def test_split_randomly__partition(tmp_path: Path) -> None:
    table = make_annotations(tmp_path, [TinyImage(20, 30)] * 40, write=False)
    remaining, aside = split_randomly(table, 0.25, seed=1)
    assert len(aside) == 10
    assert sorted([*remaining, *aside]) == list(range(40))
    assert (np.diff(aside) > 0).all()
    assert split_randomly(table, 0.25, seed=1)[1].tolist() == aside.tolist()
    assert split_randomly(table, 0.25, seed=2)[1].tolist() != aside.tolist()


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.99, 2)])
def test_split_randomly__leaves_an_image_on_either_side(
    table: DetectionAnnotations, fraction: float, count: int
) -> None:
    assert len(split_randomly(table, fraction, seed=0)[1]) == count


def test_split_randomly__one_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too few to hold one out.*data\.val_fraction 0"):
        split_randomly(make_annotations(tmp_path, [TinyImage(20, 30)], write=False), 0.5, seed=0)


def test_count_shared__by_path(table: DetectionAnnotations, tmp_path: Path) -> None:
    assert count_shared(table, take_images(table, np.array([1, 2]))) == 2
    elsewhere = make_annotations(tmp_path / "other", [TinyImage(20, 30)] * 3, write=False)
    assert count_shared(table, elsewhere) == 0
