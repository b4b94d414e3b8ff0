"""Bilinear resizing of 8-bit images, to the same bits as OpenCV and Pillow.

OpenCV (``cv2.resize`` with ``INTER_LINEAR``, imgproc/src/resize.cpp) interpolates 8-bit images in integers: weights of
11 bits, 4 bits dropped between the two passes. Interpolation in floating point changes one value in eight by one level,
which detectors trained on such images notice. Pillow (``Image.resize`` with ``BILINEAR``, libImaging/Resample.c)
averages over as many pixels as a new one covers, row by row and then column by column, with weights of 22 bits; for
some sizes smaller than the image Pillow 13 begins with the columns, which changes values by one level.
"""

import torch
from torch import Tensor

from lightning_convnext_det.ops.host_numbers import send

_WEIGHT_BITS = 11  # INTER_RESIZE_COEF_BITS
_PILLOW_BITS = 22  # PRECISION_BITS


def resize_like_opencv(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an 8-bit image bilinearly without antialiasing, bit-equal to OpenCV.

    >>> import torch
    >>> image = torch.tensor([[[0, 100], [200, 40]]], dtype=torch.uint8)
    >>> resize_like_opencv(image, (2, 3)).tolist()
    [[[0, 50, 100], [200, 120, 40]]]

    Args:
        image: uint8 [C, H, W].
        size: height and width of the result.

    Returns:
        uint8 [C, height, width] on the device of ``image``.

    Raises:
        TypeError: if ``image`` is not uint8.
        ValueError: if ``image`` is not [C, H, W] or a side is empty.
    """
    _check(image, size)
    (top, bottom), (above, below) = _neighbours(image.shape[1], size[0])
    (left, right), (before, after) = _neighbours(image.shape[2], size[1])
    # at the left and right border OpenCV sets the weights, at the top and bottom it repeats the row
    before, after = torch.where(left == right, 1 << _WEIGHT_BITS, before), torch.where(left == right, 0, after)
    rows, place = torch.unique(torch.cat((top, bottom)), return_inverse=True)
    rows, place, left, right, before, after, above, below = (
        send(numbers, image.device) for numbers in (rows, place, left, right, before, after, above, below)
    )
    pixels = image[:, rows].to(torch.int32)  # only the rows that are needed [C, R, W]
    pixels = (pixels[:, :, left] * before + pixels[:, :, right] * after) >> 4  # [C, R, width]
    upper = pixels[:, place[: size[0]]] * above[:, None] >> 16
    lower = pixels[:, place[size[0] :]] * below[:, None] >> 16
    return ((upper + lower + 2) >> 2).to(torch.uint8)


def resize_like_pillow(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an 8-bit image bilinearly with antialiasing, to the same bits as Pillow before 13.

    >>> import torch
    >>> image = torch.tensor([[[0, 100, 200, 40], [200, 40, 0, 0]]], dtype=torch.uint8)
    >>> resize_like_pillow(image, (2, 2)).tolist()
    [[[71, 117], [103, 6]]]

    Args:
        image: uint8 [C, H, W].
        size: height and width of the result.

    Returns:
        uint8 [C, height, width] on the device of ``image``.

    Raises:
        TypeError: if ``image`` is not uint8.
        ValueError: if ``image`` is not [C, H, W] or a side is empty.
    """
    _check(image, size)
    columns = _average(image, size[1])  # [C, H, width]
    return _average(columns.transpose(1, 2), size[0]).transpose(1, 2).contiguous()


def _average(image: Tensor, new_length: int) -> Tensor:
    """Resize the last axis of an 8-bit image."""
    length = image.shape[-1]
    if new_length == length:
        return image
    scale = length / new_length
    support = max(scale, 1.0)
    center = (torch.arange(new_length, dtype=torch.float64) + 0.5) * scale
    first = (center - support + 0.5).to(torch.int64).clamp(min=0)
    end = (center + support + 0.5).to(torch.int64).clamp(max=length)
    taps = [first + i for i in range(int((end - first).max()))]
    weights = [
        (1 - ((tap - center + 0.5) * (1.0 / support)).abs()).clamp(min=0) * (tap < end) for tap in taps
    ]  # [new_length] each
    total = sum(weights)  # one after the other, as Pillow rounds
    whole = torch.full((*image.shape[:-1], new_length), 1 << (_PILLOW_BITS - 1), dtype=torch.int32, device=image.device)
    for tap, weight in zip(taps, weights, strict=True):
        integer = (weight / total * (1 << _PILLOW_BITS) + 0.5).to(torch.int32)
        whole += image[..., send(tap.clamp(max=length - 1), image.device)] * send(integer, image.device)
    return (whole >> _PILLOW_BITS).clamp(0, 255).to(torch.uint8)


def _check(image: Tensor, size: tuple[int, int]) -> None:
    if image.dtype != torch.uint8:
        raise TypeError(f"image is {image.dtype}; expected uint8")
    if image.dim() != 3 or 0 in image.shape or min(size) < 1:
        raise ValueError(f"cannot resize {list(image.shape)} to {list(size)}; expected [channels, height, width]")


def _neighbours(length: int, new_length: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Indices and integer weights of the two pixels around each new one, each int [new_length]."""
    scale = 1.0 / (new_length / length)  # in this order, as OpenCV rounds
    centre = (torch.arange(new_length, dtype=torch.float64) + 0.5) * scale - 0.5
    position = centre.to(torch.float32)
    first = position.floor()
    fraction = position - first
    weights = [(w * (1 << _WEIGHT_BITS)).round().to(torch.int32) for w in (1 - fraction, fraction)]
    indices = [(first.to(torch.int64) + i).clamp(0, length - 1) for i in (0, 1)]
    return (indices[0], indices[1]), (weights[0], weights[1])
