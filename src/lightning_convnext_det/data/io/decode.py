"""Decode images to uint8 RGB tensors with Pillow, and read their sizes from the header.

Images are laid out in memory as decoders write them, [H, W, C]: resizing and flipping take half of the time, and a copy
is spared. With the extra ``fast``, JPEG files are decoded by simplejpeg (``jpeg.py``), to the same pixels.

Not decoded by torchvision: its PNG decoder dies of a segmentation fault on a flipped bit, and is deprecated.
Alpha is dropped, not composited. 16-bit grey is scaled, where Pillow's own conversion clips. No process-wide setting of
Pillow is changed.
"""

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from lightning_convnext_det.data.annotations import UnreadableError
from lightning_convnext_det.data.io.files import open_file
from lightning_convnext_det.data.io.jpeg import decode_jpeg
from lightning_convnext_det.data.io.pixels import (
    WHOLE_RANGE,
    Channels,
    GreyRange,
    ValueRange,
    as_tensor,
    check_mode,
    pixels_of,
)

if TYPE_CHECKING:
    from torch import Tensor  # imported where pixels become tensors: headers are read without torch's two seconds

MAX_PIXELS = 89_478_485  # 256 MiB as RGB; equals Pillow's MAX_IMAGE_PIXELS
MAX_ASPECT = 200.0  # longer images shrink to nothing on one side when resized
MIN_SIDE = 2  # pixels; a 1-pixel image has no content for a detector

# What a dataset may hold. Others are not tried: Pillow would start Ghostscript for an EPS file named .jpg.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".mpo", ".jpg", ".jpeg"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
}
if find_spec("pillow_heif"):  # optional; without it these files are counted and named, not read
    _SUFFIXES["HEIF"] = (".heic", ".heif", ".hif")
IMAGE_SUFFIXES = frozenset(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
_TAIL = 1 << 16  # bytes at the end of a PNG that are searched for EXIF
WHOLE_RANGE_USED = "16-bit grey is scaled to 8 bits by 1/257"
_warned: set[str] = set()  # codes of warnings that this process has given

# EXIF orientation -> (swap the sides, then flip these dimensions); EXIF 2.3, section 4.6.4, tag 0x0112
_ORIENTATIONS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}


class ImageSize(NamedTuple):
    """Size of an image as stored, in pixels, and its EXIF orientation."""

    height: int
    width: int
    orientation: int
    """1 ... 8; 1 where the file has none, or one that EXIF does not define."""

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width after the EXIF orientation is applied."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


class ImageHeader(NamedTuple):
    """Header of an image file: size, orientation, format and mode, without its pixels."""

    size: ImageSize
    format: str
    """Pillow's name: JPEG, PNG, ..."""
    mode: str
    """Pillow's name: RGB, L, P, I;16, ..."""
    animated: bool

    def suits(self, suffix: str) -> bool:
        """Tell whether the format fits the ending of the file name."""
        return suffix.lower() in _SUFFIXES.get(self.format, ())


def read_image(
    path: str | Path,
    upright: bool = True,
    max_pixels: int = MAX_PIXELS,
    channels: Channels = 3,
    value_range: ValueRange | None = None,
    clip: bool = True,
) -> "Tensor":
    """Decode an image file to a uint8 RGB tensor.

    Args:
        path: the file; its content decides the format, not its name.
        upright: apply the orientation of its EXIF block. A TIFF is always upright: the decoder turns it.
        max_pixels: larger images are refused before they are decoded.
        channels: 1 for grey, 3 for RGB, 4 for RGBA.
        value_range: values of 16-bit grey that become 0 and 255 (default: the whole range, 0 to 65535).
        clip: whether values outside of ``value_range`` become 0 or 255, or are an error.

    Returns:
        uint8 [channels, H, W], in memory [H, W, channels]. For RGB, grey is repeated and alpha dropped; of several
        frames the first is taken.

    Raises:
        UnreadableError: a DataError, if the file is missing, damaged, no image, too large, too narrow, or has pixels
            that are not colours, such as floats.
    """
    with _opened(path, max_pixels) as (image, header):
        if header.animated:
            warn_once("LCD-I014", path, "has several frames; the first is used")
        decoded = decode_jpeg(image) if channels == 3 else None
        if decoded is None:
            _load(image, path)
            pixels = pixels_of(image, path, channels, value_range or WHOLE_RANGE, clip)
        else:
            pixels = as_tensor(decoded)
        if image.mode.startswith("I") and value_range is None:
            warn_once("LCD-I010", path, WHOLE_RANGE_USED)
    return _oriented(pixels, header.size.orientation if upright else 1)


