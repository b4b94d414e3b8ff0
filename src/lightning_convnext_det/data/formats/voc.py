"""Reader of Pascal VOC: one XML file with corners per image, and text files that list the images of a split.

Pixels are counted from 1 and the last one belongs to the box, so 1 is taken from ``xmin`` and ``ymin`` alone; a split
with boxes at 0 is counted from 0, which is noted. Objects marked ``difficult`` become crowd: evaluation ignores them
and training leaves them out. An image goes by the name of its XML file; ``<filename>`` is looked at where no image has
that name, ``<path>`` and ``<folder>`` never.

In a :class:`Split`, ``annotations`` are folders of XML, ``images`` the folders of their images, ``members`` the lists
in ``ImageSets/Main`` if there are any (one for each folder), ``classes`` the folders of XML of all splits.

Reference:
    http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html, section 3.4
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_convnext_det.data.annotations import DetectionAnnotations, Split, UnreadableError, count_offsets
from lightning_convnext_det.data.formats.exif_frames import Exif
from lightning_convnext_det.data.formats.file_names import encode_names
from lightning_convnext_det.data.formats.problems import AnnotationProblems, InvalidAnnotations, Source
from lightning_convnext_det.data.formats.validation import validate_annotations
from lightning_convnext_det.data.formats.voc_xml import VocAnnotation, VocObject, read_xml
from lightning_convnext_det.data.io.decode import IMAGE_SUFFIXES, MAX_PIXELS
from lightning_convnext_det.data.io.files import read_text
from lightning_convnext_det.data.io.listing import walk_files

ZERO_SHARE = 0.005  # of all boxes: so many at 0 mean that pixels are counted from 0, not that single boxes are wrong
_MAX_LISTED = 3  # images named in a note


class _Member(NamedTuple):
    """An image of the split."""

    xml: str
    """The XML file, relative to the root."""
    image: str
    """The image, relative to the root."""
    annotation: VocAnnotation


def read_voc(
    split: Split,
    *,
    class_names: Sequence[str] | None = None,
    train_on_difficult: bool = False,
    invalid_annotations: InvalidAnnotations = "auto",
    exif: Exif = "auto",
    check_images: bool = True,
    follow_symlinks: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> DetectionAnnotations:
    """Read a split; refused records are left out and listed in ``problems``.

    Args:
        split: what :func:`find_voc` finds.
        class_names: names of the classes in order of label (default: all names in all XML files of the root, sorted).
        train_on_difficult: treat objects marked ``difficult`` like the others.
        invalid_annotations: see ``problems.py``.
        exif: see ``exif_frames.py``.
        check_images: see ``exif_frames.py``.
        follow_symlinks: see ``exif_frames.py``.
        max_pixels: see ``exif_frames.py``.
    """
    problems = AnnotationProblems(invalid_annotations)
    members = _read_members(split, problems)
    names = tuple(class_names) if class_names is not None else _all_names(split, members)
    rows = _known_objects(members, names, problems)
    if outlines := sum(item.outline for _, item in rows):
        problems.note(
            "LCD-D123", (str(split.root), ""), f"{outlines} objects are outlines; their bounding boxes are taken"
        )
    corners = np.array([item.corners for _, item in rows], np.float64).reshape(-1, 4)
    first_pixel = _first_pixel(corners, split.root, problems)
    label_of = {name: label for label, name in enumerate(names)}
    annotations = DetectionAnnotations(
        image_root=split.root,
        file_names=encode_names([member.image for member in members]),
        image_ids=np.arange(1, len(members) + 1),
        sizes=np.array([member.annotation.size for member in members], np.int32).reshape(-1, 2),
        upright=np.zeros(len(members), np.bool_),
        boxes=corners - [first_pixel, first_pixel, 0, 0],
        labels=np.array([label_of[item.name] for _, item in rows], np.int64),
        crowd=np.array([item.difficult and not train_on_difficult for _, item in rows], np.bool_),
        area=np.zeros(len(rows)),
        annotation_ids=np.arange(1, len(rows) + 1),
        offsets=count_offsets([index for index, _ in rows], len(members)),
        class_names=names,
        category_ids=tuple(range(1, len(names) + 1)),
        crowd_is_difficult=True,
    )
    source = Source(
        format="voc",
        root=split.root,
        file_names=[member.image for member in members],
        image_place=lambda index: (members[index].xml, ""),
        box_place=lambda row: (members[rows[row][0]].xml, f"object {rows[row][1].number} ({rows[row][1].name})"),
        first_pixel=first_pixel,
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


def _known_objects(
    members: Sequence[_Member], names: tuple[str, ...], problems: AnnotationProblems
) -> list[tuple[int, VocObject]]:
    """The objects that can be read and are of a known class, each with the number of its image."""
    rows: list[tuple[int, VocObject]] = []
    known = set(names)
    for index, member in enumerate(members):
        for number, reason in member.annotation.malformed:
            problems.refuse("LCD-D005", (member.xml, f"object {number}"), reason)
        for item in member.annotation.objects:
            if item.name in known:
                rows.append((index, item))
            else:
                reason = f"class {item.name!r} is not among {names}"
                problems.refuse("LCD-D110", (member.xml, f"object {item.number}"), reason)
    return rows


def _first_pixel(corners: np.ndarray, root: Path, problems: AnnotationProblems) -> int:
    """1, or 0 where more boxes begin at 0 than single mistakes explain."""
    zeros = int((corners[:, :2].min(axis=1, initial=np.inf) == 0).sum())
    if zeros < max(2, ZERO_SHARE * len(corners)):
        return 1
    reason = f"{zeros} of {len(corners)} boxes begin at 0: pixels are taken to be counted from 0, not from 1 as by VOC"
    problems.note("LCD-D154", (str(root), ""), reason)
    return 0


def _read_members(split: Split, problems: AnnotationProblems) -> list[_Member]:
    """Read the XML files of a split and find their images."""
    members = []
    for number, (folder, image_folder) in enumerate(zip(split.annotations, split.images, strict=True)):
        files = {os.path.splitext(name)[0]: name for name in walk_files(folder, (".xml",))}
        stems = _listed(split.members[number], split.root, files, problems) if split.members else sorted(files)
        images: dict[str, list[str]] = {}
        for name in walk_files(image_folder, tuple(IMAGE_SUFFIXES)):
            images.setdefault(os.path.splitext(name)[0], []).append(name)
        used: set[str] = set()
        for stem in stems:
            xml = os.path.relpath(folder / files[stem], split.root)
            try:
                annotation = read_xml(folder / files[stem])
            except UnreadableError as error:
                problems.refuse("LCD-D005", (xml, ""), error.problem_of(xml).reason)
                continue
            image, reason = _image_of(stem, annotation.file_name, images)
            if not image:
                problems.refuse("LCD-I003", (xml, ""), f"{reason} in {os.path.relpath(image_folder, split.root)}")
                continue
            if reason:
                problems.note("LCD-D118", (xml, ""), reason)
            members.append(_Member(xml, os.path.relpath(image_folder / image, split.root), annotation))
            used.add(image)
        if not split.members:
            spare = sorted(name for key, names in images.items() if key not in files for name in names)
            _note_unannotated([name for name in spare if name not in used], image_folder, split.root, problems)
    return members


def _listed(path: Path, root: Path, files: dict[str, str], problems: AnnotationProblems) -> list[str]:
    """The images that a list names, each once, as far as there is XML for them."""
    file = os.path.relpath(path, root)
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError.of("LCD-D005", path, f"cannot be read as UTF-8 text ({error})") from error
    stems: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        words = [line.strip(), *line.split()[:1]] if line.strip() else []
        words += [os.path.splitext(word)[0] for word in words]
        stem = next((word for word in words if word in files), words[1] if words else "")
        if stem and stem not in files:
            reason = f"there is no XML file for {stem!r} beside the other annotations"
            problems.refuse("LCD-D119", (file, f"line {number}"), reason)
        elif stem in stems:
            problems.drop("LCD-D107", (file, f"line {number}"), f"{stem!r} is listed before")
        elif stem:
            stems[stem] = None
    return list(stems)


def _image_of(stem: str, file_name: str, images: dict[str, list[str]]) -> tuple[str, str]:
    """The image that an XML file describes; with a remark, or empty with the reason why there is none."""
    named = file_name.replace("\\", "/")
    bare = named.rsplit("/", 1)[-1]
    candidates = images.get(stem, [])
    if len(candidates) == 1:
        return candidates[0], ""
    for name in (named, os.path.join(os.path.dirname(stem), bare), bare):
        if name in images.get(os.path.splitext(name)[0], []):
            return name, "" if candidates else f"no image is called {stem!r}; {name!r} is taken, which the file names"
    if candidates:
        return "", f"several images are called {stem!r} and <filename> names none of them"
    other_case = next((name for key in images if key.lower() == stem.lower() for name in images[key]), None)
    return "", f"no image is called {stem!r}" + (f" (is {other_case!r} meant?)" if other_case else "")


def _note_unannotated(names: Sequence[str], folder: Path, root: Path, problems: AnnotationProblems) -> None:
    """Note images without XML, which may be negatives or not yet annotated; they are left out."""
    if names:
        shown = ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")
        reason = f"{len(names)} images have no XML file and are left out: {shown}"
        problems.note("LCD-D121", (os.path.relpath(folder, root), ""), reason)


def _all_names(split: Split, members: Iterable[_Member]) -> tuple[str, ...]:
    """The class names in all XML files of the root, sorted; damaged files of other splits are passed over."""
    names = {item.name for member in members for item in member.annotation.objects}
    read = {member.xml for member in members}
    for folder in split.classes:
        for name in walk_files(folder, (".xml",)):
            if os.path.relpath(folder / name, split.root) not in read:
                try:
                    names.update(item.name for item in read_xml(folder / name).objects)
                except UnreadableError:
                    continue
    return tuple(sorted(names))
