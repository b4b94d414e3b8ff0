"""Synthetic detection dataset in COCO format, to try the whole package without any data.

Shapes of five classes on textured backgrounds, with strokes as clutter. Textures, sizes and rotations are the same for
all classes. Each class has a usual colour, which one object in seven does not have, so that the outline counts too.
Objects overlap and extend beyond the image, and some images have none. A small network learns it from random weights in
minutes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from lightning_convnext_det.errors import DataError

CLASS_NAMES = ("disc", "ring", "square", "triangle", "star")
MIN_VISIBLE = 0.6  # of an object's pixels; less is not drawn
EMPTY_FRACTION = 0.06  # of the images, so that several hundred hold a few dozen negatives
MAX_OBJECTS = 8
MIN_RADIUS, MAX_RADIUS = 0.07, 0.24  # of the shorter side: objects of about 30 to 120 pixels
STRAY_FRACTION = 1 / 7  # of the objects have any colour
USUAL_COLOURS = {
    "disc": (215, 60, 50),
    "ring": (60, 180, 75),
    "square": (50, 90, 220),
    "triangle": (230, 190, 40),
    "star": (180, 60, 190),
}
MIN_CONTRAST = 60.0  # distance of the mean colours of an object and of what it covers, of 441 at most

Mask = NDArray[np.bool_]
Colours = NDArray[np.float32]


class Scene(NamedTuple):
    """A synthetic image and its objects."""

    image: NDArray[np.uint8]
    """RGB, [H, W, 3]."""
    masks: Mask
    """The visible pixels of each object, [N, H, W]."""
    labels: NDArray[np.int64]
    """Indices into ``CLASS_NAMES``, [N]."""

    def boxes(self) -> NDArray[np.int64]:
        """Corners (x1, y1, x2, y2) of the visible pixels, x2 and y2 exclusive, [N, 4]."""
        corners = np.zeros((len(self.masks), 4), np.int64)
        for row, mask in enumerate(self.masks):
            ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            corners[row] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
        return corners


def write_synthetic_coco(
    folder: str | Path,
    num_train: int = 400,
    num_val: int = 80,
    num_test: int = 0,
    seed: int = 0,
    min_side: int = 192,
    max_side: int = 256,
) -> Path:
    """Write ``annotations/instances_SPLIT.json`` and a folder ``SPLIT`` of JPEG files for each split.

    The same arguments give the same images; an image does not depend on the number of images.

    Args:
        folder: to write to; created if it does not exist.
        num_train: number of training images.
        num_val: number of validation images.
        num_test: number of test images; 0 writes no such split.
        seed: of all random numbers.
        min_side: smallest side of an image in pixels.
        max_side: largest side of an image in pixels.

    Returns:
        The folder.

    Raises:
        DataError: if the folder holds annotations already.
    """
    folder = Path(folder)
    annotations = folder / "annotations"
    if annotations.exists():
        raise DataError(f"[LCD-D010] {annotations} exists already; remove it or choose another folder.")
    annotations.mkdir(parents=True)
    for number, (split, count) in enumerate({"train": num_train, "val": num_val, "test": num_test}.items()):
        if count:
            (folder / split).mkdir(exist_ok=True)
            content = _write_images(folder / split, count, (seed, number), (min_side, max_side))
            (annotations / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def draw_scene(generator: np.random.Generator, height: int, width: int) -> Scene:
    """Draw an image with up to 8 objects, later ones in front of earlier ones."""
    muted = 128 + 0.35 * (_colours(generator, 3) - 128)
    canvas = _texture(generator, height, width, muted)
    canvas = _with_strokes(generator, canvas)
    count = 0 if generator.random() < EMPTY_FRACTION else int(generator.integers(1, MAX_OBJECTS + 1))
    masks = np.zeros((0, height, width), np.bool_)
    labels: list[int] = []
    pixels = np.zeros(0, np.int64)  # of each object, were nothing in front of it and the image larger
    for _ in range(3 * count):
        if len(labels) == count:
            break
        label = int(generator.integers(len(CLASS_NAMES)))
        mask, whole = _random_outline(generator, CLASS_NAMES[label], height, width)
        covered = masks & ~mask
        if mask.sum() < MIN_VISIBLE * whole or (covered.sum(axis=(1, 2)) < MIN_VISIBLE * pixels).any():
            continue
        masks = np.concatenate([covered, mask[None]])
        labels.append(label)
        pixels = np.append(pixels, whole)
        _paint(generator, canvas, mask, CLASS_NAMES[label])
    return Scene(_photograph(generator, canvas), masks, np.array(labels, np.int64))


def _write_images(folder: Path, count: int, seed: tuple[int, int], sides: tuple[int, int]) -> dict[str, object]:
    """Draw and save the images of a split; return its annotations in COCO's form."""
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index in range(count):
        generator = np.random.default_rng((*seed, index))
        height, width = (int(side) for side in generator.integers(sides[0], sides[1], 2, endpoint=True))
        scene = draw_scene(generator, height, width)
        name = f"{index + 1:06d}.jpg"
        Image.fromarray(scene.image).save(folder / name, quality=90)
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for mask, label, (x1, y1, x2, y2) in zip(scene.masks, scene.labels, scene.boxes().tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": int(label) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)]
    return {"info": {"seed": seed[0]}, "images": images, "annotations": annotations, "categories": categories}


def _random_outline(generator: np.random.Generator, name: str, height: int, width: int) -> tuple[Mask, int]:
    """Draw a shape of random size, position and rotation: its mask [H, W], and its number of pixels before clipping."""
    radius = min(height, width) * float(np.exp(generator.uniform(np.log(MIN_RADIUS), np.log(MAX_RADIUS))))
    stretch = float(generator.uniform(0.8, 1.25))
    angle = float(generator.uniform(0, 2 * np.pi))
    centre_y, centre_x = float(generator.uniform(0, height)), float(generator.uniform(0, width))
    reach = int(1.5 * radius) + 2  # the corner of a stretched square: 0.85 x sqrt(2) x 1.25
    top, left = int(centre_y) - reach, int(centre_x) - reach
    bottom, right = top + 2 * reach + 1, left + 2 * reach + 1
    ys, xs = np.mgrid[top:bottom, left:right].astype(np.float32)
    dy, dx = (ys - centre_y) / radius, (xs - centre_x) / radius
    u = (np.cos(angle) * dx + np.sin(angle) * dy) * stretch
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / stretch
    inside = _INSIDE[name](u, v)
    mask = np.zeros((height, width), np.bool_)
    seen = inside[max(-top, 0) : height - top, max(-left, 0) : width - left]
    mask[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)] = seen
    return mask, int(inside.sum())


