"""One annotation file of Pascal VOC, read with the caution that a file from elsewhere needs.

Entities and document types are refused before the parser sees them, sizes and depths are limited: a file of a megabyte
can nest so deep that its tree takes 300 MB.
"""

from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from lightning_convnext_det.data.annotations import UnreadableError
from lightning_convnext_det.data.io.files import regular

MAX_BYTES = 10 << 20  # of one file; a thousand objects take 400 kB
MAX_DEPTH = 32  # of nested elements; VOC has 5
_PART = 1 << 16  # bytes handed to the parser at a time: it reads to the end of a part that is nested too deep


class VocObject(NamedTuple):
    """A box and what is in it, as written."""

    name: str
    difficult: bool
    corners: tuple[float, ...]
    """xmin, ymin, xmax, ymax."""
    number: int
    """Among the objects of the file, from 1."""


class VocAnnotation(NamedTuple):
    """What a file says about its image."""

    file_name: str
    size: tuple[int, int]
    """Height and width; 0, 0 if not stated."""
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


def read_xml(path: Path) -> VocAnnotation:
    """Read one annotation file.

    Raises:
        UnreadableError: a DataError, if it is no XML, declares entities, is huge or nested deep, or no annotation.
    """
    try:
        with open(path, "rb", opener=regular) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        if b"<!DOCTYPE" in content or b"<!ENTITY" in content or b"\0" in content:  # zeros: UTF-16 would hide the others
            raise ValueError("document types, entities and UTF-16 are not accepted")
        parser = ElementTree.XMLParser(target=_ShallowBuilder())
        for start in range(0, len(content), _PART):
            parser.feed(content[start : start + _PART])
        root = parser.close()
        if root.tag != "annotation":
            raise ValueError(f"expected <annotation>, found <{root.tag}>")
        size = (_side(root, "height"), _side(root, "width"))
    except ElementTree.ParseError as error:
        raise UnreadableError.of("LCD-D005", path, f"no XML: {error}") from error
    except (OSError, ValueError, LookupError) as error:  # LookupError: an encoding that Python does not know
        raise UnreadableError.of("LCD-D005", path, str(error)) from error
    objects, malformed = [], []
    for number, element in enumerate(root.findall("object"), 1):
        try:
            objects.append(_object(element, number))
        except ValueError as error:
            malformed.append((number, str(error)))
    return VocAnnotation((root.findtext("filename") or "").strip(), size, tuple(objects), tuple(malformed))


def _side(root: ElementTree.Element, name: str) -> int:
    """Height or width as stated, 0 if it is not."""
    text = (root.findtext(f"size/{name}") or "0").strip()
    try:
        side = float(text)
    except ValueError:
        side = -1.0
    if not 0 <= side < 1 << 31 or side != int(side):
        raise ValueError(f"<size>/<{name}> is {text!r}; expected a count of pixels")
    return int(side)


def _object(element: ElementTree.Element, number: int) -> VocObject:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError("<name> missing")
    corners = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = element.findtext(f"bndbox/{tag}")
        if text is None:
            raise ValueError(f"<bndbox>/<{tag}> missing")
        try:
            corners.append(float(text))
        except ValueError as error:
            raise ValueError(f"<bndbox>/<{tag}> is {text.strip()!r}; expected a number") from error
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"<difficult> is {difficult!r}; expected 0 or 1")
    return VocObject(name, difficult == "1", tuple(corners), number)
