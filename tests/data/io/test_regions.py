"""Regions of TIFF files are compared with what Pillow decodes of the whole."""

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_convnext_det.data.batch import UnreadableImage
from lightning_convnext_det.data.dataset import ImageDataset
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.io.pixels import Channels, GreyRange
from lightning_convnext_det.data.io.regions import open_regions, reduce_for_drawing
from lightning_convnext_det.errors import DataError

rasterio = pytest.importorskip("rasterio")

HEIGHT, WIDTH = 90, 130


def write(path: Path, mode: str, **options: Any) -> Path:
    shape = {"L": (HEIGHT, WIDTH), "RGB": (HEIGHT, WIDTH, 3), "RGBA": (HEIGHT, WIDTH, 4), "I;16": (HEIGHT, WIDTH)}[mode]
    kind = np.uint16 if mode == "I;16" else np.uint8
    pixels = np.random.default_rng(0).integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_tiled(path: Path, height: int, width: int) -> Path:
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 3, "dtype": "uint8"}
    pixels = np.random.default_rng(1).integers(0, 256, (3, height, width), np.uint8)
    with (
        pytest.warns(rasterio.errors.NotGeoreferencedWarning),
        rasterio.open(path, "w", tiled=True, blockxsize=32, blockysize=16, compress="deflate", **profile) as file,
    ):
        file.write(pixels)
    return path


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_region_image__equals_pillow(tmp_path: Path, mode: str, channels: Channels, compression: str) -> None:
    path = write(tmp_path / "a.tif", mode, compression=compression, strip_size=1000)
    grey = GreyRange(100, 50_000, clip=True)
    image = open_regions(path, 64, channels, grey)
    assert image is not None
    whole = read_image(path, channels=channels, value_range=(100, 50_000))
    assert image.shape == tuple(whole.shape)
    for left, top, right, bottom in [(0, 0, WIDTH, HEIGHT), (10, 20, 74, 84), (129, 89, 130, 90)]:
        region = image.read(left, top, right, bottom)
        assert torch.equal(region, whole[:, top:bottom, left:right])
        assert region.is_contiguous()
    assert torch.equal(pickle.loads(pickle.dumps(image)).read(3, 4, 50, 60), whole[:, 4:60, 3:50])


def test_region_image__tiled(tmp_path: Path) -> None:
    path = write_tiled(tmp_path / "a.tiff", 100, 150)
    image = open_regions(str(path), 64)
    assert image is not None
    assert torch.equal(image.read(30, 15, 95, 80), read_image(path)[:, 15:80, 30:95])


def test_region_image__reduced_is_the_mean(tmp_path: Path) -> None:
    image = open_regions(write_tiled(tmp_path / "a.tif", 100, 200), 64)
    assert image is not None
    reduced = image.read(0, 0, 200, 100, longer_side=50)
    assert reduced.shape == (3, 25, 50)
    means = image.read(0, 0, 200, 100).double().unflatten(1, (25, 4)).unflatten(3, (50, 4)).mean((2, 4))
    assert (reduced - means).abs().max() <= 0.5 + 1e-6
    assert image.read(0, 0, 40, 20, longer_side=50).shape == (3, 20, 40)  # never enlarged


def test_open_regions__left_to_pillow(tmp_path: Path) -> None:
    assert open_regions(write(tmp_path / "small.tif", "RGB"), 130) is None
    assert open_regions(write(tmp_path / "other.png", "RGB"), 64) is None
    assert open_regions(write(tmp_path / "turned.tif", "RGB", tiffinfo={274: 6}), 64) is None
    Image.new("P", (WIDTH, HEIGHT)).save(tmp_path / "palette.tif")
    assert open_regions(tmp_path / "palette.tif", 64) is None
    pages = [Image.new("L", (WIDTH, HEIGHT))] * 2
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert open_regions(tmp_path / "pages.tif", 64) is None
    assert open_regions(tmp_path / "absent.tif", 64) is None
    (tmp_path / "empty.tif").write_bytes(b"II*\0")
    assert open_regions(tmp_path / "empty.tif", 64) is None


def test_region_image__damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", "RGB", compression="tiff_lzw", strip_size=1000)
    image = open_regions(path, 64)
    assert image is not None
    content = bytearray(path.read_bytes())
    content[8:3000] = bytes(2992)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"LCD-I002.*a\.tif.*damaged"):
        image.read(0, 0, WIDTH, HEIGHT)
    with pytest.raises(DataError, match=r"LCD-I002.*a\.tif.*damaged"):
        image.with_overview()


def test_open_regions__says_which_range_16_bits_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_convnext_det.data.io.decode._warned", set())
    with pytest.warns(UserWarning, match=r"LCD-I010.*a\.tif: 16-bit grey is scaled to 8 bits"):
        assert open_regions(write(tmp_path / "a.tif", "I;16"), 64) is not None


@pytest.mark.parametrize("tile", [None, 64])
def test_image_dataset__damaged_tiff_is_left_out(tile: int | None, tmp_path: Path) -> None:
    path = write(tmp_path / "cut.tif", "RGB", compression="tiff_lzw", strip_size=1000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2 - 2000) + content[-2000:])
    assert isinstance(ImageDataset([path], tile=tile)[0], UnreadableImage)


def test_open_regions__reduced_images_and_masks_in_the_file(tmp_path: Path) -> None:
    path = write_tiled(tmp_path / "a.tif", 100, 150)
    whole = read_image(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no georeference
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
            file.write_mask(np.full((100, 150), 255, np.uint8))
            file.build_overviews([2, 4])
    image = open_regions(path, 64)
    assert image is not None
    assert torch.equal(image.read(30, 15, 95, 80), whole[:, 15:80, 30:95])


def test_reduce_for_drawing__boxes_follow(tmp_path: Path) -> None:
    image = open_regions(write(tmp_path / "a.tif", "RGB"), 64)
    assert image is not None
    boxes = torch.tensor([[13.0, 9.0, 26.0, 90.0]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_convnext_det.data.io.regions._DRAWN_SIDE", 13)
        pixels, reduced = reduce_for_drawing(image, boxes)
    assert pixels.shape == (3, 9, 13)
    assert torch.allclose(reduced, boxes / 10)


_PEAK = """
import resource, sys
from lightning_convnext_det.data.io.regions import open_regions
image = open_regions(sys.argv[1], 640)
image.read(0, 0, 64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for top in range(0, 9_000, 500):
    image.read(top, top, top + 640, top + 640)
image.read(0, 0, *image.shape[:0:-1], longer_side=2048)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.heavy
def test_region_image__memory_of_100_million_pixels(tmp_path: Path) -> None:
    path = tmp_path / "large.tif"
    profile = {"driver": "GTiff", "height": 10_000, "width": 10_000, "count": 3, "dtype": "uint8", "sparse_ok": True}
    with (
        pytest.warns(rasterio.errors.NotGeoreferencedWarning),
        rasterio.open(path, "w", tiled=True, compress="deflate", **profile) as file,
    ):
        file.write(np.full((3, 640, 640), 9, np.uint8), window=rasterio.windows.Window(4_000, 4_000, 640, 640))
    found = subprocess.run([sys.executable, "-c", _PEAK, str(path)], stdout=subprocess.PIPE, check=True, timeout=300)
    assert int(found.stdout) < 150  # MB; the pixels alone are 286, and read_image refuses so many
