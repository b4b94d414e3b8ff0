"""YOLO's label files: ``class x y width height`` per line, relative to the image.

Longer lines are outlines (of which the bounding box is taken) or boxes with key points. ``kpt_shape`` in ``data.yaml``
says which; without it, lines that read well as boxes with their key points inside are refused with the question.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_convnext_det.data.formats.problems import AnnotationProblems, Place
from lightning_convnext_det.data.io.decode import IMAGE_SUFFIXES
from lightning_convnext_det.data.io.files import open_file, read_text
from lightning_convnext_det.data.io.listing import first_images, list_names

OVERHANG = 0.01  # that a relative value may leave [0, 1] by; Ultralytics accepts as much
IMAGE_FOLDERS = ("images", "jpegimages", "imgs", "img")  # in lower case; labels lie beside a folder of these names
LABEL_FOLDERS = ("labels", "Labels")
_NOT_LABELS = {"classes.txt", "train.txt", "val.txt", "valid.txt", "test.txt", "readme.txt", "notes.txt"}
_CLASS = re.compile(r"[0-9]{1,9}(?:\.0*)?")
_SHOWN = 3  # files named in a note


class YoloLine(NamedTuple):
    """A box as written."""

    image: int
    label: int
    box: tuple[float, ...]
    """Relative centre, width, height."""
    number: int
    """Of the line in its file, from 1."""


KeyPoints = tuple[int, int]
"""Number of key points of an object, and 2 or 3 numbers for each."""


def read_labels(
    root: Path,
    images: Sequence[str],
    num_classes: int | None,
    key_points: KeyPoints | None,
    problems: AnnotationProblems,
    place: Place,
    whole_folders: bool,
) -> tuple[list[YoloLine], list[str]]:
    """The boxes of all images, and for each image the file that they are in, relative to the root.

    Args:
        root: folder that ``images`` are relative to.
        images: files.
        num_classes: higher labels are refused; None where the number is not known.
        key_points: of each object; None where no file says.
        problems: gets what is wrong with a line.
        place: what problems of the split as a whole name.
        whole_folders: whether ``images`` are all of their folders, so that other label files have lost theirs.
    """
    lines: list[YoloLine] = []
    files: list[str] = []
    lacking: list[str] = []
    longer: list[list[str]] = []
    for index, image in enumerate(images):
        text, file = _label_text(root, image, problems)
        files.append(file)
        if text is None:
            lacking.append(image)
        for number, line in enumerate((text or "").splitlines(), 1):
            if not (words := line.split()):
                continue
            try:
                label, box = _parse(words, key_points)
            except ValueError as error:
                problems.refuse("LCD-D006", (file, f"line {number}"), str(error))
                continue
            if len(words) > 5:
                longer.append(words)
            if num_classes is not None and label >= num_classes:
                reason = (
                    f"class {label}, but there are {num_classes} class names; classes run from 0 to {num_classes - 1}"
                )
                problems.refuse("LCD-D110", (file, f"line {number}"), reason)
            else:
                lines.append(YoloLine(index, label, box, number))
    if longer and key_points is not None and key_points[0]:
        problems.note("LCD-D123", place, f"{len(longer)} lines have key points; their boxes are taken")
    elif longer:
        _note_outlines(longer, key_points is None, problems, place)
    _note_lacking(lacking, images, files, problems, place)
    _note_shared(images, files, lacking, problems, place)
    if whole_folders:
        _drop_orphans(root, images, set(files), problems, place)
    return lines, files


def _note_outlines(longer: Sequence[Sequence[str]], ask: bool, problems: AnnotationProblems, place: Place) -> None:
    """Note outlines, or ask where the lines could as well be boxes with key points."""
    if (shape := _likely_key_points(longer) if ask else None) is None:
        problems.note("LCD-D123", place, f"{len(longer)} lines are outlines; their bounding boxes are taken")
        return
    reason = (
        f"{len(longer)} lines have {len(longer[0])} numbers each: boxes with {shape[0]} key points, or outlines? For "
    )
    reason += f"key points set kpt_shape: [{shape[0]}, {shape[1]}] in data.yaml, for outlines kpt_shape: [0, 0]"
    problems.suspect("LCD-D156", place, reason)


def _likely_key_points(longer: Sequence[Sequence[str]]) -> KeyPoints | None:
    """The key points that lines of one length may have: all lie in the box of the first four numbers."""
    lengths = {len(words) for words in longer}
    if len(lengths) != 1:
        return None
    count = lengths.pop() - 5
    for size in (3, 2):
        if count % size == 0 and all(_has_key_points([float(word) for word in words[1:]], size) for words in longer):
            return count // size, size
    return None


def _has_key_points(values: Sequence[float], size: int) -> bool:
    """Whether a line reads as a box inside the image with its visible key points inside the box."""
    x, y, width, height = values[:4]
    points = [values[start : start + size] for start in range(4, len(values), size)]
    if size == 3 and not {point[2] for point in points} <= {0.0, 1.0, 2.0}:
        return False
    margin = 0.1 * max(width, height) + OVERHANG
    inside = [abs(p[0] - x) <= width / 2 + margin and abs(p[1] - y) <= height / 2 + margin for p in points]
    visible = [ok for ok, point in zip(inside, points, strict=True) if size == 2 or point[2] > 0]
    within = (
        width / 2 - OVERHANG <= x <= 1 + OVERHANG - width / 2
        and height / 2 - OVERHANG <= y <= 1 + OVERHANG - height / 2
    )
    return within and min(width, height) > 0 and all(visible) and bool(visible)


def _note_lacking(
    lacking: Sequence[str], images: Sequence[str], files: Sequence[str], problems: AnnotationProblems, place: Place
) -> None:
    """Note images without label files; suspect a split that has none."""
    if lacking and len(lacking) == len(images):
        reason = f"no image has a label file; looked for {files[0]!r} and the like"
        problems.suspect("LCD-D124", place, reason)
    elif lacking:
        reason = f"{len(lacking)} images have no label file and count as without objects: {_few(lacking)}"
        problems.note("LCD-D124", place, reason)


def _note_shared(
    images: Sequence[str], files: Sequence[str], lacking: Sequence[str], problems: AnnotationProblems, place: Place
) -> None:
    """Report label files that several images take their boxes from."""
    missing = set(lacking)
    users: dict[str, list[str]] = {}
    for image, file in zip(images, files, strict=True):
        if image not in missing:
            users.setdefault(file, []).append(image)
    shared = {file: used for file, used in users.items() if len(set(used)) > 1}
    if not shared:
        return
    file, used = next(iter(shared.items()))
    reason = f"{len(shared)} label files serve several images, such as {file!r} for {' and '.join(used[:2])}"
    folders = any(len({os.path.dirname(image) for image in used}) > 1 for used in shared.values())
    report = problems.suspect if folders else problems.note  # in other folders they are other images
    report("LCD-D158", place, reason)


def _drop_orphans(
    root: Path, images: Sequence[str], used: set[str], problems: AnnotationProblems, place: Place
) -> None:
    """Report label files without an image: it is missing, or of a kind that is not read, such as HEIC."""
    folders = {os.path.dirname(image) for image in images}
    labels = {os.path.dirname(file) for image in images for file in label_files(image)[:1]} | {
        os.path.dirname(file) for file in used
    }
    orphans = []
    for folder in sorted(labels):
        for name in list_names(root / folder):
            file = os.path.join(folder, name)
            if (
                name.endswith(".txt")
                and name.lower() not in _NOT_LABELS
                and file not in used
                and _is_label(root / file)
            ):
                orphans.append(file)
    if not orphans:
        return
    others: Counter[str] = Counter()
    stems = {os.path.splitext(os.path.basename(file))[0] for file in orphans}
    for folder in sorted(folders):
        for name in list_names(root / folder):
            stem, suffix = os.path.splitext(name)
            if stem in stems and suffix.lower() != ".txt" and suffix.lower() not in IMAGE_SUFFIXES:
                others[suffix] += 1
    reason = f"{len(orphans)} label files have no image: {_few(orphans)}"
    if others:
        reason += "; images of kinds that are not read: " + ", ".join(f"{n} {suffix}" for suffix, n in others.items())
    problems.drop("LCD-D157", place, reason)


def _is_label(path: Path) -> bool:
    """Whether a file has a line of YOLO's; an empty one loses nothing."""
    words = _first_words(path)
    return len(words) >= 5 and all(re.fullmatch(r"[-+\d.eE]+", word) for word in words)


