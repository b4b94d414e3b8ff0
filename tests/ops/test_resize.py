import importlib.util

import pytest
import torch
from torch import Tensor

from lightning_convnext_det.ops.resize import resize_like_opencv

SIZES = [(37, 53), (20, 100), (1, 1), (97, 91), (61, 47), (120, 94)]


@pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="opencv-python-headless is not installed")
@pytest.mark.parametrize("size", [*SIZES, (122, 94), (500, 333)])
def test_resize_like_opencv__same_bits(size: tuple[int, int], photos: list[Tensor]) -> None:
    import cv2

    noise = torch.randint(0, 256, (3, 61, 47), dtype=torch.uint8)
    for image in (noise, photos[0], torch.full((3, 5, 9), 255, dtype=torch.uint8)):
        expected = cv2.resize(image.permute(1, 2, 0).numpy(), size[::-1], interpolation=cv2.INTER_LINEAR)
        assert torch.equal(resize_like_opencv(image, size), torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("size", SIZES)
def test_resize_like_opencv__within_a_level_of_exact_interpolation(size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, 61, 47), dtype=torch.uint8)
    exact = torch.nn.functional.interpolate(image[None].double(), size=size, mode="bilinear", align_corners=False)[0]
    assert (resize_like_opencv(image, size) - exact).abs().max() < 1.01


def test_resize_like_opencv__same_size_and_flat_images_stay() -> None:
    image = torch.randint(0, 256, (3, 61, 47), dtype=torch.uint8)
    assert torch.equal(resize_like_opencv(image, (61, 47)), image)
    assert resize_like_opencv(torch.full((1, 7, 9), 201, dtype=torch.uint8), (50, 20)).unique().tolist() == [201]


def test_resize_like_opencv__mistakes() -> None:
    with pytest.raises(TypeError, match=r"image is torch\.float32; expected uint8"):
        resize_like_opencv(torch.rand(3, 4, 5), (2, 2))
    with pytest.raises(ValueError, match=r"cannot resize \[3, 4, 5\] to \[0, 2\]"):
        resize_like_opencv(torch.zeros(3, 4, 5, dtype=torch.uint8), (0, 2))
