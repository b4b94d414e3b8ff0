"""COCO: one JSON file with the lists ``images``, ``annotations`` and ``categories`` for each split.

Boxes are x, y, width, height in pixels. Ids may have gaps, be unordered, start at 0, or be written as strings. Labels
follow the sorted category ids. ``segmentation`` is never decoded. In a :class:`Split`, ``annotations`` is the JSON file
and ``images`` the folders that may hold the images, of which the one that does is taken.

Reference:
    https://cocodataset.org/#format-data
"""

import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.data.annotations import DetectionAnnotations, Split, UnreadableError, canonical_split
from lightning_convnext_det.data.formats.assembly import build_annotations
from lightning_convnext_det.data.formats.coco_json import iterate_members
from lightning_convnext_det.data.formats.exif_frames import Exif
from lightning_convnext_det.data.formats.records import AnnotationProblems, InvalidAnnotations, Records
from lightning_convnext_det.data.io.files import regular
from lightning_convnext_det.data.io.listing import is_utf8, list_names

ORPHAN_SHARE = 0.01  # of all annotations: more that belong to no image mean that files do not belong together
_LISTS = ("images", "annotations", "categories")
_LARGEST_AREA = 1e5**2  # square pixels; COCO's evaluation passes over larger objects without a word
_IMAGE_FOLDERS = ("", "images", "Images", "imgs", "JPEGImages", "data")
_FILLER_WORDS = {"instances", "annotations", "annotation", "coco", "json", "bbox", ""}


class _MalformedError(ValueError):
    """A member of the file is not as the format says."""


class _Images:
    """The images as listed."""

    def __init__(self) -> None:
        self.ids = array("q")
        self.names: list[str] = []
        self.sizes = array("l")

    def add(self, record: dict[str, object]) -> None:
        """Take up one member of ``images``."""
        image_id, name = _integer(record, "id"), record.get("file_name")
        if not isinstance(name, str):
            raise _MalformedError(f".file_name: expected a string, found {name!r}")
        size = [_integer(record, side, missing=0) for side in ("height", "width")]
        if not all(0 <= side < 1 << 31 for side in size):
            raise _MalformedError(f": height {size[0]} and width {size[1]} are not counts of pixels")
        self.ids.append(image_id)
        self.names.append(name)
        self.sizes.extend(size)


class _Annotations:
    """The annotations as listed, in columns."""

    def __init__(self) -> None:
        self.ids, self.image_ids, self.category_ids = array("q"), array("q"), array("q")
        self.boxes, self.areas, self.crowd = array("d"), array("d"), array("b")

    def add(self, record: dict[str, object]) -> None:
        """Take up one member of ``annotations``."""
        ids = [_integer(record, key) for key in ("id", "image_id", "category_id")]
        box = record.get("bbox")
        if type(box) is not list or len(box) != 4:
            found = f"{len(box)} of them" if type(box) is list else repr(box)
            raise _MalformedError(f".bbox: expected 4 numbers, found {found}")
        for value in box:
            if type(value) is not float and type(value) is not int:
                raise _MalformedError(f".bbox: expected 4 numbers, found {value!r}")
        crowd = record.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise _MalformedError(f".iscrowd: expected 0 or 1, found {crowd!r}")
        area = record.get("area", 0)
        if (type(area) is not float and type(area) is not int) or not 0 <= area <= _LARGEST_AREA:
            raise _MalformedError(f".area: expected a count of square pixels, found {area!r}")
        try:
            values = [float(value) for value in (*box, area)]
        except OverflowError as error:  # an integer of more than 308 digits
            raise _MalformedError(": a number is too large") from error
        self.boxes.extend(values[:4])
        self.areas.append(values[4])
        self.crowd.append(bool(crowd))
        for column, value in zip((self.ids, self.image_ids, self.category_ids), ids, strict=True):
            column.append(value)


def read_coco(
    split: Split,
    *,
    class_names: Sequence[str] | None = None,
    invalid_annotations: InvalidAnnotations = "auto",
    exif: Exif = "auto",
    check_images: bool = True,
    follow_symlinks: bool = True,
) -> DetectionAnnotations:
    """Read a split; records that it refuses are left out of the table and listed in its ``problems``.

    Args:
        split: what :func:`find_coco` finds.
        class_names: the names of the classes in order of label; the categories of the file by id if not given.
        invalid_annotations: see ``records.py``.
        exif: see ``images.py``.
        check_images: see ``images.py``.
        follow_symlinks: see ``images.py``.

    Raises:
        UnreadableError: a DataError, if the file as a whole cannot be used.
    """
    findings = AnnotationProblems(invalid_annotations)
    path = split.annotations[0]
    file = os.path.relpath(path, split.root) if path.is_relative_to(split.root) else str(path)
    images, annotations, categories = _read_lists(path, file, split.name, findings)
    names, category_ids = _class_table(categories, class_names, path)
    records = _records(split, file, images, annotations, names, category_ids, findings)
    return build_annotations(records, findings, exif=exif, check_images=check_images, follow_symlinks=follow_symlinks)


