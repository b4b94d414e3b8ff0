"""Tiles are compared with what is drawn: a detector that sees colours finds every object of an image exactly."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_convnext_det.data.io.regions import open_regions
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.tiling import TiledDetector
from lightning_convnext_det.ops.window_merging import TileMerge
from tests.models.color_detector import ColorDetector, draw, found_boxes

MERGES: tuple[TileMerge, ...] = ("nmm", "nms", "wbf")


@pytest.mark.heavy
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "windows"])
@pytest.mark.parametrize("merge", MERGES)
def test_tiled_detector__finds_an_object_at_every_offset_across_a_seam_once(merge: TileMerge, whole: bool) -> None:
    detector = TiledDetector(ColorDetector(), tile=50, overlap=0.2, merge=merge, whole=whole)
    for offset in range(84):  # windows begin at 0, 34 and 67 columns and at 0, 38 rows
        box = (offset, min(offset, 70), offset + 14, min(offset, 70) + 9)
        assert found_boxes(detector([draw(88, 117, [box])])[0]) == [box]


@pytest.mark.parametrize("side", range(2, 90, 7))
def test_tiled_detector__joins_the_parts_of_an_object_larger_than_a_window(side: int) -> None:
    detector = TiledDetector(ColorDetector(), tile=40, overlap=0.2, whole=False)
    box = (13, 9, 13 + side, 9 + side)
    assert found_boxes(detector([draw(110, 120, [box])])[0]) == [box]


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "windows"])
def test_tiled_detector__keeps_neighbours_apart_at_every_offset(merge: TileMerge, whole: bool) -> None:
    detector = TiledDetector(ColorDetector(), tile=50, overlap=0.2, merge=merge, whole=whole)
    for offset in range(0, 80, 3):
        # of one class and touching: side by side, below each other, and one that begins inside the other's box
        boxes = [(offset, 30, offset + 9, 42), (offset + 9, 30, offset + 20, 42), (offset, 42, offset + 9, 50)]
        assert found_boxes(detector([draw(60, 117, boxes)])[0]) == sorted(boxes)


def test_tiled_detector__keeps_classes_apart() -> None:
    image = draw(60, 117, [(40, 10, 60, 30)], label=1)
    image[:, 30:50, 40:60] = torch.tensor([0, 9, 2], dtype=torch.uint8)[:, None, None]
    found = TiledDetector(ColorDetector(), tile=50)([image])[0]
    assert sorted(found["labels"].tolist()) == [1, 2]


@pytest.mark.heavy
def test_tiled_detector__sees_small_objects_of_a_large_image() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = 160 * torch.cartesian_prod(torch.arange(25), torch.arange(25))
    corners = corners + torch.randint(120, corners.shape, generator=generator)
    boxes = [(x, y, x + 30, y + 30) for x, y in corners.tolist()]
    image = draw(4000, 4000, boxes)
    detector = ColorDetector(side=800, smallest=16)  # as if resized to 800 pixels, where 30 become 6
    assert len(detector([image])[0]["boxes"]) == 0
    found = TiledDetector(detector, tile=640)([image])[0]
    assert found_boxes(found) == sorted(boxes)
    assert (found["scores"].diff() <= 0).all()


@pytest.mark.heavy
def test_tiled_detector__gives_small_images_to_the_detector_as_they_are() -> None:
    torch.manual_seed(0)
    detector = FasterRCNN(3, backbone="test_convnext", min_size=64, max_size=96, score_threshold=0.0).eval()
    images = [torch.rand(3, 80, 64), torch.randint(256, (3, 50, 80), dtype=torch.uint8)]
    with torch.no_grad():
        plain, tiled = detector(images), TiledDetector(detector, tile=80)(images)
    for one, other in zip(plain, tiled, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "labels", "scores"))
    assert len(plain[0]["boxes"]) > 0


def test_tiled_detector__keeps_the_order_of_small_and_large_images() -> None:
    detector = ColorDetector()
    images = [draw(60, 90, [(70, 5, 80, 15)]), draw(20, 20, [(1, 2, 9, 8)]), draw(90, 60, [(5, 70, 15, 80)])]
    found = TiledDetector(detector, tile=50, batch_size=3)(images)
    assert [found_boxes(d) for d in found] == [[(70, 5, 80, 15)], [(1, 2, 9, 8)], [(5, 70, 15, 80)]]
    assert set(detector.seen) == {(50, 50), (60, 90), (90, 60), (20, 20)}


def test_tiled_detector__without_objects() -> None:
    found = TiledDetector(ColorDetector(), tile=50)([draw(60, 90, [])])[0]
    assert (found["boxes"].shape, found["labels"].dtype, found["scores"].dtype) == ((0, 4), torch.int64, torch.float32)


def test_tiled_detector__refuses_an_overlap_of_one() -> None:
    with pytest.raises(ValueError, match=r"overlap is 1\.0; it must be at least 0 and below 1"):
        TiledDetector(ColorDetector(), overlap=1.0)


@pytest.mark.parametrize("whole", [True, False])
def test_tiled_detector__regions_of_a_file(tmp_path: Path, whole: bool) -> None:
    pytest.importorskip("rasterio")
    boxes = [(10, 12, 20, 22), (44, 40, 60, 51), (90, 60, 116, 86)]
    image = draw(88, 117, boxes)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.tif", compression="tiff_lzw")
    regions = open_regions(tmp_path / "a.tif", 50)
    assert regions is not None
    detector = TiledDetector(ColorDetector(), tile=50, whole=whole)
    found, expected = detector([regions, image])
    assert all(torch.equal(found[key], expected[key]) for key in ("boxes", "labels", "scores"))


def test_tiled_detector__boxes_of_the_reduced_image_are_scaled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rasterio")
    monkeypatch.setattr("lightning_convnext_det.data.io.regions._OVERVIEW_SIDE", 58)
    image = draw(88, 117, [(20, 10, 90, 80)])
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.tif")
    found = TiledDetector(ColorDetector(), tile=30)([open_regions(tmp_path / "a.tif", 30)])[0]
    torch.testing.assert_close(found["boxes"], torch.tensor([[20.0, 10.0, 90.0, 80.0]]), atol=2, rtol=0)
