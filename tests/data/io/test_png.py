from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.io.png import check_chunks, find_late_exif
from lightning_convnext_det.errors import DataError


def test_check_chunks__every_flipped_bit_of_the_pixels_is_found(tmp_path: Path) -> None:
    """Pillow alone takes some of them, with other pixels: it does not compare checksums."""
    path = tmp_path / "a.png"
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(path)
    good = path.read_bytes()
    start = good.index(b"IDAT")
    end = good.index(b"IEND") - 8
    for place in range(start, end, 7):
        damaged = bytearray(good)
        damaged[place] ^= 4
        with pytest.raises(ValueError):
            check_chunks(BytesIO(damaged))
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"\[LCD-I002\] .*a\.png: .*damaged.*checksum"):
        read_image(path)


def test_check_chunks__real_files(shared_data: Path) -> None:
    files = sorted((shared_data / "quirks").rglob("*.png"))
    checked = 0
    for path in files:
        with open(path, "rb") as file:
            if file.read(8) == b"\x89PNG\r\n\x1a\n" and path.name not in ("broken.png", "truncated_image.png"):
                check_chunks(file)
                assert file.tell() == 8
                checked += 1
    assert checked > 3


@pytest.mark.parametrize("length", [8, 20, 100, -1, -13])
def test_check_chunks__cut_short(write_image: Callable[..., Path], tmp_path: Path, length: int) -> None:
    content = write_image(tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="ends before"):
        check_chunks(BytesIO(content[:length]))


def test_find_late_exif__none(write_image: Callable[..., Path], tmp_path: Path) -> None:
    content = write_image(tmp_path / "a.png", orientation=6).read_bytes()
    assert find_late_exif(BytesIO(content)) == b""  # Pillow writes it before the pixels
    assert find_late_exif(BytesIO(b"")) == b""


def test_check_chunks__length_of_a_chunk_beyond_the_file(write_image: Callable[..., Path], tmp_path: Path) -> None:
    content = bytearray(write_image(tmp_path / "a.png").read_bytes())
    content[8:12] = b"\xff\xff\xff\xf0"
    with pytest.raises(ValueError, match="ends before"):
        check_chunks(BytesIO(content))