def _inside_star(u: Colours, v: Colours) -> Mask:
    """Five points of radius 1.15, notches of 0.5: the edge between them is straight in polar form."""
    sector = np.pi / 5
    turn = np.abs((np.arctan2(v, u) + sector) % (2 * sector) - sector)  # angle to the nearest point
    tip, notch_x, notch_y = 1.15, 0.5 * np.cos(sector), 0.5 * np.sin(sector)
    x, y = np.hypot(u, v) * np.cos(turn), np.hypot(u, v) * np.sin(turn)
    return np.asarray((x - notch_x) * notch_y <= (notch_y - y) * (tip - notch_x))


_INSIDE: dict[str, Callable[[Colours, Colours], Mask]] = {
    "disc": lambda u, v: u**2 + v**2 <= 1,
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.55**2),
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.85,
    "triangle": lambda u, v: (v >= -0.55) & (v <= 1.1 - np.sqrt(3) * np.abs(u)),
    "star": _inside_star,
}


def _colours(generator: np.random.Generator, count: int) -> Colours:
    """RGB in 0 ... 255, [count, 3]."""
    return generator.uniform(20, 235, (count, 3)).astype(np.float32)


def _texture(generator: np.random.Generator, height: int, width: int, colours: Colours) -> Colours:
    """A cloud of several scales that blends the colours one into the next, [H, W, 3]."""
    field = np.zeros((height, width), np.float32)
    for octave in range(4):
        cells = generator.random((2 + 3 * 2**octave, 2 + 3 * 2**octave)).astype(np.float32)
        field += np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    field = (field - field.min()) / (field.max() - field.min()) * (len(colours) - 1)
    lower = np.minimum(field.astype(np.int64), len(colours) - 2)
    part = (field - lower)[..., None]
    return np.asarray(colours[lower] * (1 - part) + colours[lower + 1] * part, np.float32)


