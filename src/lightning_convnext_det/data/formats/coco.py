"""Reader of COCO's JSON: the lists ``images``, ``annotations`` and ``categories``, in one file per split.

Boxes are x, y, width, height in pixels. Labels follow the sorted category ids. Values of other types than COCO's are
read as what they plainly mean, and noted; a box is taken from the segmentation only where ``bbox`` is missing. Ids of
annotations serve for messages only. In a :class:`Split`, ``annotations`` is the JSON file and ``images`` the folders
that may hold the images, of which the one that does is taken.

Reference:
    https://cocodataset.org/#format-data
"""

import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import UNSET, DecodeError, Meta, Raw, Struct
from msgspec.json import Decoder

from lightning_convnext_det.data.annotations import DetectionAnnotations, Split, UnreadableError, count_offsets
from lightning_convnext_det.data.formats import coco_values as values
from lightning_convnext_det.data.formats.coco_classes import Classes, read_classes
from lightning_convnext_det.data.formats.coco_json import decode_json, kind_of, missing_lists, read_coco_file
from lightning_convnext_det.data.formats.coco_values import MalformedError, Mended, Record
from lightning_convnext_det.data.formats.exif_frames import Exif
from lightning_convnext_det.data.formats.file_names import choose_folder, encode_names
from lightning_convnext_det.data.formats.lvis import CategoryLists, category_lists, federated_labels
from lightning_convnext_det.data.formats.outlines import outline_box
from lightning_convnext_det.data.formats.problems import AnnotationProblems, InvalidAnnotations, Source
from lightning_convnext_det.data.formats.validation import validate_annotations
from lightning_convnext_det.data.io.decode import MAX_PIXELS

ORPHAN_SHARE = 0.01  # of all annotations: more that belong to no image mean that files do not belong together
_NO_ID = -(1 << 63)
_Int64 = Annotated[int, Meta(ge=_NO_ID + 1, le=(1 << 63) - 1)]
_LISTS = ("images", "annotations", "categories")


class _Image(Struct, gc=False):
    """A member of ``images`` of the usual types."""

    id: _Int64
    file_name: str
    height: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0
    width: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0
    neg_category_ids: list[int] | None = None
    not_exhaustive_category_ids: list[int] | None = None


class _Annotation(Struct, gc=False):
    """A member of ``annotations`` of the usual types."""

    image_id: _Int64
    category_id: _Int64
    bbox: tuple[float, float, float, float]
    area: Annotated[float, Meta(ge=0, le=values.LARGEST_AREA)] = 0.0
    iscrowd: Annotated[int, Meta(ge=0, le=1)] = 0
    ignore: Annotated[int, Meta(ge=0, le=0)] = 0
    id: _Int64 = _NO_ID


_decode_image = Decoder(_Image).decode
_decode_annotation = Decoder(_Annotation).decode


