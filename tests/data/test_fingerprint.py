import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import box_iou

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.annotations import DetectionAnnotations, count_offsets
from lightning_convnext_det.data.fingerprint import Quantiles, take_fingerprint
from lightning_convnext_det.data.formats.discovery import compare_objects
from tests.data.builders import Box, TinyImage, make_annotations


def random_annotations(seed: int, num_images: int, num_boxes: int, num_classes: int = 3) -> DetectionAnnotations:
    generator = np.random.default_rng(seed)
    image = np.sort(generator.integers(0, num_images, num_boxes))
    corner, side = generator.uniform(0, 60, (num_boxes, 2)), generator.uniform(1, 40, (num_boxes, 2))
    return DetectionAnnotations(
        image_root=Path(),
        file_names=np.array([b"%d.jpg" % i for i in range(num_images)]),
        image_ids=np.arange(num_images),
        sizes=generator.integers(100, 300, (num_images, 2)).astype(np.int32),
        upright=np.zeros(num_images, np.bool_),
        boxes=np.concatenate([corner, corner + side], axis=1).astype(np.float32),
        labels=generator.integers(0, num_classes, num_boxes),
        crowd=generator.random(num_boxes) < 0.1,
        area=side.prod(axis=1).astype(np.float32),
        annotation_ids=np.arange(num_boxes),
        offsets=count_offsets(image, num_images),
        class_names=tuple("abcdefgh"[:num_classes]),
        category_ids=tuple(range(num_classes)),
    )


def test_take_fingerprint__by_hand(tmp_path: Path) -> None:
    table = make_annotations(
        tmp_path,
        [
            TinyImage(100, 200, (Box((0, 0, 10, 40)), Box((0, 0, 10, 20)), Box((0, 0, 10, 38), label=1))),
            TinyImage(300, 150, (Box((0, 0, 30, 30), crowd=True),)),
        ],
        write=False,
    )

    found = take_fingerprint(table)

    assert (found.images, found.images_without_objects, found.objects, found.crowds) == (2, 1, 3, 1)
    assert found.objects_per_class == {"cat": 2, "dog": 1}
    assert found.shorter_side == Quantiles(100, 100, 100, 100, 100, 150)
    assert (found.image_aspect.p1, found.image_aspect.highest) == (0.5, 2.0)
    assert (found.box_side.highest, found.box_shorter_side.highest, found.box_aspect.p1) == (20.0, 10.0, 0.25)
    assert found.relative_side.highest == pytest.approx((400 / 20000) ** 0.5, abs=1e-4)
    assert found.side_per_class == {"cat": pytest.approx(200**0.5, abs=1e-4), "dog": pytest.approx(380**0.5, abs=1e-4)}
    assert found.share_per_class == {"cat": pytest.approx(0.1414, abs=1e-4), "dog": pytest.approx(0.1949, abs=1e-4)}
    assert (found.objects_per_image.p50, found.objects_per_image.highest) == (0, 3)
    windows = found.in_windows(100)
    assert windows.shorter_side == windows.longer_side == Quantiles(*[100] * 6)
    assert windows.image_aspect == Quantiles(*[1.0] * 6)
    assert windows.boxes.tolist() == [[10, 40, 100, 100], [10, 20, 100, 100], [10, 38, 100, 100]]
    assert found.in_windows(400).as_dict() == found.as_dict()
    # the two cats overlap by 200 / 400, which is not above 0.5; the dog is of another class
    assert (found.overlap.highest, found.crowded) == (0.5, 0.0)
    assert found.boxes.tolist() == [[10, 40, 200, 100], [10, 20, 200, 100], [10, 38, 200, 100]]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 30))
def test_take_fingerprint__overlaps_equal_torchvisions(seed: int, num_images: int, num_boxes: int) -> None:
    table = random_annotations(seed, num_images, num_boxes)
    expected = []
    for index in range(num_images):
        rows = table.rows(index)
        boxes, labels = torch.from_numpy(table.boxes[rows]).double(), table.labels[rows]
        for row in range(len(boxes)):
            others = [i for i in range(len(boxes)) if i != row and labels[i] == labels[row]]
            others = [i for i in others if not table.crowd[rows][i]]
            if not table.crowd[rows][row]:
                expected.append(float(box_iou(boxes[row : row + 1], boxes[others]).max()) if others else 0.0)

    found = take_fingerprint(table)

    assert found.overlap.highest == pytest.approx(max(expected, default=0), abs=1e-4)
    assert found.crowded == pytest.approx(np.mean(np.array(expected) > 0.5) if expected else 0, abs=1e-4)
    for name, label in zip("abc", range(3), strict=True):
        sides = table.boxes[(table.labels == label) & ~table.crowd].astype(np.float64)
        root = np.sort(np.sqrt((sides[:, 2:] - sides[:, :2]).prod(axis=1)))
        median = root[(len(root) - 1) // 2] if len(root) else 0
        assert found.side_per_class[name] == pytest.approx(median, abs=1e-3)


def test_take_fingerprint__without_images_or_boxes() -> None:
    found = take_fingerprint(random_annotations(0, 3, 0))
    assert (found.objects, found.images_without_objects, found.crowded) == (0, 3, 0.0)
    assert found.empty_classes == ["a", "b", "c"]
    assert found.boxes.shape == (0, 4)
    assert take_fingerprint(random_annotations(0, 1, 0)).shorter_side.p50 > 0


@pytest.mark.heavy
def test_take_fingerprint__of_100000_images_takes_seconds() -> None:
    table = random_annotations(0, 100_000, 700_000, num_classes=8)
    start = time.process_time()  # of this process alone, so no other load counts
    found = take_fingerprint(table)
    assert time.process_time() - start < 30  # about 2 s; the bound is for the slowest machine
    assert found.objects > 600_000


SPLITS = [
    ((0, 0), (0,), None),
    ((0,), (0, 1), "noted"),
    ((0,), (1, 1), "refused"),
    ((0, 1), (), None),
]


@pytest.mark.parametrize(("train", "val", "action"), SPLITS)
def test_compare_objects__of_classes_without_training_objects(
    train: tuple[int, ...], val: tuple[int, ...], action: str | None, tmp_path: Path
) -> None:
    first, second = (
        make_annotations(tmp_path, [TinyImage(50, 50, tuple(Box((0, 0, 9, 9), label) for label in labels))], False)
        for labels in (train, val)
    )
    problem = compare_objects(first, second, "val")
    assert (problem and problem.action) == action
    assert problem is None or "'dog'" in problem.reason


def test_check__json_has_fingerprint_and_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    for split, kind in (("train", 1), ("val", 2)):
        (tmp_path / split).mkdir()
        _write_image(tmp_path / split / "a.jpg", shade=kind)
        boxes = [{"id": 1, "image_id": 1, "category_id": kind, "bbox": [1, 2, 10, 20], "area": 200, "iscrowd": 0}]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))

    assert main(["check", str(tmp_path), "--json"]) == 3  # not clean: no class in common
    found = json.loads(capsys.readouterr().out)

    assert found["clean"] is False
    assert [problem["code"] for problem in found["problems"]] == ["LCD-D128"]
    assert found["splits"]["train"]["boxes_per_class"] == {"cat": 1, "dog": 0}
    assert found["splits"]["val"]["fingerprint"]["empty_classes"] == ["cat"]
    assert found["splits"]["val"]["fingerprint"]["box_side"]["p50"] == pytest.approx(200**0.5, abs=1e-4)


def _write_image(path: Path, shade: int) -> None:
    Image.new("RGB", (40, 30), (shade, 0, 0)).save(path)
