"""Finding the images of a split, and the frame that their boxes refer to.

Labelling tools disagree about EXIF: some store boxes of the image as a viewer turns it, others of the pixels as
stored. The annotated size tells which. Where it cannot (no size, a square, a half turn), the other images of the
split do, and if these say nothing either, the user is asked.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.data.annotations import UnreadableError
from lightning_convnext_det.data.formats.records import AnnotationProblems, Records, Where
from lightning_convnext_det.data.io.decode import read_size
from lightning_convnext_det.data.io.listing import is_utf8, list_names

Exif = Literal["auto", "upright", "raw"]

_REMEDY = "say which by exif: upright or exif: raw"


class ImageFrames(NamedTuple):
    """The frame that the boxes of each image refer to."""

    sizes: NDArray[np.int32]
    """Height and width in pixels, int32 [N, 2]."""
    upright: NDArray[np.bool_]
    """Whether the EXIF orientation must be applied to get it, bool [N]."""
    usable: NDArray[np.bool_]
    """False where the image is left out or refused, bool [N]."""


def resolve_frames(
    records: Records,
    findings: AnnotationProblems,
    exif: Exif = "auto",
    check_images: bool = True,
    follow_symlinks: bool = True,
) -> ImageFrames:
    """Read the header of every image, once, and settle the frame of its boxes.

    Args:
        records: what the annotation files state.
        findings: takes note of missing and damaged images, sizes that differ, frames that are unknown.
        exif: ``auto`` lets the annotated size decide, ``upright`` and ``raw`` say what the boxes were drawn on.
        check_images: without it only images of unstated size are opened, and the others are taken as they are stated,
            in the stored frame: for millions of images on slow storage.
        follow_symlinks: without it an image whose real path is outside the root is refused.

    Raises:
        ValueError: if ``exif`` is not one of its values.
    """
    if exif not in ("auto", "upright", "raw"):
        raise ValueError(f"exif is {exif!r}; it can be 'auto', 'upright' or 'raw'")
    raw, orientation, usable = _measure(records, findings, check_images, follow_symlinks)
    stated = (records.sizes > 0).all(axis=1)
    turned = np.where((orientation >= 5)[:, None], raw[:, ::-1], raw)
    fits_raw = stated & (records.sizes == raw).all(axis=1)
    fits_turned = stated & (records.sizes == turned).all(axis=1)
    oriented = usable & (orientation != 1)
    upright = oriented & (exif == "upright")
    if exif == "auto":
        _refuse_unstated(records, findings, orientation, oriented & ~stated, usable)
        upright = oriented & fits_turned & ~fits_raw
        stored = bool((oriented & fits_raw & ~fits_turned).any())
        _settle(records, findings, orientation, oriented & fits_raw & fits_turned, stored, upright, usable)
    fits = np.where(upright, fits_turned, fits_raw)
    for index in np.flatnonzero(usable & stated & ~fits):
        height, width = (turned if upright[index] else raw)[index]
        reason = f"the image is {width}x{height}{_turn(orientation[index])}, the annotation says "
        reason += f"{records.sizes[index, 1]}x{records.sizes[index, 0]} (width x height)"
        findings.refuse("LCD-I020", _image(records, index), reason)
        usable[index] = False
    return ImageFrames(np.where(upright[:, None], turned, raw), upright, usable)


def _measure(
    records: Records, findings: AnnotationProblems, check_images: bool, follow_symlinks: bool
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
    """Stored sizes [N, 2], orientations [N], and which images can be used [N]."""
    raw = records.sizes.copy()
    orientation = np.ones(len(raw), np.int64)
    usable = np.ones(len(raw), np.bool_)
    outside = _outside_check(records.root, records.image_root, follow_symlinks)
    folders: dict[Path, dict[str, str]] = {}
    for index, name in enumerate(records.file_names):
        if reason := outside(name):
            findings.refuse("LCD-S001", records.image_where(index), f"file name {name!r} {reason}")
            usable[index] = False
        elif check_images or raw[index].min() <= 0:
            try:
                size = read_size(os.path.join(records.image_root, name))
            except UnreadableError as error:
                problem = error.problem_of(name)
                reason = problem.reason
                if problem.code == "LCD-I003":
                    reason += f" in {records.image_root}" + _suggestion(records.image_root / name, folders)
                findings.refuse(problem.code, _image(records, index), reason)
                usable[index] = False
            else:
                raw[index] = size[:2]
                orientation[index] = size.orientation
    return raw, orientation, usable


def _refuse_unstated(
    records: Records,
    findings: AnnotationProblems,
    orientation: NDArray[np.int64],
    unstated: NDArray[np.bool_],
    usable: NDArray[np.bool_],
) -> None:
    """Refuse turned images without an annotated size; changes ``usable``."""
    for index in np.flatnonzero(unstated):
        reason = (
            f"EXIF orientation {orientation[index]}, and no annotated size tells whether the boxes are of the upright"
        )
        findings.refuse("LCD-I024", _image(records, index), f"{reason} or of the stored image; {_REMEDY}")
        usable[index] = False


def _settle(
    records: Records,
    findings: AnnotationProblems,
    orientation: NDArray[np.int64],
    ambiguous: NDArray[np.bool_],
    stored: bool,
    upright: NDArray[np.bool_],
    usable: NDArray[np.bool_],
) -> None:
    """Treat images whose size fits both frames as the others of the split; changes ``upright`` and ``usable``."""
    turned = bool(upright.any())
    for index in np.flatnonzero(ambiguous):
        reason = f"EXIF orientation {orientation[index]}, and the annotated size fits the upright and the stored image"
        if turned and stored:
            findings.refuse("LCD-I025", _image(records, index), f"{reason}, as others of the split differ; {_REMEDY}")
            usable[index] = False
        elif turned or stored:
            findings.note("LCD-I025", _image(records, index), f"{reason}; taken as the others of the split are")
        else:
            findings.note("LCD-I025", _image(records, index), f"{reason}; taken as stored; else {_REMEDY}")
    upright |= ambiguous & usable & turned


def _image(records: Records, index: int | np.intp) -> Where:
    """Names an image, not the file that annotates it."""
    return os.path.relpath(records.image_root / records.file_names[index], records.root), ""


def _turn(orientation: np.int64) -> str:
    return f", EXIF orientation {orientation}" if orientation != 1 else ""


def _outside_check(root: Path, image_root: Path, follow_symlinks: bool) -> Callable[[str], str]:
    """A function that says in what way a file name leaves ``root``; empty if it does not."""
    depth = len(image_root.relative_to(root).parts)
    real_root = os.path.realpath(root)

    def outside(name: str) -> str:
        if reason := _leaves(name, depth):
            return reason
        if not follow_symlinks and not _within(os.path.realpath(os.path.join(image_root, name)), real_root):
            return f"is a link out of {root}, and follow_symlinks is off"
        return ""

    return outside


def _leaves(name: str, depth: int) -> str:
    """In what way a name, taken from a folder ``depth`` levels below the root, is no path inside the root."""
    if not name or name == ".":
        return "names no file"
    if "\0" in name or not is_utf8(name):
        return "holds bytes that no UTF-8 file name has"
    if "://" in name:
        return "is an address; images are read from disk only"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name):
        return "is absolute; it must be relative to the folder of the images"
    if ".." in name:
        for part in re.split(r"[/\\]", name):
            depth += -1 if part == ".." else part not in ("", ".")
            if depth < 0:
                return "leads out of the root"
    return ""


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _suggestion(path: Path, folders: dict[Path, dict[str, str]]) -> str:
    """The file that may be meant: the same name in another case or with another ending."""
    if "\\" in path.name:
        return "; the name holds backslashes, folders are separated by /"
    if path.parent not in folders:
        names = list_names(path.parent)
        folders[path.parent] = {Path(name).stem.lower(): name for name in names} | {n.lower(): n for n in names}
    names_by_key = folders[path.parent]
    close = names_by_key.get(path.name.lower()) or names_by_key.get(path.stem.lower())
    return f"; is {close!r} meant?" if close else ""