def _with_strokes(generator: np.random.Generator, canvas: Colours) -> Colours:
    """Draw lines and arcs that belong to no class."""
    height, width = canvas.shape[:2]
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for colour in _colours(generator, int(generator.integers(2, 8))):
        ink = (int(colour[0]), int(colour[1]), int(colour[2]))
        x, y = generator.uniform(0, width), generator.uniform(0, height)
        reach, stroke = generator.uniform(10, 60), int(generator.integers(1, 5))
        if generator.random() < 0.5:
            ends = [(x, y)] + [(x + dx, y + dy) for dx, dy in generator.uniform(-reach, reach, (3, 2))]
            draw.line(ends, fill=ink, width=stroke)
        else:
            start = generator.uniform(0, 360)
            draw.arc(
                (x - reach, y - reach, x + reach, y + reach), start, start + generator.uniform(40, 150), ink, stroke
            )
    return np.asarray(image, np.float32)


def _shades(generator: np.random.Generator, name: str) -> Colours:
    """Two shades of a class's usual colour, or of any colour, [2, 3]."""
    usual = np.array(USUAL_COLOURS[name], np.float32) + 25 * generator.standard_normal(3, np.float32)
    colour = _colours(generator, 1)[0] if generator.random() < STRAY_FRACTION else usual
    return np.stack([colour, colour * generator.uniform(0.45, 0.85)]).clip(0, 255).astype(np.float32)


def _paint(generator: np.random.Generator, canvas: Colours, mask: Mask, name: str) -> None:
    """Fill a mask with two shades in a random pattern under light from one side; changes the canvas."""
    ys, xs = np.nonzero(mask)
    below = canvas[ys, xs].mean(axis=0)
    pair = _shades(generator, name)
    while np.linalg.norm(pair.mean(axis=0) - below) < MIN_CONTRAST:
        pair = _shades(generator, name)
    angle = generator.uniform(0, np.pi)
    along, across = np.cos(angle) * xs + np.sin(angle) * ys, np.cos(angle) * ys - np.sin(angle) * xs
    period = generator.uniform(4, 14)
    patterns = {
        "plain": np.full(len(xs), 0.15),
        "stripes": (np.sin(2 * np.pi * along / period) > 0) * 1.0,
        "checks": (np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period) > 0) * 1.0,
        "gradient": (along - along.min()) / max(float(np.ptp(along)), 1.0),
    }
    blend = patterns[str(generator.choice(list(patterns)))][:, None]
    light = 1 + generator.uniform(0, 0.3) * ((across - across.mean()) / max(float(np.ptp(across)), 1.0))[:, None]
    canvas[ys, xs] = (pair[0] * (1 - blend) + pair[1] * blend) * light


def _photograph(generator: np.random.Generator, canvas: Colours) -> NDArray[np.uint8]:
    """A slightly blurred image with the noise of a sensor, [H, W, 3]."""
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(float(generator.uniform(0.3, 0.8)))), np.float32)
    noise = generator.uniform(1, 6) * generator.standard_normal(canvas.shape, np.float32)
    return np.asarray((blurred + noise).clip(0, 255), np.uint8)
