"""Pascal VOC: one XML file with corners for each image, and text files that list the images of a split.

Pixels are counted from 1 and the last one belongs to the box, so 1 is taken from ``xmin`` and ``ymin`` alone. Objects
marked ``difficult`` become crowd: evaluation ignores them and training leaves them out. An image goes by the name of
its XML file; ``<filename>`` is looked at where no image has that name, ``<path>`` and ``<folder>`` never.

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

from lightning_convnext_det.data.annotations import DetectionAnnotations, Split, UnreadableError, canonical_split
from lightning_convnext_det.data.formats.assembly import build_annotations
from lightning_convnext_det.data.formats.exif_frames import Exif
from lightning_convnext_det.data.formats.records import AnnotationProblems, InvalidAnnotations, Records
from lightning_convnext_det.data.formats.voc_xml import VocAnnotation, VocObject, read_xml
from lightning_convnext_det.data.io.files import read_text, regular
from lightning_convnext_det.data.io.listing import image_names, list_names

_SETS = ("train", "val", "trainval", "test")
_XML_FOLDERS = ("Annotations", "annotations", "annots", "labels", "xml")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "img")


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
) -> DetectionAnnotations:
    """Read a split; records that it refuses are left out of the table and listed in its ``problems``.

    Args:
        split: what :func:`find_voc` finds.
        class_names: the names of the classes in order of label; if not given, all names in all XML files of the root,
            sorted.
        train_on_difficult: treat objects marked ``difficult`` like the others.
        invalid_annotations: see ``records.py``.
        exif: see ``images.py``.
        check_images: see ``images.py``.
        follow_symlinks: see ``images.py``.
    """
    findings = AnnotationProblems(invalid_annotations)
    members = _read_members(split, findings)
    names = tuple(class_names) if class_names is not None else _all_names(split, members)
    records = _records(split, members, names, train_on_difficult, findings)
    return build_annotations(records, findings, exif=exif, check_images=check_images, follow_symlinks=follow_symlinks)


def _records(
    split: Split,
    members: Sequence[_Member],
    names: tuple[str, ...],
    train_on_difficult: bool,
    findings: AnnotationProblems,
) -> Records:
    """The objects of all images, as far as they can be read and are of a known class."""
    label_of = {name: label for label, name in enumerate(names)}
    rows: list[tuple[int, VocObject]] = []
    for index, member in enumerate(members):
        for number, reason in member.annotation.malformed:
            findings.refuse("LCD-D005", (member.xml, f"object {number}"), reason)
        for item in member.annotation.objects:
            if item.name in label_of:
                rows.append((index, item))
            else:
                reason = f"class {item.name!r} is not among {names}"
                findings.refuse("LCD-D110", (member.xml, f"object {item.number}"), reason)
    return Records(
        format="voc",
        root=split.root,
        image_root=split.root,
        file_names=[member.image for member in members],
        image_ids=np.arange(1, len(members) + 1),
        sizes=np.array([member.annotation.size for member in members], np.int32).reshape(-1, 2),
        boxes=np.array([item.corners for _, item in rows], np.float64).reshape(-1, 4),
        image_index=np.array([index for index, _ in rows], np.int64),
        labels=np.array([label_of[item.name] for _, item in rows], np.int64),
        crowd=np.array([item.difficult and not train_on_difficult for _, item in rows], np.bool_),
        area=np.zeros(len(rows)),
        annotation_ids=np.arange(1, len(rows) + 1),
        class_names=names,
        category_ids=tuple(range(1, len(names) + 1)),
        image_where=lambda index: (members[index].xml, ""),
        box_where=lambda row: (members[rows[row][0]].xml, f"object {rows[row][1].number} ({rows[row][1].name})"),
    )


def _read_members(split: Split, findings: AnnotationProblems) -> list[_Member]:
    """Read the XML files of a split and find their images."""
    members = []
    for number, (folder, image_folder) in enumerate(zip(split.annotations, split.images, strict=True)):
        files = {Path(name).stem: name for name in list_names(folder) if name.lower().endswith(".xml")}
        stems = _listed(split.members[number], split.root, files, findings) if split.members else sorted(files)
        used: set[str] = set()
        images: dict[str, list[str]] = {}
        for name in image_names(image_folder):
            images.setdefault(os.path.splitext(name)[0], []).append(name)
        for stem in stems:
            xml = os.path.relpath(folder / files[stem], split.root)
            try:
                annotation = read_xml(folder / files[stem])
            except UnreadableError as error:
                findings.refuse("LCD-D005", (xml, ""), error.problem_of(xml).reason)
                continue
            image, reason = _image_of(stem, annotation.file_name, images)
            if not image:
                where = os.path.relpath(image_folder, split.root)
                findings.refuse("LCD-I003", (xml, ""), f"{reason} in {where}")
                continue
            if reason:
                findings.note("LCD-D118", (xml, ""), reason)
            members.append(_Member(xml, os.path.relpath(image_folder / image, split.root), annotation))
            used.add(image)
        if not split.members:
            spare = sorted(name for key, names in images.items() if key not in files for name in names)
            _note_unannotated([name for name in spare if name not in used], image_folder, split.root, findings)
    return members


def _listed(path: Path, root: Path, files: dict[str, str], findings: AnnotationProblems) -> list[str]:
    """The images that a list names, each once, as far as there is XML for them."""
    where = os.path.relpath(path, root)
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError.of("LCD-D005", path, f"cannot be read as UTF-8 text ({error})") from error
    stems: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        stem = line.split()[0] if line.strip() else ""
        if stem and stem not in files:
            reason = f"there is no XML file for {stem!r} beside the other annotations"
            findings.refuse("LCD-D119", (where, f"line {number}"), reason)
        elif stem in stems:
            findings.drop("LCD-D107", (where, f"line {number}"), f"{stem!r} is listed before")
        elif stem:
            stems[stem] = None
    return list(stems)


def _image_of(stem: str, file_name: str, images: dict[str, list[str]]) -> tuple[str, str]:
    """The image that an XML file describes; with a remark, or empty with the reason why there is none."""
    named = file_name.replace("\\", "/").rsplit("/", 1)[-1]
    candidates = images.get(stem, [])
    if len(candidates) == 1:
        return candidates[0], ""
    if named in images.get(os.path.splitext(named)[0], []):
        return named, "" if candidates else f"no image is called {stem!r}; {named!r} is taken, which the file names"
    if candidates:
        return "", f"several images are called {stem!r} and <filename> names none of them"
    other_case = next((name for key in images if key.lower() == stem.lower() for name in images[key]), None)
    return "", f"no image is called {stem!r}" + (f" (is {other_case!r} meant?)" if other_case else "")


def _note_unannotated(names: Sequence[str], folder: Path, root: Path, findings: AnnotationProblems) -> None:
    """Images without XML may be negatives or not yet annotated; they are left out."""
    if names:
        reason = f"{len(names)} images have no XML file and are left out: {', '.join(names[:3])}"
        findings.note("LCD-D121", (os.path.relpath(folder, root), ""), reason + (", ..." if len(names) > 3 else ""))


def _all_names(split: Split, members: Iterable[_Member]) -> tuple[str, ...]:
    """The class names in all XML files of the root, sorted; files of other splits that are damaged are passed over."""
    names = {item.name for member in members for item in member.annotation.objects}
    read = {member.xml for member in members}
    for folder in split.classes:
        for name in list_names(folder):
            if name.lower().endswith(".xml") and os.path.relpath(folder / name, split.root) not in read:
                try:
                    names.update(item.name for item in read_xml(folder / name).objects)
                except UnreadableError:
                    continue
    return tuple(sorted(names))


def find_voc(root: Path) -> dict[str, Split]:
    """Find the splits below a folder.

    Looks for ``ImageSets/Main/*.txt`` with ``Annotations`` and ``JPEGImages``, in the folder itself and in ``VOC2007``,
    ``VOC2012``, ... of it or of its ``VOCdevkit`` (years are joined); else for XML beside the images or in a folder
    next to theirs, in ``train``, ``valid``, ``test`` or in the folder itself.
    """
    found: dict[str, list[tuple[Path, Path, Path | None]]] = {}
    for year in _years(root):
        for name in list_names(year / "ImageSets" / "Main"):
            key = canonical_split(Path(name).stem)
            if name.endswith(".txt") and key in _SETS:
                xml = year / "Annotations"
                found.setdefault(key, []).append((xml, image_folder_of(xml), year / "ImageSets" / "Main" / name))
    if not found:
        folders = {canonical_split(name): root / name for name in list_names(root)}
        for key, folder in {**{key: folders[key] for key in _SETS if key in folders}, "": root}.items():
            xml_folder = _xml_folder(folder)
            if xml_folder is not None and (key or not found):
                found[key or "train"] = [(xml_folder, image_folder_of(xml_folder), None)]
    classes = tuple(dict.fromkeys(xml for parts in found.values() for xml, _, _ in parts))
    splits = {}
    for key, parts in found.items():
        members = tuple(member for _, _, member in parts if member is not None)
        splits[key] = Split(
            key, "voc", root, tuple(part[0] for part in parts), tuple(part[1] for part in parts), members, classes
        )
    return splits


def _years(root: Path) -> list[Path]:
    """The folders that hold Annotations and ImageSets/Main."""
    parents = [root, root / "VOCdevkit"]
    children = [parent / name for parent in parents for name in list_names(parent) if name.startswith("VOC2")]
    folders = [*parents, *children]
    return [folder for folder in folders if (folder / "Annotations").is_dir() and (folder / "ImageSets/Main").is_dir()]


def _xml_folder(folder: Path) -> Path | None:
    """The folder of VOC's XML: the folder itself or one in it."""
    if _holds_voc(folder):
        return folder
    names = [name for name in list_names(folder) if _holds_voc(folder / name)]
    known = [name for name in _XML_FOLDERS if name in names]
    chosen = known or (names if len(names) == 1 else [])
    return folder / chosen[0] if chosen else None


def _holds_voc(folder: Path) -> bool:
    """Whether the first XML file of a folder is an annotation."""
    first = next((name for name in list_names(folder) if name.lower().endswith(".xml")), None)
    if first is None:
        return False
    try:
        with open(folder / first, "rb", opener=regular) as file:
            return b"<annotation" in file.read(4096)
    except OSError:
        return False


def image_folder_of(xml: Path) -> Path:
    """The folder of the images that a folder of XML describes."""
    if image_names(xml):
        return xml
    siblings = [name for name in list_names(xml.parent) if image_names(xml.parent / name)]
    known = [name for name in _IMAGE_FOLDERS if name in siblings]
    chosen = known or (siblings if len(siblings) == 1 else [])
    return xml.parent / chosen[0] if chosen else xml.parent
