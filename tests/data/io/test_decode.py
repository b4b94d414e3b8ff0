import json
import random
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lightning_convnext_det.data.formats.discovery import find_splits, read_split
from lightning_convnext_det.data.io import decode as images
from lightning_convnext_det.data.io.decode import (
    MAX_PIXELS,
    read_header,
    read_image,
    read_size,
    to_rgb_tensor,
    verify_image,
)
from lightning_convnext_det.errors import DataError

QUIRKS = Path(__file__).parents[3] / ".." / "shared" / "data" / "quirks"
MANIFEST = json.loads((QUIRKS / "MANIFEST.json").read_text()) if QUIRKS.is_dir() else []
REFUSED = {"broken.png": "LCD-I001", "truncated_image.png": "LCD-I002", "truncated_jpeg.jpg": "LCD-I002"}
WARNED = {"i_trns.png": "LCD-I010", "iss634.gif": "LCD-I014"}


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_warned", set())


def reference(path: Path) -> np.ndarray:
    """The image as Pillow's own functions turn and convert it."""
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")
        if image.mode == "I;16":
            return np.repeat(np.rint(np.asarray(image) / 257)[..., None], 3, axis=2).astype(np.uint8)
        upright = ImageOps.exif_transpose(image)
        return np.asarray((upright.convert("RGBA") if upright.mode == "P" else upright).convert("RGB"))


@pytest.mark.heavy
@pytest.mark.skipif(not MANIFEST, reason="the real images are not here")
@pytest.mark.parametrize("entry", MANIFEST, ids=lambda entry: entry["file"])
def test_read_image__manifest(entry: dict[str, object]) -> None:
    """Every odd file that was collected is read right or refused by name."""
    path = QUIRKS / str(entry["file"])
    if path.suffix == ".txt":
        table = read_split(find_splits(path.parent)["train"], class_names=["a", "b", "cell"], exif="raw", collect=True)
        index = [table.path(i).stem for i in range(len(table))].index(path.stem)
        _, x, y, width, height = map(float, path.read_text().split())
        box = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2]) * np.tile(
            table.sizes[index][::-1], 2
        )
        np.testing.assert_allclose(table.boxes[table.rows(index)], [box], atol=1e-3)
        assert not table.problems
        return
    if code := REFUSED.get(path.name):
        with pytest.raises(DataError, match=rf"\[{code}\] .*{path.name}: "):
            read_image(path)
        return
    if code := WARNED.get(path.name):
        with pytest.warns(UserWarning, match=rf"\[{code}\] .*{path.name}"):
            image = read_image(path)
    else:
        image = read_image(path)
    size = read_size(path)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), reference(path))
    assert size.upright == tuple(image.shape[1:])
    if "raw_size" in entry:
        assert [size.width, size.height] == entry["raw_size"]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("LA", (90, 0), (90, 90, 90)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("I;16", 40 * 257, (40, 40, 40)),
        ("I", 65535, (255, 255, 255)),
        ("HSV", (0, 0, 77), (77, 77, 77)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.filterwarnings("ignore:.LCD-I010")
def test_to_rgb_tensor__modes(mode: str, colour: object, expected: tuple[int, int, int]) -> None:
    pixels = to_rgb_tensor(Image.new(mode, (5, 3), colour))

    assert pixels.dtype == torch.uint8
    assert pixels.permute(1, 2, 0).is_contiguous()
    assert torch.equal(pixels, torch.tensor(expected, dtype=torch.uint8)[:, None, None].expand(3, 3, 5))


def test_read_image__palette_with_transparent_colours(tmp_path: Path) -> None:
    """Pillow warns of such files on conversion; the colours under the transparency are kept."""
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "a.png", transparency=bytes([255, 0]))

    assert read_image(tmp_path / "a.png")[:, 0, 0].tolist() == [200, 100, 50]


def test_read_image__sixteen_bit_ramp_keeps_its_mean_and_warns_once(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(32, 32)
    for name in ("a.png", "b.png"):
        Image.fromarray(ramp).save(tmp_path / name)

    with pytest.warns(UserWarning, match="LCD-I010") as caught:
        images = [read_image(tmp_path / name) for name in ("a.png", "b.png")]

    assert len(caught) == 1
    assert abs(images[0].double().mean() - 127.5) < 0.1
    assert np.array_equal(images[1][2].numpy(), np.rint(ramp / 257))


def test_read_image__pixels_that_are_no_colours(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 70000, np.int32)).save(tmp_path / "int.tif")

    for read in (read_image, read_size):
        with pytest.raises(DataError, match=r"\[LCD-I011\].*float.tif: the pixels are floats"):
            read(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"\[LCD-I011\].*int.tif: .*from 70000 to 70000"):
        read_image(tmp_path / "int.tif")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_read_image__exif_orientation(
    tmp_path: Path, write_image: Callable[..., Path], orientation: int, suffix: str
) -> None:
    path = write_image(tmp_path / f"a{suffix}", 10, 7, orientation)
    with Image.open(path) as image:
        raw = np.asarray(image.convert("RGB"))

    assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), reference(path))
    assert np.array_equal(read_image(path, upright=False).permute(1, 2, 0).numpy(), raw)
    assert read_size(path) == (10, 7, orientation if 1 <= orientation <= 8 else 1)
    with Image.open(path) as image:
        assert torch.equal(to_rgb_tensor(image), read_image(path))