def _load(image: Image.Image, path: str | Path) -> None:
    """Let Pillow decode the pixels."""
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise UnreadableError.of("LCD-I002", path, f"the image is damaged or cut short ({error})") from error


def verify_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
    """Verify the checksums of an image file, where its format has them: decoding a PNG ignores them.

    Raises:
        UnreadableError: a DataError, if a checksum is wrong, or the image cannot be opened.
    """
    with _opened(path, max_pixels) as (image, _):
        try:
            image.verify()
        except Exception as error:  # what the parser of the format raises
            raise UnreadableError.of("LCD-I002", path, f"the image is damaged ({error})") from error


def read_header(path: str | Path, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Read size, orientation, format and mode without decoding pixels.

    Raises:
        UnreadableError: a DataError, if the file is missing, no image, too large or too narrow.
    """
    with _opened(path, max_pixels) as (_, header):
        return header


def read_peak(path: str | Path) -> int:
    """Read the largest value of a 16-bit grey image.

    Raises:
        UnreadableError: a DataError, if the image cannot be read.
    """
    with _opened(path, MAX_PIXELS) as (image, _):
        try:
            return int(np.asarray(image).max())
        except Exception as error:  # as in read_image
            raise UnreadableError.of("LCD-I002", path, f"the image is damaged or cut short ({error})") from error


def read_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> ImageSize:
    """Read height, width and EXIF orientation without decoding pixels.

    Raises:
        UnreadableError: a DataError, if the file is missing, no image, too large or too narrow.
    """
    return read_header(path, max_pixels).size


def to_rgb_tensor(
    image: Image.Image,
    upright: bool = True,
    name: str = "image",
    channels: Channels = 3,
    grey: GreyRange = GreyRange(*WHOLE_RANGE, clip=True),  # noqa: B008  # it cannot be changed
) -> "Tensor":
    """Convert a Pillow image to a uint8 RGB tensor.

    Args:
        image: of any mode that holds colours; left as it is.
        upright: apply the orientation of its EXIF block.
        name: what messages call it.
        channels: 1 for grey, 3 for RGB, 4 for RGBA.
        grey: values of 16-bit grey that become 0 and 255.

    Returns:
        RGB, uint8 [channels, H, W], in memory [H, W, channels].

    Raises:
        UnreadableError: a DataError, if it is damaged or its pixels are not colours, such as floats.
    """
    orientation = _orientation(image) if upright else 1
    try:
        image.load()
    except OSError as error:
        raise UnreadableError.of("LCD-I002", name, f"the image is damaged or cut short ({error})") from error
    low, high, clip = grey
    return _oriented(pixels_of(image, name, channels, (low, high), clip), orientation)


@contextmanager
def _opened(path: str | Path, max_pixels: int) -> Iterator[tuple[Image.Image, ImageHeader]]:
    """Open an image and refuse a size that cannot be decoded safely."""
    try:
        file = open_file(path)
    except FileNotFoundError as error:
        raise UnreadableError.of("LCD-I003", path, "no such file") from error
    except (OSError, ValueError) as error:
        raise UnreadableError.of("LCD-I003", path, f"cannot be opened ({error})") from error
    with file:
        image, header = _identified(file, path)
        with image:
            _check_size(header.size, path, max_pixels)
            check_mode(header.mode, path)
            yield image, header


def _identified(file: BinaryIO, path: str | Path) -> tuple[Image.Image, ImageHeader]:
    """Open an image without decoding its pixels."""
    try:
        image = _open(file)
        animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))
        size = ImageSize(image.height, image.width, _orientation(image, file))
        return image, ImageHeader(size, image.format or "", image.mode, animated)
    except UnidentifiedImageError as error:
        file.seek(0)
        start = file.read(12)
        what = f"begins with {start!r}" if start else "the file is empty"
        raise UnreadableError.of("LCD-I001", path, f"not an image that can be read ({what})") from error
    except Image.DecompressionBombError as error:
        raise UnreadableError.of("LCD-I023", path, f"too many pixels to decode safely ({error})") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise whatever a damaged header leads them to
        raise UnreadableError.of("LCD-I002", path, f"the image is damaged or cut short ({error})") from error


def _open(file: BinaryIO) -> Image.Image:
    """Open an image, also where a filter makes errors of Pillow's warnings about its size or a part not needed."""
    try:
        return Image.open(file, formats=_formats())
    except Warning:
        with warnings.catch_warnings():  # not on the common path: it changes the filters of the whole process meanwhile
            warnings.simplefilter("ignore")
            file.seek(0)
            return Image.open(file, formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """List the formats that this build of Pillow can open."""
    Image.init()
    if "HEIF" in _SUFFIXES:
        import pillow_heif

        pillow_heif.register_heif_opener()  # turns images upright itself, and says so in their EXIF
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(size: ImageSize, path: str | Path, max_pixels: int) -> None:
    """Refuse images too large to decode safely, or too small or narrow for a detector."""
    height, width = size.height, size.width
    shape = f"{width}x{height}"
    if height * width > max_pixels:
        reason = f"{shape} is {height * width:,} pixels, more than max_pixels = {max_pixels:,}"
        raise UnreadableError.of("LCD-I023", path, reason)
    if min(height, width) < MIN_SIDE:
        raise UnreadableError.of("LCD-I022", path, f"{shape} is too small; each side needs {MIN_SIDE} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UnreadableError.of(
            "LCD-I021", path, f"{shape} is too narrow; one side is over {MAX_ASPECT:.0f} x the other"
        )


def _oriented(pixels: "Tensor", orientation: int) -> "Tensor":
    """Apply an EXIF orientation to pixels [C, H, W]; in memory [H, W, C]."""
    swap, flips = _ORIENTATIONS.get(orientation, (False, ()))
    pixels = pixels.mT if swap else pixels
    pixels = pixels.flip(flips) if flips else pixels
    return pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _orientation(image: Image.Image, file: BinaryIO | None = None) -> int:
    """Read the orientation from EXIF, or else XMP; 1 where there is none, or one that EXIF does not define.

    With ``file`` also a block behind the pixels of a PNG is found.
    """
    if image.format == "TIFF":  # Pillow's decoder turns it, and gives the size after that
        return 1
    # not a PNG's own getexif, which decodes all pixels to look behind them
    read = Image.Image.getexif if file is None or not _may_have_late_exif(image, file) else type(image).getexif
    try:
        orientation = read(image).get(ExifTags.Base.Orientation)
    except Exception:  # a damaged block; Pillow's parser raises whatever it leads to
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _may_have_late_exif(image: Image.Image, file: BinaryIO) -> bool:
    """Tell whether a PNG without EXIF before its pixels may have it behind them."""
    if image.format != "PNG" or "exif" in image.info or image.width * image.height > MAX_PIXELS:
        return False
    position = file.tell()
    file.seek(max(0, file.seek(0, io.SEEK_END) - _TAIL))
    found = b"eXIf" in file.read()
    file.seek(position)
    return found


def warn_once(code: str, name: str | Path, reason: str) -> None:
    """Warn once per process and code."""
    if code not in _warned:
        _warned.add(code)
        warnings.warn(f"[{code}] {name}: {reason} (further images are not reported)", stacklevel=3)
