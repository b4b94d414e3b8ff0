"""Images as users have them: files, Pillow images, NumPy arrays and tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_convnext_det.data.io.decode import MAX_ASPECT, MIN_SIDE, read_image, to_rgb_tensor
from lightning_convnext_det.data.io.pixels import WHOLE_RANGE, Channels, GreyRange
from lightning_convnext_det.data.io.regions import RegionImage, open_regions
from lightning_convnext_det.data.io.video import FrameReader, parse_frame_name
from lightning_convnext_det.errors import DataError
from lightning_convnext_det.models.image_transform import OVERSHOOT

ImageSource = str | Path | Image.Image | NDArray[np.uint8] | NDArray[np.float32] | NDArray[np.float64] | Tensor
"""A file, a Pillow image, an array [H, W, 3] in RGB or a tensor [3, H, W]; uint8 or floats in 0..1."""


class PixelFormat(NamedTuple):
    """The pixels that a detector takes."""

    channels: Channels = 3
    """Files and Pillow images are converted to them; arrays and tensors must have them."""
    grey: GreyRange | None = None
    """Values of 16-bit grey files and Pillow images that become 0 and 255; None for all of them."""
    tile: int | None = None
    """TIFF files with a longer side than this are read region by region, where rasterio is installed."""


def read_source(
    image: object,
    name: str,
    frames: FrameReader | None = None,
    pixel_format: PixelFormat = PixelFormat(),  # noqa: B008  # it cannot be changed
) -> Tensor | RegionImage:
    """The pixels of an image, uint8 or float32 in 0..1, [channels, H, W], or a large file that is read by regions.

    Args:
        image: an `ImageSource`.
        name: what messages call it.
        frames: reads frames of videos, ``clip.mp4#000123``; one reader decodes a video once (default: a new one).
        pixel_format: that of the detector.

    Raises:
        DataError: if it cannot be read, or its shape or pixels are not those of an RGB image.
        TypeError: if it is not an image.
    """
    channels, grey, tile = pixel_format
    if isinstance(image, str | Path):
        frame = parse_frame_name(image)
        if frame is not None:
            return (frames or FrameReader()).read(*frame, channels)
        if tile is not None and (regions := open_regions(image, tile, channels, grey)) is not None:
            return regions
        if grey is None:
            return read_image(image, channels=channels)
        return read_image(image, channels=channels, value_range=(grey.low, grey.high), clip=grey.clip)
    if isinstance(image, Image.Image):
        pixels = to_rgb_tensor(image, True, name, channels, grey or GreyRange(*WHOLE_RANGE, clip=True))
    elif isinstance(image, np.ndarray):
        pixels = _read_array(image, name, channels)
    elif isinstance(image, Tensor):
        pixels = _read_tensor(image, name, channels)
    else:
        raise TypeError(
            f"{name} is of type {type(image).__name__}; give a path, a Pillow image, an array [height, width, 3], "
            "a tensor [3, height, width], or a list of these"
        )
    height, width = pixels.shape[1:]
    if min(height, width) < MIN_SIDE:
        raise DataError(f"[LCD-I022] {name} is {width}x{height}; each side needs {MIN_SIDE} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise DataError(f"[LCD-I021] {name} is {width}x{height}; one side is over {MAX_ASPECT:.0f} x the other")
    return pixels


def _read_array(image: NDArray[np.generic], name: str, channels: Channels) -> Tensor:
    if image.ndim != 3 or image.shape[2] != channels:
        raise _shape_error(name, "array", image.shape, channels)
    if image.dtype.kind != "f" and image.dtype != np.uint8:
        raise DataError(f"[LCD-I032] {name} holds {image.dtype} pixels; give uint8, or floats in 0..1")
    # a copy: torch warns of arrays that cannot be written to, and refuses those that run backwards
    copy = np.array(image, np.uint8 if image.dtype == np.uint8 else np.float32, order="C")
    return _checked(torch.from_numpy(copy).permute(2, 0, 1), name)


def _read_tensor(image: Tensor, name: str, channels: Channels) -> Tensor:
    if image.dim() != 3 or image.shape[0] != channels:
        raise _shape_error(name, "tensor", image.shape, channels)
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise DataError(f"[LCD-I032] {name} holds {image.dtype} pixels; give torch.uint8, or floats in 0..1")
    return _checked(image.detach().to(torch.float32), name)


def _shape_error(name: str, kind: Literal["array", "tensor"], shape: Sequence[int], wanted: Channels) -> DataError:
    if wanted != 3:
        expected = f"[height, width, {wanted}]" if kind == "array" else f"[{wanted}, height, width]"
        return DataError(
            f"[LCD-I032] {name} has the shape {list(shape)}; the detector takes {wanted} channels: {expected}"
        )
    last = kind == "array"
    channels, opposite = (shape[-1:], shape[:1]) if last else (shape[:1], shape[-1:])
    if len(shape) == 4:
        remedy = "give several images as a list: list(x)"
    elif len(shape) == 2 or channels == (1,):
        remedy = "repeat the grey channel three times"
    elif len(shape) == 3 and channels == (4,):
        remedy = f"drop the alpha channel: {'x[..., :3]' if last else 'x[:3]'}"
    elif len(shape) == 3 and opposite == (3,):
        remedy = f"channels come {'last: x.transpose(1, 2, 0)' if last else 'first: x.permute(2, 0, 1)'}"
    else:
        remedy = "convert it"
    expected = "[height, width, 3]" if last else "[3, height, width]"
    return DataError(f"[LCD-I032] {name} has shape {list(shape)}; expected {expected} in RGB: {remedy}")


def _checked(pixels: Tensor, name: str) -> Tensor:
    """The pixels, if they are uint8 or finite floats in 0..1."""
    if pixels.dtype == torch.uint8 or pixels.numel() == 0:
        return pixels
    low, high = (x.item() for x in pixels.aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):  # aminmax passes nan on
        raise DataError(f"[LCD-I031] {name} holds pixels that are not finite")
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise DataError(
            f"[LCD-I030] {name} holds floats from {low:.3g} to {high:.3g}; give uint8, or floats in 0..1 that are not "
            "normalised: the detector does that"
        )
    return pixels
