"""The text files in which YOLO states boxes: ``class x y width height`` per line, relative to the image."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_convnext_det.data.formats.records import AnnotationProblems, Where
from lightning_convnext_det.data.io.files import read_text, regular
from lightning_convnext_det.data.io.listing import walk_images

OVERHANG = 0.01  # that a relative value may leave [0, 1] by; Ultralytics accepts as much
_CLASS = re.compile(r"[0-9]{1,9}(?:\.0*)?")


class YoloLine(NamedTuple):
    """A box as written."""

    image: int
    label: int
    box: tuple[float, ...]
    """Relative centre, width, height."""
    number: int
    """Of the line in its file, from 1."""


def read_labels(
    root: Path, images: Sequence[str], num_classes: int | None, findings: AnnotationProblems, where: Where
) -> tuple[list[YoloLine], list[str]]:
    """The boxes of all images, and for each image the file that they are in, relative to the root.

    Args:
        root: folder that ``images`` are relative to.
        images: files.
        num_classes: higher labels are refused; None where the number is not known.
        findings: gets what is wrong with a line.
        where: what problems of the split as a whole name.
    """
    lines: list[YoloLine] = []
    files: list[str] = []
    lacking: list[str] = []
    outlines = 0
    for index, image in enumerate(images):
        text, file = _label_text(root, image, findings)
        files.append(file)
        if text is None:
            lacking.append(image)
        for number, line in enumerate((text or "").splitlines(), 1):
            if not (words := line.split()):
                continue
            try:
                label, box = _parse(words)
            except ValueError as error:
                findings.refuse("LCD-D006", (file, f"line {number}"), str(error))
                continue
            outlines += len(words) > 5
            if num_classes is not None and label >= num_classes:
                reason = (
                    f"class {label}, but there are {num_classes} class names; classes run from 0 to {num_classes - 1}"
                )
                findings.refuse("LCD-D110", (file, f"line {number}"), reason)
            else:
                lines.append(YoloLine(index, label, box, number))
    if outlines:
        findings.note("LCD-D123", where, f"{outlines} lines are outlines; their bounding boxes are taken")
    if lacking and len(lacking) == len(images):
        findings.suspect("LCD-D124", where, f"no image has a label file; looked for {files[0]!r} and the like")
    elif lacking:
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        findings.note(
            "LCD-D124", where, f"{len(lacking)} images have no label file and count as without objects: {shown}"
        )
    return lines, files


def label_files(image: str) -> tuple[str, str]:
    """Where an image's boxes may be: below ``labels`` instead of the last ``images`` of its path, or beside it."""
    parts = image.split(os.sep)
    for level in reversed(range(len(parts) - 1)):
        if parts[level] == "images":
            parts[level] = "labels"
            break
    return os.path.splitext(os.sep.join(parts))[0] + ".txt", os.path.splitext(image)[0] + ".txt"


def _label_text(root: Path, image: str, findings: AnnotationProblems) -> tuple[str | None, str]:
    """The text that states the boxes of an image, None if there is none, and its file relative to the root."""
    usual, beside = label_files(image)
    if image.startswith((os.pardir, os.sep)) or "\0" in image:  # refused with its name when the images are checked
        return "", usual
    for file in dict.fromkeys((usual, beside)):
        try:
            return read_text(root / file), file
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            findings.refuse("LCD-D006", (file, ""), f"cannot be read as UTF-8 text ({error})")
            return "", file
    return None, usual


def _parse(words: Sequence[str]) -> tuple[int, tuple[float, ...]]:
    """Label and relative centre, width, height of a line; raises ValueError with the reason why it is none."""
    if len(words) == 6:
        raise ValueError(
            "6 numbers; expected class, centre x, centre y, width, height (are these detections with scores?)"
        )
    if len(words) < 5 or len(words) % 2 == 0:
        raise ValueError(
            f"{len(words)} numbers; expected class, centre x, centre y, width, height, or class and an outline"
        )
    if not _CLASS.fullmatch(words[0]):
        raise ValueError(f"class {words[0]!r}; expected 0, 1, 2, ...")
    try:
        values = tuple(float(word) for word in words[1:])
    except ValueError as error:
        raise ValueError(f"expected numbers, found {' '.join(words[1:5])!r}") from error
    if any(abs(value - 0.5) > 0.5 + OVERHANG for value in values):  # false for nan, which is refused as not finite
        raise ValueError(f"{' '.join(words[1:5])!r} is not relative to the image: expected values from 0 to 1")
    if len(values) > 4:
        left, right, top, bottom = min(values[::2]), max(values[::2]), min(values[1::2]), max(values[1::2])
        values = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    return int(float(words[0])), values


def looks_like_yolo(folder: Path, root: Path) -> bool:
    """Whether one of the first images in a folder, or below it, has a label file with a line as YOLO's."""
    for image in walk_images([folder])[:50]:
        for file in label_files(os.path.relpath(image, root)):
            try:
                with open(root / file, encoding="utf-8-sig", opener=regular) as text:
                    words = text.readline(1000).split()
            except (OSError, UnicodeDecodeError):
                continue
            if len(words) >= 5 and all(re.fullmatch(r"[-+\d.eE]+", word) for word in words):
                return True
    return False
