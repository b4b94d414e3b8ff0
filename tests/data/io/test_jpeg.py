import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_convnext_det.data.io import decode
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.io.jpeg import decode_jpeg
from lightning_convnext_det.errors import DataError

pytest.importorskip("simplejpeg")


def photo(height: int, width: int) -> Image.Image:
    """Smooth colours with some noise, which subsampling of the colours blurs."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], axis=-1)
    pixels += np.random.default_rng(0).integers(-9, 10, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "keep_rgb"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(64, 48), (37, 51), (2, 3)])
def test_decode_jpeg__bits_of_pillow(subsampling: str, progressive: bool, size: tuple[int, int]) -> None:
    kind = {"keep_rgb": True} if subsampling == "keep_rgb" else {"subsampling": subsampling}
    content = encoded(photo(*size), quality=83, progressive=progressive, **kind)

    decoded = decode_jpeg(Image.open(BytesIO(content)))

    assert decoded is not None
    assert np.array_equal(decoded, np.asarray(Image.open(BytesIO(content))))


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.new("L", (9, 8), 77)),
        encoded(Image.new("CMYK", (9, 8), (10, 20, 30, 40))),
        encoded(photo(64, 48))[:-40],
        encoded(photo(64, 48))[:-2],  # nothing but the end marker is missing
    ],
    ids=["grey", "cmyk", "cut_short", "no_end_marker"],
)
def test_decode_jpeg__left_to_pillow(content: bytes) -> None:
    image = Image.open(BytesIO(content))

    assert decode_jpeg(image) is None
    assert loaded(image) == loaded(Image.open(BytesIO(content)))  # Pillow goes on as if nothing had read the file


def loaded(image: Image.Image) -> bytes | str:
    try:
        return image.tobytes()
    except OSError as error:
        return str(error)


def test_read_image__damaged_jpeg_as_by_pillow(
    tmp_path: Path, write_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [write_image(tmp_path / "a.jpg", 40, 50).read_bytes(), encoded(photo(40, 50), progressive=True)]
    chance = random.Random(0)
    outcomes: list[list[object]] = [[], []]
    for number in range(120):
        content = bytearray(good[number % 2])
        for _ in range(chance.choice([0, 1, 3])):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (tmp_path / "b.jpg").write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
        for fast, found in zip((True, False), outcomes, strict=True):
            monkeypatch.setattr(decode, "decode_jpeg", decode_jpeg if fast else lambda _: None)
            try:
                found.append(read_image(tmp_path / "b.jpg", max_pixels=10**6))
            except DataError as error:
                found.append(str(error))
    for fast, slow in zip(*outcomes, strict=True):
        assert type(fast) is type(slow)
        assert torch.equal(fast, slow) if isinstance(fast, torch.Tensor) else fast == slow  # type: ignore[arg-type]
    assert 20 < sum(isinstance(found, torch.Tensor) for found in outcomes[0]) < 100


def test_read_image__layout_of_memory(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for orientation in (1, 3, 6):
        image = read_image(write_image(tmp_path / f"{orientation}.jpg", 40, 50, orientation=orientation))

        assert image.permute(1, 2, 0).is_contiguous()