def test_read_image__tiff_is_turned_by_its_decoder(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    path = write_image(tmp_path / "a.tif", 10, 7, orientation=6)

    assert read_size(path) == (7, 10, 1)
    assert read_image(path).shape == read_image(path, upright=False).shape == (3, 7, 10)
    assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), reference(path))


def test_read_image__tiff_with_an_orientation_in_xmp(tmp_path: Path) -> None:
    """Its decoder turns it by that, too; it is not turned twice."""
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={700: b'<x tiff:Orientation="3"/>'})

    assert read_size(tmp_path / "a.tif") == (4, 5, 1)
    assert np.array_equal(read_image(tmp_path / "a.tif").permute(1, 2, 0).numpy(), pixels[::-1, ::-1])


def test_read_size__png_with_exif_behind_the_pixels(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    content = write_image(tmp_path / "a.png", 10, 7).read_bytes()
    exif = b"eXIf" + b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x08\x00\x00\x00\x00\x00\x00"
    chunk = struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif))
    (tmp_path / "a.png").write_bytes(content[:-12] + chunk + content[-12:])

    assert read_size(tmp_path / "a.png") == (10, 7, 8)
    assert np.array_equal(read_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), reference(tmp_path / "a.png"))


@given(st.binary(max_size=60))
def test_to_rgb_tensor__any_exif(noise: bytes) -> None:
    """A damaged block leaves the image as it is stored, or turns it; it is no error."""
    for block in (noise, b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + noise, b"Exif\x00\x00MM\x00*" + noise):
        image = Image.new("RGB", (5, 3))
        image.info["exif"] = block
        assert set(to_rgb_tensor(image).shape[1:]) == {3, 5}


