import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_convnext_det.data.formats.discovery import find_splits, read_split
from lightning_convnext_det.data.synthetic import CLASS_NAMES, USUAL_COLOURS, Scene, draw_scene, write_synthetic_coco
from lightning_convnext_det.errors import DataError


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(np.random.default_rng(seed), 160 + seed % 50, 200) for seed in range(80)]


def test_boxes__touch_the_outermost_visible_pixels(scenes: list[Scene]) -> None:
    for scene in scenes:
        for mask, (x1, y1, x2, y2) in zip(scene.masks, scene.boxes().tolist(), strict=True):
            inside = mask[y1:y2, x1:x2]
            assert inside.sum() == mask.sum() > 0  # nothing outside the box
            assert inside[0].any()  # and nothing to spare on any side
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def test_draw_scene__visible_pixels_belong_to_one_object(scenes: list[Scene]) -> None:
    assert all(scene.masks.sum(axis=0).max(initial=0) <= 1 for scene in scenes)


def test_draw_scene__objects_differ_from_what_they_cover() -> None:
    for seed in range(40):
        scene = draw_scene(np.random.default_rng(seed), 200, 200)
        for mask in scene.masks:
            ys, xs = np.nonzero(mask)
            rim = ~scene.masks.any(axis=0)
            rim[: ys.min()] = rim[ys.max() + 1 :] = rim[:, : xs.min()] = rim[:, xs.max() + 1 :] = False
            if rim.sum() > 50 and mask.sum() > 200:
                distance = np.abs(scene.image[mask].mean(axis=0) - scene.image[rim].mean(axis=0)).max()
                assert distance > 10  # of 255, however unlike the background is elsewhere


def test_draw_scene__looks_like_a_task(scenes: list[Scene]) -> None:
    counts = [len(scene.labels) for scene in scenes]
    assert counts.count(0) >= 1
    assert max(counts) >= 6
    assert set(np.concatenate([scene.labels for scene in scenes])) == set(range(len(CLASS_NAMES)))
    corners = np.concatenate([scene.boxes() for scene in scenes])
    sides = (corners[:, 2:] - corners[:, :2]).max(axis=1)
    assert np.percentile(sides, 5) < 32  # COCO's small objects are there
    assert np.percentile(sides, 95) > 60


def test_draw_scene__the_usual_colour_does_not_tell_the_class() -> None:
    usual = np.array([USUAL_COLOURS[name] for name in CLASS_NAMES], np.float64)
    usual /= np.linalg.norm(usual, axis=1, keepdims=True)
    right = []
    for seed in range(150):
        scene = draw_scene(np.random.default_rng(seed), 96, 96)
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            right.append(int((usual @ scene.image[mask].mean(axis=0)).argmax()) == label)
    assert 0.6 < np.mean(right) < 0.95  # a hint, as with things in a photo, but no more


def test_write_synthetic_coco__is_read_without_a_problem(tmp_path: Path) -> None:
    root = write_synthetic_coco(tmp_path / "set", 12, 4, 2)
    splits = find_splits(root)
    assert {name: len(read_split(split)) for name, split in splits.items()} == {"train": 12, "val": 4, "test": 2}
    table = read_split(splits["train"])
    assert table.class_names == CLASS_NAMES
    assert table.problems == ()
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    assert len(table.boxes) == len(content["annotations"]) > 12
    for index in range(12):
        with Image.open(table.path(index)) as image:
            assert (image.height, image.width) == tuple(table.sizes[index])


def test_write_synthetic_coco__same_seed_same_files(tmp_path: Path) -> None:
    folders = [write_synthetic_coco(tmp_path / name, count, 2, seed=3) for name, count in (("a", 3), ("b", 5))]
    other = write_synthetic_coco(tmp_path / "c", 3, 2, seed=4)
    for name in ("train/000002.jpg", "val/000001.jpg"):
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second
        assert (other / name).read_bytes() != first


def test_write_synthetic_coco__folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    with pytest.raises(DataError, match="exists already"):
        write_synthetic_coco(tmp_path, 1, 1)