def _records(
    split: Split,
    file: str,
    images: _Images,
    annotations: _Annotations,
    names: tuple[str, ...],
    category_ids: tuple[int, ...],
    findings: AnnotationProblems,
) -> Records:
    """Annotations joined to images and classes."""
    first = _unique(images.ids, "image", file, findings)
    image_ids = np.array(images.ids, np.int64)[first]
    file_names = [images.names[index] for index in np.flatnonzero(first)]
    keep, image_index, labels = _link(annotations, image_ids, category_ids, file, findings)
    annotation_ids = np.array(annotations.ids, np.int64)[keep]
    area = np.array(annotations.areas)[keep]
    if lacking := int((area == 0).sum()):
        findings.note("LCD-D116", (file, ""), f"{lacking} annotations state no area or 0; width x height is taken")
    return Records(
        format="coco",
        root=split.root,
        image_root=_image_root(split.images, file_names),
        file_names=file_names,
        image_ids=image_ids,
        sizes=np.array(images.sizes, np.int32).reshape(-1, 2)[first],
        boxes=np.array(annotations.boxes).reshape(-1, 4)[keep],
        image_index=image_index,
        labels=labels,
        crowd=np.array(annotations.crowd, np.bool_)[keep],
        area=area,
        annotation_ids=annotation_ids,
        class_names=names,
        category_ids=category_ids,
        image_where=lambda index: (file, f"image {image_ids[index]}"),
        box_where=lambda row: (file, f"annotation {annotation_ids[row]} of {file_names[image_index[row]]!r}"),
    )


def _read_lists(
    path: Path, file: str, name: str, findings: AnnotationProblems
) -> tuple[_Images, _Annotations, list[object]]:
    """The three lists of the file; a member that is not as it should be is refused by its index."""
    images, annotations, categories = _Images(), _Annotations(), list[object]()
    present: set[str] = set()
    for key, index, value in iterate_members(path):
        if key not in _LISTS:
            continue
        present.add(key)
        if index is None:
            if value != []:
                raise UnreadableError.of("LCD-D001", path, f"expected a list, found {_kind(value)}", key)
        elif key == "categories":
            categories.append(value)
        else:
            try:
                if not isinstance(value, dict):
                    raise _MalformedError(f": expected an object, found {_kind(value)}")
                if key == "annotations" and value.get("ignore"):
                    reason = "ignore is set, which is neither an object nor a crowd; set iscrowd, or leave it out"
                    findings.refuse("LCD-D114", (file, f"annotations[{index}] (id {value.get('id')})"), reason)
                else:
                    (images if key == "images" else annotations).add(value)
            except _MalformedError as error:
                findings.refuse("LCD-D002", (file, f"{key}[{index}]"), str(error).lstrip(": "))
    required = ("images", "categories") if name.startswith("test") else _LISTS
    if missing := [key for key in required if key not in present]:
        reason = (
            f"{' and '.join(map(repr, missing))} missing; expected an object with 'images', 'annotations', 'categories'"
        )
        raise UnreadableError.of("LCD-D001", path, reason)
    return images, annotations, categories


