"""Safe XML parsing, and the annotation files of Pascal VOC.

Entities and document types are refused before the parser sees them, sizes and depths are limited: a file of a megabyte
can nest so deep that its tree takes 300 MB.
"""

import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from lightning_convnext_det.data.annotations import UnreadableError
from lightning_convnext_det.data.io.files import open_file

MAX_BYTES = 10 << 20  # of one file; a thousand objects take 400 kB
MAX_DEPTH = 32  # of nested elements; VOC has 5
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FLAGS = dict.fromkeys(("0", "0.0", "false", "no", "unspecified"), False)
_FLAGS |= dict.fromkeys(("1", "1.0", "true", "yes"), True)
_PART = 1 << 16  # bytes handed to the parser at a time: it reads to the end of a part that is nested too deep


class VocObject(NamedTuple):
    """An object with its box as written."""

    name: str
    difficult: bool
    corners: tuple[float, ...]
    """xmin, ymin, xmax, ymax."""
    number: int
    """Among the objects of the file, from 1."""
    outline: bool
    """Whether the corners are those of an outline."""


class VocAnnotation(NamedTuple):
    """Content of an annotation file."""

    file_name: str
    size: tuple[int, int]
    """Height and width; 0, 0 if missing."""
    objects: tuple[VocObject, ...]
    malformed: tuple[tuple[int, str], ...]
    """Number of an object that cannot be read, and why."""


class _ShallowBuilder(ElementTree.TreeBuilder):
    """Builds a tree of limited depth."""

    depth = 0

    def start(self, tag: str, attrs: dict[str, str], /) -> ElementTree.Element:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"elements are nested more than {MAX_DEPTH} deep")
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> ElementTree.Element:
        self.depth -= 1
        return super().end(tag)


def parse_xml(path: Path, max_bytes: int = MAX_BYTES) -> ElementTree.Element:
    """Parse a file of any encoding that Python knows.

    Raises:
        UnreadableError: a DataError, if it is not XML, declares entities, is huge or nested deep.
    """
    try:
        with open_file(path) as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ValueError(f"larger than {max_bytes >> 20} MiB")
        content = _as_utf8(content)
        if b"<!DOCTYPE" in content or b"<!ENTITY" in content or b"\0" in content:  # zeros: UTF-16 would hide the others
            raise ValueError("document types, entities and UTF-16 are not accepted")
        parser = ElementTree.XMLParser(target=_ShallowBuilder())
        for start in range(0, len(content), _PART):
            parser.feed(content[start : start + _PART])
        return parser.close()
    except ElementTree.ParseError as error:
        raise UnreadableError.of("LCD-D005", path, f"no XML: {error}") from error
    except (OSError, ValueError, LookupError) as error:  # LookupError: an encoding that Python does not know
        raise UnreadableError.of("LCD-D005", path, str(error)) from error


def _as_utf8(content: bytes) -> bytes:
    """A file in UTF-8: the parser knows no encodings of several bytes, such as GBK."""
    declared = re.match(rb"""\s*<\?xml[^>]*?encoding=["']([\w.-]+)["'][^>]*\?>""", content[:200])
    if declared is None or declared[1].lower() in (b"utf-8", b"utf8", b"ascii", b"us-ascii"):
        return content
    return content[declared.end() :].decode(declared[1].decode()).encode()


def read_xml(path: Path) -> VocAnnotation:
    """Read one annotation file.

    Raises:
        UnreadableError: a DataError, if it cannot be parsed or is not an annotation.
    """
    root = parse_xml(path)
    try:
        if root.tag == "annotations":
            raise ValueError("<annotations> is CVAT for images: read it by format cvat")
        if root.tag != "annotation":
            raise ValueError(f"expected <annotation>, found <{root.tag}>")
        size = (_side(root, "height"), _side(root, "width"))
    except ValueError as error:
        raise UnreadableError.of("LCD-D005", path, str(error)) from error
    objects, malformed = [], []
    for number, element in enumerate(root.findall("object"), 1):
        try:
            objects.append(_object(element, number))
        except ValueError as error:
            malformed.append((number, str(error)))
    return VocAnnotation((root.findtext("filename") or "").strip(), size, tuple(objects), tuple(malformed))


def _side(root: ElementTree.Element, name: str) -> int:
    """Annotated height or width, 0 if missing or -1."""
    text = (root.findtext(f"size/{name}") or "0").strip()
    try:
        side = float(text)
    except ValueError:
        side = -2.0
    if side == -1:
        return 0
    if not 0 <= side < 1 << 31 or side != int(side):
        raise ValueError(f"<size>/<{name}> is {text!r}; expected a count of pixels")
    return int(side)


def _object(element: ElementTree.Element, number: int) -> VocObject:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError("<name> missing")
    outline = element.find("polygon") if element.find("bndbox") is None else None
    corners = _corners(element) if outline is None else _outline_corners(outline)
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult.lower() not in _FLAGS:
        raise ValueError(f"<difficult> is {difficult!r}; expected 0 or 1")
    return VocObject(name, _FLAGS[difficult.lower()], corners, number, outline is not None)


def _corners(element: ElementTree.Element) -> tuple[float, ...]:
    if element.find("bndbox") is None and element.find("robndbox") is not None:
        raise ValueError("<robndbox> is a rotated box of roLabelImg; detectors here need upright boxes in <bndbox>")
    return tuple(_number(element.findtext(f"bndbox/{tag}"), f"<bndbox>/<{tag}>") for tag in _CORNERS)


def _outline_corners(outline: ElementTree.Element) -> tuple[float, ...]:
    """The bounding box of an outline of ``<x1>, <y1>, <x2>, ...`` or of ``<pt>/<x>, <y>``."""
    axes = []
    for axis in "xy":
        elements = [child for child in outline.iter() if re.fullmatch(rf"{axis}\d*", child.tag)]
        axes.append([_number(child.text, f"<polygon>/<{child.tag}>") for child in elements])
    if len(axes[0]) < 2 or len(axes[0]) != len(axes[1]):
        raise ValueError("<bndbox> missing, and <polygon> has no outline to take it from")
    return min(axes[0]), min(axes[1]), max(axes[0]), max(axes[1])


def _number(text: str | None, tag: str) -> float:
    if text is None:
        raise ValueError(f"{tag} missing")
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{tag} is {text.strip()!r}; expected a number") from error
