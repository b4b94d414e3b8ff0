from pathlib import Path

import numpy as np
import pytest

from lightning_convnext_det.data.subset import count_shared, select_classes, split_randomly, take_pictures
from lightning_convnext_det.data.table import DetectionTable
from lightning_convnext_det.errors import DataError
from tests.data.builders import Box, Picture, make_table


@pytest.fixture
def table(tmp_path: Path) -> DetectionTable:
    pictures = [
        Picture(20, 30, (Box((0, 0, 1, 1), 0), Box((0, 0, 2, 2), 1, crowd=True, area=9))),
        Picture(30, 20),
        Picture(24, 24, (Box((0, 0, 3, 3), 1), Box((0, 0, 4, 4), 0), Box((0, 0, 5, 5), 1))),
    ]
    return make_table(tmp_path, pictures, write=False)


def contents(table: DetectionTable) -> list[tuple[int, list[tuple[str, float, bool, float, int]]]]:
    """Picture id, and of each object class, side, crowd, area, annotation id; read by a plain loop."""
    found = []
    for index in range(len(table)):
        objects = []
        for row in range(table.offsets[index], table.offsets[index + 1]):
            name = table.class_names[table.labels[row]]
            fields = float(table.boxes[row, 2]), bool(table.crowd[row]), float(table.area[row])
            objects.append((name, *fields, int(table.annotation_ids[row])))
        found.append((int(table.image_ids[index]), objects))
    return found


def test_take_pictures__any_order(table: DetectionTable) -> None:
    taken = take_pictures(table, np.array([2, 0]))
    assert contents(taken) == [contents(table)[2], contents(table)[0]]
    assert taken.path(0).name == "02.png"
    assert taken.sizes.tolist() == [[24, 24], [20, 30]]


def test_take_pictures__none_and_without_objects(table: DetectionTable) -> None:
    assert contents(take_pictures(table, np.array([1]))) == [(101, [])]
    assert len(take_pictures(table, np.array([], np.int64))) == 0


def test_select_classes__subset_keeps_all_pictures(table: DetectionTable) -> None:
    selected = select_classes(table, ["dog"])
    assert selected.class_names == ("dog",)
    assert selected.category_ids == (2,)
    expected = [(image_id, [one for one in objects if one[0] == "dog"]) for image_id, objects in contents(table)]
    assert contents(selected) == expected
    assert sum(len(objects) for _, objects in expected) == 3


def test_select_classes__other_order(table: DetectionTable) -> None:
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
def test_select_classes__refuses(table: DetectionTable, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        select_classes(table, names)


def test_split_randomly__partition(tmp_path: Path) -> None:
    table = make_table(tmp_path, [Picture(20, 30)] * 40, write=False)
    remaining, aside = split_randomly(table, 0.25, seed=1)
    assert len(aside) == 10
    assert sorted([*remaining, *aside]) == list(range(40))
    assert (np.diff(aside) > 0).all()
    assert split_randomly(table, 0.25, seed=1)[1].tolist() == aside.tolist()
    assert split_randomly(table, 0.25, seed=2)[1].tolist() != aside.tolist()


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.99, 2)])
def test_split_randomly__leaves_a_picture_on_either_side(table: DetectionTable, fraction: float, count: int) -> None:
    assert len(split_randomly(table, fraction, seed=0)[1]) == count


def test_split_randomly__one_picture(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few to set one aside"):
        split_randomly(make_table(tmp_path, [Picture(20, 30)], write=False), 0.5, seed=0)


def test_count_shared__by_path(table: DetectionTable, tmp_path: Path) -> None:
    assert count_shared(table, take_pictures(table, np.array([1, 2]))) == 2
    elsewhere = make_table(tmp_path / "other", [Picture(20, 30)] * 3, write=False)
    assert count_shared(table, elsewhere) == 0
