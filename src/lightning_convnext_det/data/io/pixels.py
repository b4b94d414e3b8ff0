"""Pixels of a decoded Pillow image as uint8 tensors: grey, RGB or RGBA, and 16-bit grey by its range of values."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_convnext_det.data.annotations import UnreadableError

if TYPE_CHECKING:
    from torch import Tensor  # imported where pixels become tensors: headers are read without torch's two seconds

Channels = Literal[1, 3, 4]
ValueRange = tuple[int, int]
"""Values of 16-bit grey that become 0 and 255."""
WHOLE_RANGE: ValueRange = (0, 65535)


class GreyRange(NamedTuple):
    """Values of 16-bit grey that become 0 and 255, and what happens to others."""

    low: int
    high: int
    clip: bool
    """Whether values outside become 0 or 255, or are an error."""


_MODES: dict[Channels, str] = {1: "L", 3: "RGB", 4: "RGBA"}
_COLOUR_MODES = ("RGB", "RGBX", "L", "1", "CMYK", "YCbCr", "HSV", "LAB", "RGBA", "LA", "PA", "P", "RGBa", "La")


def check_mode(mode: str, name: str | Path) -> None:
    """Refuse pixels that are not colours, such as floats.

    Raises:
        UnreadableError: a DataError.
    """
    if mode not in _COLOUR_MODES and not mode.startswith("I"):
        what = "floats, whose range is unknown" if mode == "F" else f"of mode {mode}"
        raise UnreadableError.of("LCD-I011", name, f"the pixels are {what}; save the image as 8-bit RGB or grey")


def pixels_of(
    image: Image.Image,
    name: str | Path,
    channels: Channels = 3,
    value_range: ValueRange = WHOLE_RANGE,
    clip: bool = True,
) -> "Tensor":
    """Convert a loaded image to uint8 [channels, H, W], in memory as Pillow stores it.

    Args:
        image: of any mode that holds colours.
        name: for messages.
        channels: 1 for grey, 3 for RGB, 4 for RGBA; grey is repeated, and alpha is 255 where the file has none.
        value_range: values of 16-bit grey that become 0 and 255; those between are scaled linearly and rounded.
        clip: whether values outside of ``value_range`` become 0 or 255, or are an error.

    Raises:
        UnreadableError: a DataError, if the pixels are not colours or exceed ``value_range`` without ``clip``.
    """
    import torch

    if image.mode.startswith("I"):
        grey = torch.from_numpy(_eight_bits(np.asarray(image), image.mode, name, value_range, clip))
        pixels = grey.expand(min(channels, 3), -1, -1)
        return pixels if channels < 4 else torch.cat([pixels, torch.full_like(grey, 255)[None]])
    check_mode(image.mode, name)
    if image.mode in ("P", "PA", "RGBa", "La"):  # by way of RGBA: premultiplied colours, transparency in palettes
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    mode = _MODES[channels]
    return as_tensor(np.array(image if image.mode == mode else image.convert(mode)))  # convert() would copy


def as_tensor(pixels: NDArray[np.uint8]) -> "Tensor":
    """Make pixels [H, W] or [H, W, C] a tensor [C, H, W] of the same memory."""
    import torch

    return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)


def _eight_bits(
    pixels: NDArray[np.generic], mode: str, name: str | Path, value_range: ValueRange, clip: bool
) -> NDArray[np.uint8]:
    """Scale 16-bit grey to 8 bits, rounded; uint8 [H, W]."""
    lowest, highest = int(pixels.min()), int(pixels.max())
    if mode == "I" and (lowest < 0 or highest > WHOLE_RANGE[1]):
        reason = f"32-bit integers from {lowest} to {highest}; save the image as 8-bit or 16-bit grey"
        raise UnreadableError.of("LCD-I011", name, f"the pixels are {reason}")
    low, high = value_range
    if not clip and (lowest < low or highest > high):
        reason = f"grey values from {lowest} to {highest} exceed the range [{low}, {high}] of the other images"
        raise UnreadableError.of("LCD-I027", name, f"{reason}; set data.value_range, e.g. to {list(WHOLE_RANGE)}")
    values = pixels.astype(np.int64).clip(low, high) - low
    return ((values * 255 + (high - low) // 2) // (high - low)).astype(np.uint8)
