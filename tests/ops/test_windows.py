import numpy as np
import pytest
import torch

from lightning_convnext_det.ops.windows import find_cut_sides, tile_windows


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(("height", "width", "tile"), [(480, 640, 200), (1000, 1001, 333), (64, 4000, 640), (7, 9, 3)])
def test_tile_windows__cover_the_image_and_overlap_enough(height: int, width: int, tile: int, overlap: float) -> None:
    windows = tile_windows(height, width, tile, overlap)
    covered = np.zeros((height, width), np.int64)
    for left, top, right, bottom in windows:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert (right - left, bottom - top) == (min(tile, width), min(tile, height))
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    for starts in (sorted({w.left for w in windows}), sorted({w.top for w in windows})):
        steps = np.diff(starts)
        assert (steps <= max(1, int(tile * (1 - overlap) + 1e-9))).all()


def test_tile_windows__by_hand() -> None:
    assert tile_windows(50, 100, 100, 0.2) == [(0, 0, 100, 50)]
    assert [w.left for w in tile_windows(100, 260, 100, 0.2)] == [0, 80, 160]
    assert [w.left for w in tile_windows(100, 261, 100, 0.2)] == [0, 54, 107, 161]


def test_tile_windows__are_as_few_as_supervision_needs_for_the_same_overlap() -> None:
    supervision = pytest.importorskip("supervision")
    overlap, tile, height, width = 40, 200, 760, 1000
    offsets = supervision.InferenceSlicer._generate_offset((width, height), (tile, tile), (overlap, overlap))
    ours = tile_windows(height, width, tile, overlap / tile)
    assert len(ours) <= len(offsets)
    seen = np.zeros((height, width), bool)
    for x1, y1, x2, y2 in offsets:
        seen[y1:y2, x1:x2] = True
    assert seen.all()  # theirs covers the image too
    exact = tile_windows(680, 1000, tile, overlap / tile)  # 200 + n * 160: both need no rounding
    theirs = supervision.InferenceSlicer._generate_offset((1000, 680), (tile, tile), (overlap, overlap))
    whole = {tuple(window) for window in theirs.tolist() if window[2] - window[0] == window[3] - window[1] == tile}
    assert {tuple(window) for window in exact} == whole


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0.2), (100, 1.0), (100, -0.1)])
def test_tile_windows__refuse_values_out_of_range(tile: int, overlap: float) -> None:
    with pytest.raises(ValueError, match=r"tile is 0|overlap is"):
        tile_windows(100, 100, tile, overlap)


def test_find_cut_sides__borders_of_the_image_cut_nothing() -> None:
    windows = torch.tensor([[0.0, 0.0, 100.0, 100.0], [80.0, 0.0, 180.0, 100.0]])
    boxes = torch.tensor([[0.0, 0.0, 100.0, 100.0], [80.0, 0.0, 180.0, 100.0]])
    cut = find_cut_sides(boxes, windows, torch.tensor([180.0, 100.0]), 2.0)
    assert cut.tolist() == [[False, False, True, False], [True, False, False, False]]
    assert find_cut_sides(boxes[:0], windows[:0], torch.tensor([180.0, 100.0]), 2.0).shape == (0, 4)
