"""Reader of CVAT's own XML, "CVAT for images": all images of a split and their boxes in one file.

Boxes are corners in pixels, counted from 0. Of polygons, masks' frames and rotated boxes the bounding box is taken, and
noted. In a :class:`Split`, ``annotations`` is the XML file and ``images`` the folders that may hold the images.

Reference:
    https://docs.cvat.ai/docs/manual/advanced/xml_format/
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from lightning_convnext_det.data.annotations import (
    DetectionAnnotations,
    Split,
    UnreadableError,
    canonical_split,
    count_offsets,
)
from lightning_convnext_det.data.formats.coco_layout import image_folders, split_words
from lightning_convnext_det.data.formats.exif_frames import Exif
from lightning_convnext_det.data.formats.file_names import choose_folder, encode_names
from lightning_convnext_det.data.formats.problems import AnnotationProblems, InvalidAnnotations, Source
from lightning_convnext_det.data.formats.validation import validate_annotations
from lightning_convnext_det.data.formats.voc_xml import parse_xml
from lightning_convnext_det.data.io.decode import MAX_PIXELS
from lightning_convnext_det.data.io.files import open_file
from lightning_convnext_det.data.io.listing import folder_names, list_names

MAX_BYTES = 512 << 20  # of one file; a million boxes take 200 MB
_BOXES = ("box", "polygon", "mask", "ellipse")


class _Shape(NamedTuple):
    """A shape as a box."""

    image: int
    label: str
    corners: tuple[float, ...]
    number: int
    """Among the shapes of its image, from 1."""


def read_cvat(
    split: Split,
    *,
    class_names: Sequence[str] | None = None,
    invalid_annotations: InvalidAnnotations = "auto",
    exif: Exif = "auto",
    check_images: bool = True,
    follow_symlinks: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> DetectionAnnotations:
    """Read a split; refused records are left out and listed in ``problems``.

    Args:
        split: what :func:`find_cvat` finds.
        class_names: names of the classes in order of label (default: the labels of the task in the file's order, or
            those of the shapes, sorted).
        invalid_annotations: see ``problems.py``.
        exif: see ``exif_frames.py``.
        check_images: see ``exif_frames.py``.
        follow_symlinks: see ``exif_frames.py``.
        max_pixels: see ``exif_frames.py``.

    Raises:
        UnreadableError: a DataError, if the file as a whole cannot be used.
    """
    problems = AnnotationProblems(invalid_annotations)
    path = split.annotations[0]
    file = os.path.relpath(path, split.root)
    root = parse_xml(path, MAX_BYTES)
    if root.tag != "annotations" or root.find("track") is not None:
        raise UnreadableError.of("LCD-D005", path, "expected CVAT for images 1.1; export the task in that format")
    images = root.findall("image")
    shapes = _shapes(images, file, problems)
    names = tuple(class_names) if class_names is not None else _class_names(root, shapes)
    label_of = {name: label for label, name in enumerate(names)}
    for one in shapes:
        if one.label not in label_of:
            reason = f"class {one.label!r} is not among {names}"
            problems.refuse("LCD-D110", (file, _place(images[one.image], one.number)), reason)
    shapes = [one for one in shapes if one.label in label_of]
    file_names = [image.get("name", "") for image in images]
    annotations = DetectionAnnotations(
        image_root=choose_folder(split.images, file_names),
        file_names=encode_names(file_names),
        image_ids=np.arange(1, len(images) + 1),
        sizes=np.array([(_side(i, "height", path), _side(i, "width", path)) for i in images], np.int32).reshape(-1, 2),
        upright=np.zeros(len(images), np.bool_),
        boxes=np.array([one.corners for one in shapes], np.float64).reshape(-1, 4),
        labels=np.array([label_of[one.label] for one in shapes], np.int64),
        crowd=np.zeros(len(shapes), np.bool_),
        area=np.zeros(len(shapes)),
        annotation_ids=np.arange(1, len(shapes) + 1),
        offsets=count_offsets([one.image for one in shapes], len(images)),
        class_names=names,
        category_ids=tuple(range(1, len(names) + 1)),
    )
    source = Source(
        format="cvat",
        root=split.root,
        file_names=file_names,
        image_place=lambda index: (file, f"image {file_names[index]!r}"),
        box_place=lambda row: (file, _place(images[shapes[row].image], shapes[row].number)),
        first_pixel=0,
    )
    return validate_annotations(
        annotations,
        source,
        problems,
        exif=exif,
        check_images=check_images,
        follow_symlinks=follow_symlinks,
        max_pixels=max_pixels,
    )


def _place(image: ElementTree.Element, number: int) -> str:
    return f"object {number} of {image.get('name', '')!r}"


def _shapes(images: Sequence[ElementTree.Element], file: str, problems: AnnotationProblems) -> list[_Shape]:
    """The boxes of all images; what has no box is counted."""
    shapes = []
    outlines, others = 0, Counter[str]()
    for index, image in enumerate(images):
        for number, element in enumerate(image, 1):
            if element.tag not in _BOXES:
                others[element.tag] += 1
                continue
            try:
                corners = _corners(element)
            except (TypeError, ValueError) as error:
                problems.refuse("LCD-D005", (file, _place(image, number)), f"<{element.tag}> is malformed ({error})")
                continue
            outlines += element.tag != "box" or bool(float(element.get("rotation", "0")))
            shapes.append(_Shape(index, element.get("label", ""), corners, number))
    if outlines:
        reason = f"{outlines} shapes are outlines or rotated boxes; their bounding boxes are taken"
        problems.note("LCD-D123", (file, ""), reason)
    if others:
        reason = ", ".join(f"{count} <{tag}>" for tag, count in others.items())
        problems.note("LCD-D123", (file, ""), f"shapes without a box are left out: {reason}")
    return shapes


def _corners(element: ElementTree.Element) -> tuple[float, ...]:
    """xmin, ymin, xmax, ymax of a shape."""

    def number(key: str) -> float:
        return float(element.get(key, "missing"))

    if element.tag == "mask":
        return number("left"), number("top"), number("left") + number("width"), number("top") + number("height")
    if element.tag == "polygon":
        points = [[float(value) for value in point.split(",")] for point in element.get("points", "").split(";")]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        return min(xs), min(ys), max(xs), max(ys)
    if element.tag == "ellipse":
        x, y, rx, ry = number("cx"), number("cy"), number("rx"), number("ry")
        corners = (x - rx, y - ry, x + rx, y + ry)
    else:
        corners = (number("xtl"), number("ytl"), number("xbr"), number("ybr"))
    angle = math.radians(float(element.get("rotation", "0")))
    if not angle:
        return corners
    x, y = (corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2
    half_width, half_height = (corners[2] - corners[0]) / 2, (corners[3] - corners[1]) / 2
    sine, cosine = abs(math.sin(angle)), abs(math.cos(angle))
    if element.tag == "ellipse":
        across = math.hypot(half_width * cosine, half_height * sine)
        down = math.hypot(half_width * sine, half_height * cosine)
    else:
        across, down = half_width * cosine + half_height * sine, half_width * sine + half_height * cosine
    return x - across, y - down, x + across, y + down


def _side(image: ElementTree.Element, key: str, path: Path) -> int:
    text = image.get(key, "0")
    if not text.isdecimal() or int(text) >= 1 << 31:
        place = f"image {image.get('name', '')!r}"
        raise UnreadableError.of("LCD-D005", path, f"{key} is {text!r}; expected a count of pixels", place)
    return int(text)


def _class_names(root: ElementTree.Element, shapes: Sequence[_Shape]) -> tuple[str, ...]:
    """The labels that the task declares, in its order; those of the shapes, sorted, if it declares none."""
    declared = [(name.text or "").strip() for name in root.findall("meta//labels/label/name")]
    used = {one.label for one in shapes}
    kept = [name for name in dict.fromkeys(declared) if name]
    return tuple(kept) if used <= set(kept) and kept else tuple(sorted(used))


def find_cvat(root: Path) -> dict[str, Split]:
    """Find the XML files in a folder, or in its folders named like splits."""
    found = {}
    places = [("", root)] + [(canonical_split(name), root / name) for name in folder_names(root)]
    for key, folder in places:
        files = [folder / name for name in list_names(folder, ".xml")]
        files = [file for file in files[:50] if looks_like_cvat(file)]
        for file in files:
            words = canonical_split(split_words(file.stem))
            name = key or (words if words in ("train", "val", "test", "trainval") or len(files) > 1 else "train")
            if name not in found and (not key or key in ("train", "val", "test", "trainval")):
                found[name] = Split(name, "cvat", root, (file,), image_folders(root, file, (name,)))
    return found


def looks_like_cvat(path: Path) -> bool:
    """Whether a file begins like CVAT's XML."""
    try:
        with open_file(path) as file:
            return b"<annotations>" in file.read(1024)
    except OSError:
        return False
