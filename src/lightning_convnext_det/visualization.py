"""Draw detections on images, and arrange images on a contact sheet.

Sizes follow the image; colours follow the class. Pillow draws everything, with the font that it carries if it can.
"""

import functools
import itertools
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from lightning_convnext_det.fonts import font_for, load_font

Color = tuple[int, int, int]
"""Red, green and blue, 0 ... 255."""
_Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom excluded

SCORE_THRESHOLD = 0.3  # of drawings by default; pred_score_thr of MMDetection 3.3's visualizer

_ENLARGE_BELOW = 240  # pixels; labels of readable size would hide the objects of a smaller image
_MIN_FONT_SIZE = 10  # pixels; Aileron is hard to read below
_MAX_COVERED = 0.1  # share of the image that plates may cover before their text shrinks
_MAX_ROWS = 12  # places tried down the sides of a box
_NUM_COLORS = 96  # more classes than these share colours


def draw_detections(
    image: Image.Image | Tensor,
    boxes: Tensor | Sequence[Sequence[float]],
    names: Sequence[str],
    scores: Tensor | Sequence[float] | None = None,
    colors: Mapping[str, Color] | None = None,
    font: str | None = None,
) -> Image.Image:
    """Draw boxes with their names and scores on a copy of an image.

    Lines and text scale with the image. Labels lie on plates of the colour of their class, inside the image and
    beside each other where there is room; what has the higher score is drawn later, so it lies on top.

    Args:
        image: an image, turned upright by its EXIF orientation, or a tensor [1, 3 or 4, H, W], uint8 or float in
            0..1; the fourth channel, alpha, is dropped.
        boxes: corners (x1, y1, x2, y2) in pixels of the upright image, [N, 4].
        names: the label of each box.
        scores: confidences [N]; None draws names alone, the last box on top.
        colors: of the names, e.g. from `class_colors`; a name that is not in it has a colour of its own making, the
            same in every image but perhaps close to another's.
        font: TrueType file for the names (default: Pillow's own, Aileron; where that lacks a character, one of those
            that are installed).

    Returns:
        A new RGB image of the same size; one of less than 240x240 pixels is enlarged by a whole factor, for labels of
        readable size would hide what is in it.

    Raises:
        ValueError: if ``boxes`` is not [N, 4] or not finite, the lengths differ, or the font cannot be read.
        TypeError: if the image is a tensor of another shape or type, or not of 8 bits.
    """
    corners = _checked_boxes(boxes, names, scores)
    canvas, scale = _canvas(image)
    order = range(len(names)) if scores is None else sorted(range(len(names)), key=lambda i: float(scores[i]))
    outlines = [_outline(corners[i] * scale, canvas.size) for i in order]
    paints = [(colors or {}).get(names[i]) or _color_of(names[i]) for i in order]
    labels = [(names[i], "" if scores is None else f" {float(scores[i]):.2f}") for i in order]
    style = _Style(canvas.size, font or font_for(names)).for_labels(labels)
    texts = [style.fit(name, ending) for name, ending in labels]
    draw = ImageDraw.Draw(canvas)
    for box, paint in zip(outlines, paints, strict=True):
        _draw_box(draw, box, paint, style.line_width)
    plates = _place([style.plate(text) for text in texts], outlines, canvas.size)
    for text, plate, paint in zip(texts, plates, paints, strict=True):
        draw.rectangle((plate[0], plate[1], plate[2] - 1, plate[3] - 1), fill=paint)
        draw.text((plate[0] + style.margin, plate[1] + style.ascent), text, _ink(paint), style.font, anchor="ls")
    return canvas


def class_colors(names: Iterable[str]) -> dict[str, Color]:
    """Give every class a colour, as different from each other as possible; the same for the same names.

    The colour of a class depends on its position alone: a class added at the end changes no other.
    """
    palette = _palette()
    return {name: palette[i % len(palette)] for i, name in enumerate(dict.fromkeys(names))}