def bomb(path: Path, side: int) -> None:
    """An image of one grey, compressed about a thousand times."""
    row = zlib.compressobj(9)
    rows = b"".join(row.compress(b"\x00" * (side // 8 + 1)) for _ in range(side)) + row.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.heavy
@pytest.mark.parametrize("side", [10_000, 20_000], ids=["pillow_warns", "pillow_refuses"])
@pytest.mark.parametrize("filters", ["error", "ignore"])
def test_read_image__decompression_bomb(tmp_path: Path, side: int, filters: str) -> None:
    bomb(tmp_path / "a.png", side)
    assert (tmp_path / "a.png").stat().st_size < 60_000

    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        before = list(warnings.filters)
        for read in (read_image, read_size):
            with pytest.raises(DataError, match=r"\[LCD-I023\].*a.png: .*pixels"):
                read(tmp_path / "a.png")
        assert warnings.filters == before
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


def test_read_image__max_pixels(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    path = write_image(tmp_path / "a.png", 10, 10)

    assert read_image(path, max_pixels=100).shape == (3, 10, 10)
    with pytest.raises(DataError, match="10x10 is 100 pixels, more than max_pixels = 99"):
        read_image(path, max_pixels=99)


@pytest.mark.parametrize(
    ("width", "height", "code"),
    [
        (1, 1, "LCD-I022"),
        (2000, 1, "LCD-I022"),
        (2000, 3, "LCD-I021"),
        (3, 2000, "LCD-I021"),
        (2, 2, None),
        (400, 2, None),
    ],
)
def test_read_size__unusable_shapes(tmp_path: Path, width: int, height: int, code: str | None) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (width, height)).save(path)

    if code is None:
        assert read_size(path)[:2] == (height, width)
    else:
        with pytest.raises(DataError, match=rf"\[{code}\] .*a.png: {width}x{height}"):
            read_size(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"\[LCD-I001\].*the file is empty"),
        (b"<!DOCTYPE html><html></html>", r"\[LCD-I001\].*begins with b'<!DOCTYPE ht'"),
        (b"GIF89a\x00\x00\x00\x00\x00\x00\x00", r"\[LCD-I0"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", r"\[LCD-I001\]"),
        (b"P5 0 0 255\n", r"\[LCD-I0"),
    ],
    ids=["empty", "html", "gif_0x0", "postscript", "pgm_0x0"],
)
def test_read_image__no_image(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)

    for read in (read_image, read_size):
        with pytest.raises(DataError, match=match):
            read(tmp_path / "a.jpg")


def test_read_image__missing_or_unreadable_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\[LCD-I003\] .*none.jpg: no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(DataError, match=r"\[LCD-I003\].*Is a directory"):
        read_image(tmp_path)
    with pytest.raises(DataError, match=r"\[LCD-I003\].*null byte"):
        read_image("a\0b.jpg")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"])
@pytest.mark.filterwarnings("ignore")
def test_read_image__flipped_bits_end_in_a_image_or_an_error(
    tmp_path: Path, write_image: Callable[..., Path], suffix: str
) -> None:
    content = write_image(tmp_path / f"a{suffix}", 40, 50).read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(40):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (tmp_path / f"b{suffix}").write_bytes(damaged[: chance.choice([len(content), len(content) // 2])])
        try:
            image = read_image(tmp_path / f"b{suffix}", max_pixels=10**6)
        except DataError:
            refused += 1
        else:
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3
    assert refused >= 10  # at least those cut in half


def test_read_header__format_named_wrongly(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.jpg")

    header = read_header(tmp_path / "b.jpg")

    assert (header.format, header.mode, header.animated) == ("PNG", "RGB", False)
    assert header.suits(".PNG")
    assert not header.suits(".jpg")


def test_verify_image__every_flipped_bit_of_a_png_is_found(tmp_path: Path) -> None:
    """Decoding finds some of them only: Pillow stops reading when it has enough pixels, before the checksums."""
    path = tmp_path / "a.png"
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(path)
    verify_image(path)
    good = path.read_bytes()
    for place in range(8, good.index(b"IEND") - 4):  # of the last chunk, its own length and checksum go unread
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(DataError, match=r"\[LCD-I0[0-9]{2}\] .*a\.png: "):
            verify_image(path)


@pytest.mark.parametrize("length", [8, 20, 100, -13])
def test_verify_image__png_cut_short(write_image: Callable[..., Path], tmp_path: Path, length: int) -> None:
    path = write_image(tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"\[LCD-I00[12]\] .*a\.png: "):
        verify_image(path)


def test_verify_image__real_files() -> None:
    files = [path for path in sorted(QUIRKS.rglob("*.png")) if path.name not in REFUSED]
    for path in files:
        verify_image(path)
    assert len(files) > 3 or not MANIFEST


def test_read_image__heic(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32, 0] = 255
    heif.from_bytes("RGB", (64, 48), pixels.tobytes()).save(str(tmp_path / "a.heic"), quality=-1)
    found = images.read_image(tmp_path / "a.heic")
    assert images.read_size(tmp_path / "a.heic")[:2] == (48, 64)
    assert found.shape == (3, 48, 64)
    assert (found.permute(1, 2, 0).numpy().astype(int) - pixels).__abs__().max() <= 2  # its colours are YCbCr
    assert ".heic" in images.IMAGE_SUFFIXES