def _first_words(path: Path) -> list[str]:
    try:
        with open_file(path) as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        return start.partition(b"\n")[0].decode().split()
    except (OSError, UnicodeDecodeError):
        return []


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def label_files(image: str) -> list[str]:
    """Where an image's boxes may be: in ``labels`` for ``images`` in its path, beside it, or flat in ``labels``."""
    return list(dict.fromkeys(_label_files(image)))


def _label_files(image: str) -> Iterator[str]:
    stem = os.path.splitext(image)[0]
    parts = stem.split(os.sep)
    level = next((i for i in reversed(range(len(parts) - 1)) if parts[i].lower() in IMAGE_FOLDERS), None)
    if level is None:
        yield stem + ".txt"
        return
    for label in LABEL_FOLDERS:
        yield os.sep.join([*parts[:level], label, *parts[level + 1 :]]) + ".txt"
    yield stem + ".txt"
    for label in LABEL_FOLDERS:
        yield os.sep.join([*parts[:level], label, parts[-1]]) + ".txt"


def _label_text(root: Path, image: str, problems: AnnotationProblems) -> tuple[str | None, str]:
    """The text with the boxes of an image, None if there is none, and its file relative to the root."""
    candidates = label_files(image)
    if image.startswith((os.pardir, os.sep)) or "\0" in image:  # refused with its name when the images are checked
        return "", candidates[0]
    for file in candidates:
        try:
            return read_text(root / file), file
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            problems.refuse("LCD-D006", (file, ""), f"cannot be read as UTF-8 text ({error})")
            return "", file
    return None, candidates[0]


def _parse(words: Sequence[str], key_points: KeyPoints | None) -> tuple[int, tuple[float, ...]]:
    """Label and relative centre, width, height of a line; raises ValueError with the reason why it is none."""
    posed = key_points is not None and key_points[0] > 0
    if posed and len(words) != 5:
        assert key_points is not None
        expected = 5 + key_points[0] * key_points[1]
        if len(words) != expected:
            raise ValueError(f"{len(words)} numbers; kpt_shape {list(key_points)} needs {expected}")
        words = words[:5]
    if len(words) == 6:
        raise ValueError(
            "6 numbers; expected class, centre x, centre y, width, height (are these detections with scores?)"
        )
    if len(words) < 5 or len(words) % 2 == 0:
        reason = "expected class, centre x, centre y, width, height, or class and an outline"
        raise ValueError(f"{len(words)} numbers; {reason}; for key points set kpt_shape in data.yaml")
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
    images = first_images(folder, 50)
    return any(_is_label(root / file) for image in images for file in label_files(os.path.relpath(image, root)))