def contact_sheet(
    images: Iterable[Image.Image],
    columns: int = 4,
    tile_size: int = 400,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Arrange images in rows on one sheet.

    Args:
        images: any number of images, at least one; taken one at a time, so a generator keeps memory low.
        columns: images in a row.
        tile_size: longest side of each image on the sheet, in pixels; smaller ones are enlarged.
        captions: a line of text below each image.

    Returns:
        An RGB image on white.

    Raises:
        ValueError: if there is no image, another number of captions, or a size below 1.
    """
    if columns < 1 or tile_size < 1:
        raise ValueError(f"columns and tile_size must be at least 1, got {columns} and {tile_size}")
    tiles = [_tile(_to_rgb(image), tile_size) for image in images]
    if not tiles:
        raise ValueError("a contact sheet needs at least one image")
    if captions is not None and len(captions) != len(tiles):
        raise ValueError(f"there are {len(captions)} captions for {len(tiles)} images")
    style = _Style((tile_size, tile_size), font_for(captions or ()))
    gap, caption_height = max(2, tile_size // 50), style.height if captions is not None else 0
    rows = [range(i, min(i + columns, len(tiles))) for i in range(0, len(tiles), columns)]
    heights = [max(tiles[i].height for i in row) + caption_height for row in rows]
    width = min(columns, len(tiles)) * (tile_size + gap) + gap
    sheet = Image.new("RGB", (width, sum(heights) + gap * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = gap + column * (tile_size + gap) + (tile_size - tiles[i].width) // 2
            sheet.paste(tiles[i], (left, top))
            if captions is not None:
                position = (left, top + tiles[i].height + style.ascent)
                draw.text(position, style.fit(captions[i]), "black", style.font, anchor="ls")
        top += height + gap
    return sheet


def _tile(image: Image.Image, size: int) -> Image.Image:
    """Resize an image so that its longer side has that size."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


class _Style:
    """Line width, font and label size for an image of (width, height)."""

    def __init__(self, size: tuple[int, int], font: str | None, shrink: float = 1.0) -> None:
        self.size, self._font_path = size, font
        # a strip is judged by its shorter side; 640x480 gets 2-pixel lines and 15-pixel text, 6000x4000 13 and 94
        side = min(math.prod(size) ** 0.5, 4.0 * min(size))
        self.line_width = max(1, round(1 + side / 400))
        font_size = max(_MIN_FONT_SIZE, round((5 + side / 55) * shrink))
        self.font = load_font(font, font_size)
        self.margin = max(1, font_size // 6)
        ascent, descent = self.font.getmetrics()
        self.ascent, self.height = ascent, ascent + descent

    def for_labels(self, labels: Iterable[tuple[str, str]]) -> "_Style":
        """Shrink the text until the labels cover at most a tenth of the image, or reach the smallest font."""
        plates = [self.plate(self.fit(name, ending)) for name, ending in labels]
        covered = sum(width * height for width, height in plates) / math.prod(self.size)
        if covered <= _MAX_COVERED:
            return self
        return _Style(self.size, self._font_path, (_MAX_COVERED / covered) ** 0.5)

    def fit(self, name: str, ending: str = "") -> str:
        """Join name and ending on one line; shorten the name if the line is wider than the image."""
        name = text = " ".join(name.split())
        text += ending
        while self.plate(text)[0] > self.size[0] and name:
            name = name[:-1]
            text = f"{name}…{ending}"
        return text

    def plate(self, text: str) -> tuple[int, int]:
        """Return width and height of the plate behind a text, in pixels."""
        return math.ceil(self.font.getlength(text)) + 2 * self.margin, self.height


def _canvas(image: Image.Image | Tensor) -> tuple[Image.Image, int]:
    """Return an RGB copy to draw on, and the factor by which it is enlarged."""
    canvas = _to_rgb(ImageOps.exif_transpose(image)) if isinstance(image, Image.Image) else to_pil(image)
    scale = max(1, math.ceil(_ENLARGE_BELOW / math.prod(canvas.size) ** 0.5))
    if scale > 1:
        canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.BICUBIC)
    return canvas, scale


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB."""
    if image.mode.startswith(("I", "F")):  # Pillow's conversion would clip 16 bits and make floats black
        raise TypeError(f"the image has mode {image.mode}; convert it to 8-bit RGB or grey")
    # by way of RGBA where a palette has transparency: Pillow warns otherwise
    return (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")


def to_pil(image: Tensor) -> Image.Image:
    """Convert a tensor [1, 3 or 4, H, W], uint8 or float in 0..1, to an RGB image.

    Raises:
        TypeError: if the tensor has another shape or type.
    """
    if (
        image.dim() != 3
        or image.shape[0] not in (1, 3, 4)
        or not (image.dtype == torch.uint8 or image.is_floating_point())
    ):
        raise TypeError(
            f"the image is a tensor {list(image.shape)} of {image.dtype}; expected [1, 3 or 4, height, "
            "width], uint8 or floats in 0..1"
        )
    if image.dtype != torch.uint8:
        image = (image.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    colours = image[:3].expand(3, -1, -1)  # grey, or without alpha
    return Image.fromarray(colours.permute(1, 2, 0).cpu().contiguous().numpy())


def _checked_boxes(
    boxes: Tensor | Sequence[Sequence[float]], names: Sequence[str], scores: Tensor | Sequence[float] | None
) -> Tensor:
    corners = torch.as_tensor(boxes).detach().to("cpu", torch.float32)
    if corners.numel() == 0:
        corners = corners.reshape(-1, 4)
    if corners.dim() != 2 or corners.shape[1] != 4:
        raise ValueError(f"boxes has shape {list(corners.shape)}; expected [N, 4], corners x1, y1, x2, y2")
    if len(names) != len(corners) or (scores is not None and len(scores) != len(corners)):
        counts = f"{len(names)} names" + ("" if scores is None else f" and {len(scores)} scores")
        raise ValueError(f"there are {counts} for {len(corners)} boxes")
    if not corners.isfinite().all():
        raise ValueError("boxes holds a coordinate that is not finite")
    return corners


def _outline(box: Tensor, size: tuple[int, int]) -> _Box:
    """Round a box to whole pixels inside the image, at least one pixel wide and high."""
    x1, y1, x2, y2 = box.tolist()
    left, right = (min(max(round(x), 0), size[0]) for x in (min(x1, x2), max(x1, x2)))
    top, bottom = (min(max(round(y), 0), size[1]) for y in (min(y1, y2), max(y1, y2)))
    left, top = min(left, size[0] - 1), min(top, size[1] - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _draw_box(draw: ImageDraw.ImageDraw, box: _Box, color: Color, line_width: int) -> None:
    """Draw a frame inside the box, thinner on small boxes so that the object stays visible."""
    left, top, right, bottom = box
    width = max(1, min(line_width, min(right - left, bottom - top) // 6))
    draw.rectangle((left, top, right - 1, bottom - 1), outline=color, width=width)


def _place(plates: Sequence[tuple[int, int]], boxes: Sequence[_Box], size: tuple[int, int]) -> list[_Box]:
    """Place each label at its box, inside the image, without overlap where possible; the last is placed first."""
    placed: list[_Box] = []
    side = max((4 * height for _, height in plates), default=1)  # of squares that tell which labels are near
    near: dict[tuple[int, int], list[int]] = defaultdict(list)
    for plate, box in zip(reversed(plates), reversed(boxes), strict=True):
        best, least = _inside(box[0], box[1], *plate, size), math.inf
        for x, y in _places(*plate, box):
            place = _inside(x, y, *plate, size)
            others = {i for square in _squares(place, side) for i in near.get(square, ())}
            hidden = sum(_overlap(place, placed[i]) for i in others)
            if hidden < least:
                best, least = place, hidden
            if hidden == 0:
                break
        for square in _squares(best, side):
            near[square].append(len(placed))
        placed.append(best)
    return placed[::-1]


def _squares(box: _Box, side: int) -> Iterator[tuple[int, int]]:
    """Yield the squares of a grid that a box touches."""
    columns, rows = range(box[0] // side, box[2] // side + 1), range(box[1] // side, box[3] // side + 1)
    return itertools.product(columns, rows)


def _places(width: int, height: int, box: _Box) -> Iterator[tuple[int, int]]:
    """Yield left upper corners for a label at a box, the best first: above, at the top, below, beside, within."""
    left, top, right, bottom = box
    for y in (top - height, top, bottom):
        yield left, y
        yield right - width, y
    for x in (right, left - width):
        yield x, top
        yield x, bottom - height
    for y in range(top + height, bottom - height, height)[:_MAX_ROWS]:
        yield left, y
        yield right - width, y


def _inside(x: int, y: int, width: int, height: int, size: tuple[int, int]) -> _Box:
    x, y = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
    return x, y, x + width, y + height


def _overlap(a: _Box, b: _Box) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _ink(color: Color) -> str:
    """Choose black or white text, whichever has the higher contrast (WCAG 2.1, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def _color_of(name: str) -> Color:
    return _palette()[zlib.crc32(name.encode()) % 32]


@functools.cache
def _palette() -> list[Color]:
    """Choose vivid colours, each the farthest from all before it, that stand out on photographs."""
    steps = torch.linspace(0, 255, 10).round()
    candidates = torch.cartesian_prod(steps, steps, steps)
    lab = _oklab(candidates / 255)
    vivid = (lab[:, 1:].norm(dim=1) > 0.12) & (lab[:, 0] > 0.55) & (lab[:, 0] < 0.92)
    candidates, lab = candidates[vivid], lab[vivid]
    chosen = [int(candidates.eq(torch.tensor([255.0, 57.0, 57.0])).all(1).nonzero()[0])]
    distance = (lab - lab[chosen[0]]).norm(dim=1)
    while len(chosen) < _NUM_COLORS:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (lab - lab[chosen[-1]]).norm(dim=1))
    return [(int(r), int(g), int(b)) for r, g, b in candidates[chosen].tolist()]


def _oklab(rgb: Tensor) -> Tensor:
    """Convert sRGB [N, 3] in 0..1 to Oklab [N, 3]: lightness, green-red and blue-yellow.

    Reference:
        Ottosson, "A perceptual color space for image processing", 2020, https://bottosson.github.io/posts/oklab.
    """
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4).double()
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    lms = linear @ torch.tensor(to_lms, dtype=torch.float64).T
    return lms ** (1 / 3) @ torch.tensor(to_lab, dtype=torch.float64).T
