"""Reading of a dataset's images with one set of options, and the range of values of its 16-bit grey images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_convnext_det.data.io.decode import MAX_PIXELS, read_header, read_image, read_peak
from lightning_convnext_det.data.io.pixels import WHOLE_RANGE, Channels, ValueRange
from lightning_convnext_det.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED = 64  # images whose values are looked at; at 3 ms each a fifth of a second
_BITS = (8, 10, 12, 14, 16)  # of cameras and scanners that write 16-bit files


@dataclass(frozen=True)
class ImageReader:
    """Reads images as uint8 [channels, H, W]; see :func:`read_image` for the options.

    Attributes:
        channels: 1 for grey, 3 for RGB, 4 for RGBA.
        value_range: values of 16-bit grey that become 0 and 255.
        clip: whether values outside of ``value_range`` are clipped, or an error.
        max_pixels: larger images are an error.
    """

    channels: Channels = 3
    value_range: ValueRange = WHOLE_RANGE
    clip: bool = True
    max_pixels: int = MAX_PIXELS

    def __call__(self, path: str | Path, upright: bool = True) -> "Tensor":
        """Decode an image, turned upright by its EXIF orientation if asked.

        Raises:
            UnreadableError: a DataError, if the image cannot be read.
        """
        return read_image(path, upright, self.max_pixels, self.channels, self.value_range, self.clip)


def find_value_range(paths: Sequence[str | Path]) -> tuple[ValueRange, int] | None:
    """Find the bit depth of 16-bit grey images from the largest value in up to 64 of them, evenly spaced.

    Returns:
        The range of values of the smallest usual depth (8, 10, 12, 14 or 16 bits) that holds the largest value, and
        that value; None if none of the images has 16-bit grey.
    """
    peak = -1
    for path in paths[:: max(1, -(-len(paths) // SAMPLED))]:
        try:
            if read_header(path).mode.startswith("I"):
                peak = max(peak, read_peak(path))
        except DataError:  # reported when the image is read
            continue
    if peak < 0:
        return None
    return (0, next(2**bits - 1 for bits in _BITS if peak < 2**bits or bits == _BITS[-1])), peak
