import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_convnext_det.data.annotations import DetectionAnnotations
from lightning_convnext_det.data.formats.problems import AnnotationProblems, Source
from lightning_convnext_det.data.formats.validation import validate_annotations
from lightning_convnext_det.errors import DataError
from tests.data.reading import Annotate, WriteCoco, found, read

BOXES = [
    ("inside", [1, 2, 30, 40], [], [1, 2, 31, 42]),
    ("minus_zero", [-0.0, 2, 30, 40], [], [0, 2, 30, 42]),
    ("whole_image", [0, 0, 64, 48], [], [0, 0, 64, 48]),
    ("below_one_pixel", [5, 5, 0.5, 0.3], [], [5, 5, 5.5, 5.3]),
    ("rounding", [0, 0, 64.01, 48.01], [], [0, 0, 64, 48]),
    ("overhang", [40, 20, 60, 20], [("LCD-D105", "clipped")], [40, 20, 64, 40]),
    ("overhang_mostly", [-50, -50, 60, 70], [("LCD-D105", "clipped")], [0, 0, 10, 20]),
    ("no_width", [5, 5, 0, 30], [("LCD-D101", "dropped")], None),
    ("no_height", [5, 5, 30, 0], [("LCD-D101", "dropped")], None),
    ("inverted", [5, 5, -3, 30], [("LCD-D102", "dropped")], None),
    ("outside", [500, 5, 30, 30], [("LCD-D104", "dropped")], None),
    ("outside_left", [-50, 5, 30, 30], [("LCD-D104", "dropped")], None),
    ("touches", [64, 5, 30, 30], [("LCD-D104", "dropped")], None),
    ("nearly_nothing", [5, 5, 1e-6, 30], [("LCD-D106", "dropped")], None),
    ("nearly_outside", [63.999, 5, 30, 30], [("LCD-D106", "dropped")], None),
    ("nan", [5, 5, float("nan"), 30], [("LCD-D103", "refused")], None),
    ("infinity", [5, 5, float("inf"), 30], [("LCD-D103", "refused")], None),
    ("repeated", [7, 7, 7, 7.5], [("LCD-D107", "dropped")], None),
]