def _class_table(
    categories: list[object], class_names: Sequence[str] | None, path: Path
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and category ids in order of label."""
    by_id: dict[int, str] = {}
    for index, category in enumerate(categories):
        where = f"categories[{index}]"
        try:
            category_id = _integer(category, "id") if isinstance(category, dict) else None
        except _MalformedError as error:
            raise UnreadableError.of("LCD-D008", path, str(error).lstrip("."), where) from error
        name = category.get("name") if isinstance(category, dict) else None
        if category_id is None or not isinstance(name, str) or not name.strip() or not is_utf8(name):
            raise UnreadableError.of("LCD-D008", path, "expected an object with an id and a name", where)
        if category_id in by_id or name in by_id.values():
            raise UnreadableError.of("LCD-D008", path, f"id {category_id} or name {name!r} is used twice", where)
        by_id[category_id] = name
    if not by_id:
        raise UnreadableError.of("LCD-D008", path, "'categories' is empty; a detector needs at least one class")
    if class_names is None:
        ids = tuple(sorted(by_id))
        return tuple(by_id[category_id] for category_id in ids), ids
    id_of = {name: category_id for category_id, name in by_id.items()}
    if unknown := [name for name in class_names if name not in id_of]:
        reason = f"class {unknown[0]!r} is not among the categories {tuple(id_of)}"
        raise UnreadableError.of("LCD-D120", path, reason)
    return tuple(class_names), tuple(id_of[name] for name in class_names)


def _unique(ids: "array[int]", what: str, file: str, findings: AnnotationProblems) -> NDArray[np.bool_]:
    """Which ids are the first of their value; the others are refused."""
    first = np.zeros(len(ids), np.bool_)
    first[np.unique(np.array(ids, np.int64), return_index=True)[1]] = True
    for index in np.flatnonzero(~first):
        findings.refuse(
            "LCD-D003", (file, f"{what}s[{index}]"), f"{what} id {ids[index]} is used before; ids are unique"
        )
    return first


def _link(
    annotations: _Annotations,
    image_ids: NDArray[np.int64],
    category_ids: tuple[int, ...],
    file: str,
    findings: AnnotationProblems,
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Which annotations are kept [M], and for these the index of the image and the label."""
    keep = _unique(annotations.ids, "annotation", file, findings)
    image_index, has_image = _positions(np.array(annotations.image_ids, np.int64), image_ids)
    labels, has_class = _positions(np.array(annotations.category_ids, np.int64), np.array(category_ids, np.int64))
    orphans = np.flatnonzero(keep & ~has_image)
    report = findings.refuse if len(orphans) > ORPHAN_SHARE * len(keep) else findings.drop
    for row in orphans:
        reason = f"image_id {annotations.image_ids[row]} is not among 'images'"
        report("LCD-D117", (file, f"annotation {annotations.ids[row]}"), reason)
    keep &= has_image
    for row in np.flatnonzero(keep & ~has_class):
        reason = f"category_id {annotations.category_ids[row]} is not among the classes read, {_few(category_ids)}"
        findings.refuse("LCD-D110", (file, f"annotation {annotations.ids[row]}"), reason)
    keep &= has_class
    return keep, image_index[keep], labels[keep]


def _positions(values: NDArray[np.int64], table: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where each value stands in a table of unique values, and whether it does."""
    if not len(table):
        return np.zeros(len(values), np.int64), np.zeros(len(values), np.bool_)
    order = np.argsort(table)
    found = order[np.searchsorted(table, values, sorter=order).clip(max=len(table) - 1)]
    return found, table[found] == values


def _image_root(folders: Sequence[Path], file_names: Sequence[str]) -> Path:
    """The folder that holds the most of a sample of the images, the first of those that hold equally many."""
    sample = [name for name in file_names[:: max(1, len(file_names) // 20)] if "\0" not in name]
    return max(folders, key=lambda folder: sum(os.path.isfile(os.path.join(folder, name)) for name in sample))


def _integer(record: dict[str, object], key: str, missing: int | None = None) -> int:
    """An integer, or a string of one; a float or a truth value is none."""
    value = record.get(key, missing)
    if type(value) is int and -(1 << 63) <= value < 1 << 63:
        return value
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    raise _MalformedError(f".{key}: " + ("missing" if key not in record else f"expected an integer, found {value!r}"))


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value), f"{value!r}")


def _few(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")


def find_coco(root: Path) -> dict[str, Split]:
    """Find the annotation files below a folder, by the name of the split.

    Looks for ``annotations/instances_*.json``, any COCO file in ``annotations`` or beside the images, and
    ``*/_annotations.coco.json``.
    """
    found: dict[str, Split] = {}
    for folder in (root / "annotations", root / "Annotations", root):
        files = [folder / name for name in list_names(folder) if name.endswith(".json")]
        named = [file for file in files if file.name.startswith("instances_")]  # a damaged one is named when it is read
        files = named or [file for file in files if looks_like_coco(file)]
        if files:
            stems = [_split_words(file.stem) for file in files]
            keys = [canonical_split(stem) for stem in stems]
            keys = keys if len(set(keys)) == len(keys) else stems
            for key, stem, file in zip(keys, stems, files, strict=True):
                found[key] = Split(key, "coco", root, (file,), image_folders(root, file, (stem, key)))
            return found
    for name in list_names(root):
        file = root / name / "_annotations.coco.json"
        if file.is_file():
            found[canonical_split(name)] = Split(canonical_split(name), "coco", root, (file,), (file.parent,))
    return found


def looks_like_coco(path: Path) -> bool:
    """Whether a JSON file begins like an object with COCO's keys; one with classes alone accompanies other formats."""
    try:
        with open(path, "rb", opener=regular) as file:
            start = file.read(1 << 16)
    except OSError:
        return False
    keys = rb"images|annotations" if len(start) < 1 << 16 else rb"images|annotations|categories|licenses|info"
    is_object = start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    return is_object and re.search(rb'"(?:' + keys + rb')"\s*:', start) is not None


def image_folders(root: Path, file: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """The folders that may hold the images of an annotation file, the likeliest first."""
    names = [*names, *(("valid", "validation") if "val" in names else ())]
    bases = [root / folder for folder in _IMAGE_FOLDERS]
    folders = [base / name for base in bases for name in names] + bases[1:] + [file.parent, root]
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def _split_words(stem: str) -> str:
    """What a file's name says about the split: ``instances_train2017`` says ``train2017``."""
    words = [word for word in re.split(r"[._\- ]", stem) if word.lower() not in _FILLER_WORDS]
    return "_".join(words) or "train"