def read_coco(
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
        split: what :func:`find_coco` finds.
        class_names: names of the classes in order of label (default: the categories of the file by id). The file may
            declare some of them only.
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
    content = read_coco_file(path)
    required = ("images", "categories") if split.name.startswith("test") else _LISTS
    if missing := missing_lists(content, required):
        reason = " and ".join(map(repr, missing))
        reason += " missing; expected an object with 'images', 'annotations', 'categories'"
        raise UnreadableError.of("LCD-D001", path, reason)
    reader = _Reader(
        path, os.path.relpath(path, split.root) if path.is_relative_to(split.root) else str(path), problems
    )
    reader.read_images(content.images or [])
    reader.read_annotations([] if content.annotations is UNSET else content.annotations)
    categories = [decode_json(record, path) for record in content.categories or []]
    classes = read_classes(categories, set(reader.category_keys), class_names, path, reader.file, problems)
    del content
    reader.note_mended()
    annotations, source = reader.annotations(split, classes)
    federated = federated_labels(reader.category_lists, annotations.image_ids, classes, categories)
    annotations = replace(annotations, federated=federated)
    return validate_annotations(
        annotations,
        source,
        problems,
        exif=exif,
        check_images=check_images,
        follow_symlinks=follow_symlinks,
        max_pixels=max_pixels,
    )


class _Reader:
    """The records of a file, in columns."""

    def __init__(self, path: Path, file: str, problems: AnnotationProblems) -> None:
        self.path, self.file, self.problems = path, file, problems
        self.mended: Mended = Counter()
        self.index_of: dict[int | str, int] = {}
        self.category_lists: dict[int, CategoryLists] = {}
        self.file_names: list[str] = []
        self.sizes = array("l")
        self.num_annotations = 0
        self.indices, self.images, self.ids = array("q"), array("q"), array("q")
        self.category_keys: list[int | str] = []
        self.boxes, self.areas, self.crowd = array("d"), array("d"), array("b")

    def read_images(self, records: Sequence[Raw]) -> None:
        """Decode ``images``."""
        for number, record in enumerate(records):
            try:
                try:
                    image = _decode_image(record)
                    key, name, size = image.id, image.file_name, (image.height, image.width)
                    lists: CategoryLists = (image.neg_category_ids, image.not_exhaustive_category_ids)
                except DecodeError:
                    unusual = self._object(record)
                    key, name, size = self._unusual_image(unusual)  # type: ignore[assignment]
                    lists = category_lists(unusual)
            except MalformedError as error:
                self.problems.refuse("LCD-D002", (self.file, f"images[{number}]"), str(error).lstrip(": "))
                continue
            if key in self.index_of:
                reason = f"image id {key} is used before; ids are unique"
                self.problems.refuse("LCD-D003", (self.file, f"images[{number}]"), reason)
                continue
            if lists != (None, None):
                self.category_lists[len(self.file_names)] = lists
            self.index_of[key] = len(self.file_names)
            self.file_names.append(name)
            self.sizes.extend(size)

    def _unusual_image(self, record: Record) -> tuple[int | str, str, tuple[int, int]]:
        key, name = values.identifier(record, "id"), record.get("file_name")
        if name is None:  # LVIS gives addresses only
            name = record.get("coco_url") or record.get("flickr_url")
        if not isinstance(name, str):
            raise MalformedError(f".file_name: expected a string, found {name!r}")
        return key, name, (values.side(record, "height", self.mended), values.side(record, "width", self.mended))

    def read_annotations(self, records: Sequence[Raw]) -> None:
        """Decode ``annotations``; those of unknown images are left out."""
        self.num_annotations = len(records)
        orphans: list[tuple[str, int | str]] = []
        for number, record in enumerate(records):
            try:
                one = _decode_annotation(record)
                image_key: int | str = one.image_id
                category: int | str = one.category_id
            except DecodeError:
                try:
                    found = self._unusual_annotation(self._object(record), number)
                except MalformedError as error:
                    self.problems.refuse("LCD-D002", (self.file, f"annotations[{number}]"), str(error).lstrip(": "))
                    continue
                if found is None:
                    continue
                one, image_key, category = found
            index = self.index_of.get(image_key)
            if index is None:
                orphans.append((self._name(number, one.id), image_key))
                continue
            self.indices.append(number)
            self.images.append(index)
            self.ids.append(one.id)
            self.boxes.extend(one.bbox)
            self.areas.append(one.area)
            self.crowd.append(one.iscrowd)
            self.category_keys.append(category)
        report = self.problems.refuse if len(orphans) > ORPHAN_SHARE * len(records) else self.problems.drop
        for name, key in orphans:
            report("LCD-D117", (self.file, name), f"image_id {key} is not among 'images'")

    def _unusual_annotation(self, record: Record, number: int) -> tuple[_Annotation, int | str, int | str] | None:
        """An annotation of other types, its image and category; None if it is left out with a problem."""
        place = (self.file, f"annotations[{number}]")
        if values.flag(record, "ignore", Counter()):
            reason = "ignore is set, which is neither an object nor a crowd; set iscrowd, or leave it out"
            self.problems.refuse("LCD-D114", (self.file, f"{place[1]} (id {record.get('id')})"), reason)
            return None
        image_key, category = values.identifier(record, "image_id"), values.identifier(record, "category_id")
        box = values.box(record.get("bbox"), self.mended)
        if box is None and record.get("segmentation"):
            box = outline_box(record["segmentation"])
            self.mended["bbox missing, taken from the segmentation"] += 1
        if box is None and record.get("bbox") == []:
            self.problems.drop("LCD-D101", place, "has no box")
            return None
        if box is None:
            raise MalformedError(
                f".bbox: expected 4 numbers, found {record.get('bbox')!r}, and there is no segmentation"
            )
        try:
            own = values.identifier(record, "id")
        except MalformedError:  # serves for messages only
            own = _NO_ID
        own = own if isinstance(own, int) and abs(own) < 1 << 63 else _NO_ID
        area, crowd = values.area(record, self.mended), values.flag(record, "iscrowd", self.mended)
        return _Annotation(0, 0, (box[0], box[1], box[2], box[3]), area, int(crowd), 0, own), image_key, category

    def _object(self, record: Raw) -> Record:
        value = decode_json(record, self.path)
        if not isinstance(value, dict):
            raise MalformedError(f": expected an object, found {kind_of(value)}")
        return value

    def _name(self, number: int, own: int) -> str:
        return f"annotations[{number}]" if own == _NO_ID else f"annotation {own}"

    def note_mended(self) -> None:
        """Note values of other types, once for the file."""
        if self.mended:
            counts = ", ".join(f"{kind} ({count})" for kind, count in sorted(self.mended.items()))
            reason = f"{sum(self.mended.values())} values are not written as COCO does and are read as they are meant"
            self.problems.note("LCD-D150", (self.file, ""), f"{reason}: {counts}")

    def annotations(self, split: Split, classes: Classes) -> tuple[DetectionAnnotations, Source]:
        """The columns by image, and where their rows are annotated."""
        keys = np.array([classes.label_of.get(key, -1) for key in self.category_keys], np.int64)
        for row in np.flatnonzero(keys < 0):
            ids = ", ".join(map(str, classes.ids[:8])) + (", ..." if len(classes.ids) > 8 else "")
            key = self.category_keys[row]
            name = f" ({classes.name_of[key]!r})" if isinstance(key, int) and key in classes.name_of else ""
            reason = f"category_id {key}{name} is not among the classes read, {ids}"
            self.problems.refuse("LCD-D110", (self.file, self._name(self.indices[row], self.ids[row])), reason)
        images = np.array(self.images, np.int64)
        rows = np.flatnonzero(keys >= 0)
        rows = rows[np.argsort(images[rows], kind="stable")]
        own = np.array(self.ids, np.int64)[rows]
        known = len(np.unique(own)) == len(own) and _NO_ID not in own
        area = np.array(self.areas)[rows]
        if lacking := int((area == 0).sum()):
            reason = f"{lacking} annotations have no area or 0; width x height is taken"
            self.problems.note("LCD-D116", (self.file, ""), reason)
        boxes = np.array(self.boxes).reshape(-1, 4)[rows]
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused later
            boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        annotations = DetectionAnnotations(
            image_root=choose_folder(split.images, self.file_names),
            file_names=encode_names(self.file_names),
            image_ids=self._image_ids(),
            sizes=np.array(self.sizes, np.int32).reshape(-1, 2),
            upright=np.zeros(len(self.file_names), np.bool_),
            boxes=boxes,
            labels=keys[rows],
            crowd=np.array(self.crowd, np.bool_)[rows],
            area=area,
            annotation_ids=own if known else np.arange(1, len(rows) + 1),
            offsets=count_offsets(images[rows], len(self.file_names)),
            class_names=classes.names,
            category_ids=classes.ids,
        )
        numbers = np.array(self.indices, np.int64)[rows]
        image_keys, images = list(self.index_of), images[rows]

        def box_place(row: int) -> tuple[str, str]:
            return self.file, f"{self._name(numbers[row], own[row])} of {self.file_names[images[row]]!r}"

        def image_place(index: int) -> tuple[str, str]:
            return self.file, f"image {image_keys[index]}"

        return annotations, Source("coco", split.root, self.file_names, image_place, box_place)

    def _image_ids(self) -> np.ndarray:
        """The file's ids, int64 [N]; 1, 2, ... if one of them is text or too large."""
        keys = list(self.index_of)
        if all(type(key) is int and abs(key) < 1 << 63 for key in keys):
            return np.array(keys, np.int64)
        reason = "image ids are text or beyond 64 bits; predictions number the images 1, 2, ... in the file's order"
        self.problems.note("LCD-D151", (self.file, ""), reason)
        return np.arange(1, len(keys) + 1)