@pytest.mark.parametrize(("box", "problems", "expected"), [row[1:] for row in BOXES], ids=[row[0] for row in BOXES])
def test_validate_annotations__boxes(
    write_coco: WriteCoco,
    annotate: Annotate,
    box: list[float],
    problems: list[tuple[str, str]],
    expected: list[float] | None,
) -> None:
    """One box among 200 good ones of other classes and places."""
    good = [annotate([1 + i % 60, 2 + i // 60, 2, 3], i, category_id=2) for i in range(2, 202)]
    path = write_coco([annotate(box, 1), annotate([7, 7, 7, 7.5], 777), *good])
    table = read(path)

    assert found(table) == problems
    kept = table.boxes[table.annotation_ids == 1]
    if box == [7, 7, 7, 7.5]:
        assert (table.annotation_ids == 777).sum() == 0  # the later one is the repetition
    elif expected is None:
        assert len(kept) == 0
    else:
        np.testing.assert_allclose(kept, [expected])
    if problems and box != [7, 7, 7, 7.5]:
        assert table.problems[0].record == "annotation 1 of '1.png'"
        assert table.problems[0].file == "annotations/instances_train.json"
    assert len(table.boxes) == 202 - sum(action != "clipped" for _, action in problems)
    refused = [code for code, action in problems if action in ("dropped", "refused")]
    if refused:
        with pytest.raises(
            DataError, match=rf"\[{refused[0]}\] annotations/instances_train.json: annotation (1|777) of"
        ):
            read(path, collect=False, invalid_annotations="refuse")
        assert [action for _, action in found(read(path, invalid_annotations="drop"))] == ["dropped"]


def test_validate_annotations__large_number_literal_is_not_finite(write_coco: WriteCoco, annotate: Annotate) -> None:
    path = write_coco([annotate([1, 2, 3, 4])])
    path.write_text(path.read_text().replace("[1, 2, 3, 4]", "[1, 2, 1e400, 4]"))

    with pytest.raises(DataError, match=r"\[LCD-D103\].*annotation 1 of '1.png': box \[1, 2, inf, 4\] is not finite"):
        read(path, collect=False)


def test_validate_annotations__clipped_box_says_how_much_it_loses(write_coco: WriteCoco, annotate: Annotate) -> None:
    (problem,) = read(write_coco([annotate([-50, -50, 60, 70])])).problems

    assert (
        problem.reason == "box [-50, -50, 60, 70] reaches out of its image of 64x48 by 50 px and loses 95% of its area"
    )


def test_validate_annotations__many_inverted_boxes_are_refused(write_coco: WriteCoco, annotate: Annotate) -> None:
    annotations = [annotate([30, 30, -5 if i < 2 else 5, 5 + i / 10], i) for i in range(100)]

    with pytest.raises(DataError, match=r"\[LCD-D102\] 2 records cannot be used") as error:
        read(write_coco(annotations), collect=False)
    assert "annotation 1 of '1.png': box [30, 30, -5, 5.1] is inverted; COCO expects x, y, width, height" in str(
        error.value
    )


def test_validate_annotations__corners_in_place_of_sides(write_coco: WriteCoco, annotate: Annotate) -> None:
    annotations = [annotate([10 + i, 10, 50 + i / 2, 40], i) for i in range(20)]

    with pytest.raises(DataError, match=r"\[LCD-D108\] annotations/instances_train.json: .*all fit if read as corners"):
        read(write_coco(annotations), collect=False)


def test_validate_annotations__relative_coordinates(write_coco: WriteCoco, annotate: Annotate) -> None:
    annotations = [annotate([0.1, 0.2, 0.3 + i / 100, 0.4], i) for i in range(20)]

    with pytest.raises(DataError, match=r"\[LCD-D113\].*they look relative to the image"):
        read(write_coco(annotations), collect=False)


def test_validate_annotations__repetitions(write_coco: WriteCoco, annotate: Annotate) -> None:
    """The same box of another class, another image, or as crowd is another object."""
    box = [1, 2, 3, 4]
    annotations = [
        annotate(box, 1),
        annotate(box, 2),
        annotate(box, 3, category_id=2),
        annotate(box, 4, image_id=2),
        annotate(box, 5, iscrowd=1),
        annotate(box, 6),
    ]

    table = read(write_coco(annotations, num_images=2))

    assert sorted(table.annotation_ids.tolist()) == [1, 3, 4, 5]
    assert [problem.record for problem in table.problems] == ["annotation 2 of '1.png'", "annotation 6 of '1.png'"]


BOX = st.tuples(*[st.floats(-200, 200) | st.sampled_from([0.0, 64.0, float("nan")])] * 4)


@settings(max_examples=60)
@given(annotated=st.lists(BOX, max_size=12))
def test_validate_annotations__every_box_is_kept_inside_or_reported(
    annotated: list[tuple[float, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Boxes end up in the image and of some area, or among the problems, and none in both."""
    root = tmp_path_factory.getbasetemp()
    count = len(annotated)
    boxes = np.array(annotated).reshape(-1, 4)
    annotations = DetectionAnnotations(
        root, np.array([b"a.png"]), np.array([1]), np.array([[48, 64]], np.int32), np.array([False]),
        np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), np.zeros(count, np.int64),
        np.zeros(count, np.bool_), np.zeros(count), np.arange(count), np.array([0, count]), ("a",), (1,),
    )  # fmt: skip
    source = Source("coco", root, ["a.png"], lambda index: ("f", ""), lambda row: ("f", str(row)))
    (root / "a.png").touch()

    table = validate_annotations(annotations, source, AnnotationProblems("drop"), check_images=False)

    assert (table.boxes >= 0).all()
    assert (table.boxes <= [64, 48, 64, 48]).all()
    assert (table.boxes[:, 2:] > table.boxes[:, :2]).all()
    gone = {int(problem.record) for problem in table.problems if problem.action == "dropped"}
    assert gone | set(table.annotation_ids.tolist()) == set(range(count))
    assert not gone & set(table.annotation_ids.tolist())
    for row, box in zip(table.annotation_ids, table.boxes, strict=True):
        x, y, width, height = annotated[row]
        np.testing.assert_allclose(box, np.clip([x, y, x + width, y + height], 0, [64, 48, 64, 48]), atol=1e-4)
