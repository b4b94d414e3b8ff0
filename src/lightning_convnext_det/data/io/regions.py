"""Large TIFF files that are read region by region, by rasterio (GDAL), and never decoded as a whole.

Only tiles or strips that a region touches are decoded. Files are taken as Pillow reads them: 8-bit grey, RGB and RGBA,
and 16-bit grey by its range of values. Other files (palettes, an orientation other than upright, other formats) are not
for this reader.
"""

import itertools
import warnings
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from lightning_convnext_det.data.annotations import UnreadableError
from lightning_convnext_det.data.io.decode import MAX_ASPECT, MAX_PIXELS, MIN_SIDE, WHOLE_RANGE_USED, warn_once
from lightning_convnext_det.data.io.pixels import WHOLE_RANGE, Channels, GreyRange, pixels_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MODES = ("L", "RGB", "RGBA", "I;16", "I;16B")
_COLORS = (1, 2)  # photometric interpretation: grey from black, RGB; YCbCr and palettes are left to Pillow
_SUBFILE = 254  # tag of TIFF 6.0: bit 0 for the same image with fewer pixels, bit 2 for a mask
_PHOTOMETRIC, _ORIENTATION, _ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH = 262, 274, 278, 322, 323  # tags of TIFF 6.0
_CACHE_BYTES = 64 << 20  # of decoded blocks, which neighbouring regions share; GDAL's default is 5 % of the memory
_ALL_GREY = GreyRange(*WHOLE_RANGE, clip=True)
_OVERVIEW_SIDE = 2048  # pixels of the longer side; detectors resize to less
_DRAWN_SIDE = 4096  # pixels of the longer side of a drawing
SUFFIXES = (".tif", ".tiff")


@dataclass(frozen=True)
class RegionImage:
    """An image [channels, H, W] whose regions are read from its file when they are needed.

    It holds no pixels but those of an overview, and can be sent to other processes. Regions are uint8 [channels, h, w].

    Attributes:
        path: of the file.
        height: in pixels.
        width: in pixels.
        channels: 1 for grey, 3 for RGB, 4 for RGBA.
        grey: values of 16-bit grey that become 0 and 255.
        device: of the regions; None for the CPU.
        overview: the whole image, reduced to 2048 pixels on the longer side; None if it has not been read.
    """

    path: str
    height: int
    width: int
    channels: Channels = 3
    grey: GreyRange = _ALL_GREY
    device: "str | torch.device | None" = None
    overview: "Tensor | None" = field(default=None, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width, as of a tensor."""
        return self.channels, self.height, self.width

    def to(self, device: "str | torch.device") -> "RegionImage":
        """The same image, whose regions are put on a device."""
        return replace(self, device=device, overview=None if self.overview is None else self.overview.to(device))

    def with_overview(self) -> "RegionImage":
        """The same image with its overview, for which the whole file is read: damage is found.

        Raises:
            UnreadableError: a DataError, if the file is damaged.
        """
        return self if self.overview is not None else replace(self, overview=self.read_whole(_OVERVIEW_SIDE))

    def read_whole(self, longer_side: int) -> "Tensor":
        """Read the whole image, reduced to this many pixels on the longer side; as `read`."""
        return self.read(0, 0, self.width, self.height, longer_side)

    def read(self, left: int, top: int, right: int, bottom: int, longer_side: int | None = None) -> "Tensor":
        """Read a region; right and bottom are the first column and row outside.

        Args:
            left: first column.
            top: first row.
            right: first column behind the region.
            bottom: first row behind the region.
            longer_side: reduce the region to this many pixels, each the mean of those that it covers (default: as it
                is); the file is read block by block meanwhile.

        Raises:
            UnreadableError: a DataError, if the file is damaged.
        """
        import rasterio
        from rasterio.enums import Resampling
        from rasterio.windows import Window

        height, width = bottom - top, right - left
        factor = min(1.0, longer_side / max(height, width)) if longer_side else 1.0
        size = max(1, round(height * factor)), max(1, round(width * factor))
        try:
            with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES):
                warnings.simplefilter("ignore")  # of rasterio: most images have no place on a map
                with rasterio.open(self.path) as file:
                    bands = file.read(
                        window=Window(left, top, width, height),
                        out_shape=(file.count, *size),
                        resampling=Resampling.average if factor < 1 else Resampling.nearest,
                    )
        except rasterio.errors.RasterioError as error:
            raise UnreadableError.of("LCD-I002", self.path, f"the image is damaged or cut short ({error})") from error
        return self._converted(bands)

    def _converted(self, bands: "np.ndarray[tuple[int, int, int], np.dtype[np.generic]]") -> "Tensor":
        """Bands [B, h, w] as Pillow would convert them, [channels, h, w]."""
        pixels = bands[0] if len(bands) == 1 else np.ascontiguousarray(bands.transpose(1, 2, 0))
        low, high, clip = self.grey
        region = pixels_of(Image.fromarray(pixels), self.path, self.channels, (low, high), clip).contiguous()
        return region if self.device is None else region.to(self.device)


def open_regions(
    path: str | Path, longest: int, channels: Channels = 3, grey: GreyRange | None = None
) -> RegionImage | None:
    """Open a TIFF for reading region by region; None if it is to be decoded as a whole.

    >>> open_regions("photo.jpg", 640) is None
    True

    Args:
        path: the file.
        longest: images without a longer side are decoded as a whole.
        channels: 1 for grey, 3 for RGB, 4 for RGBA.
        grey: values of 16-bit grey that become 0 and 255 (default: the whole range, 0 to 65535, with a warning).
    """
    if Path(path).suffix.lower() not in SUFFIXES or not find_spec("rasterio"):
        return None
    try:
        with TiffImageFile(str(path)) as image:  # the header; Image.open would refuse the size
            (width, height), mode, tags, is_single = image.size, image.mode, dict(image.tag_v2), _is_single(image)
    except Exception:  # the reader of whole images says what is wrong
        return None
    block = tags.get(_TILE_WIDTH, width) * tags.get(_TILE_LENGTH, tags.get(_ROWS_PER_STRIP, height))
    readable = mode in _MODES and tags.get(_PHOTOMETRIC) in _COLORS and tags.get(_ORIENTATION, 1) == 1 and is_single
    shorter, longer = sorted((height, width))
    if not readable or longer <= longest or block > MAX_PIXELS or shorter < max(MIN_SIDE, longer / MAX_ASPECT):
        return None
    if mode.startswith("I") and grey is None:
        warn_once("LCD-I010", path, WHOLE_RANGE_USED)
    return RegionImage(str(path), height, width, channels, grey or _ALL_GREY)


def _is_single(image: TiffImageFile) -> bool:
    """Whether a file holds one image; reduced ones and masks of it, as in cloud-optimised files, do not count."""
    for frame in itertools.count(1):
        try:
            image.seek(frame)
        except EOFError:
            break
        except SyntaxError:  # masks have modes that Pillow does not know; their tags have been read
            pass
        if not image.tag_v2.get(_SUBFILE, 0) & 0b101:
            return False
    return True


def reduce_for_drawing(image: "Tensor | RegionImage", boxes: "Tensor") -> "tuple[Tensor, Tensor]":
    """The pixels to draw on, those of a `RegionImage` reduced to 4096 on the longer side, and the boxes in them."""
    if not isinstance(image, RegionImage):
        return image, boxes
    pixels = image.read_whole(_DRAWN_SIDE)
    factors = boxes.new_tensor([pixels.shape[-1] / image.width, pixels.shape[-2] / image.height])
    return pixels, boxes * factors.repeat(2)
