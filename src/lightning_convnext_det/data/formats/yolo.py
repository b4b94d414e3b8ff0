"""YOLO: a text file for each image, with a line for each box: class, centre, width, height, relative to the image.

The text file of ``images/train/a.jpg`` is ``labels/train/a.txt``, else ``a.txt`` beside the image. An image without
one has no objects. Lines with more numbers are outlines, of which the bounding box is taken. Nothing states the size of
an image, so one with an EXIF orientation is refused until the user says what its boxes were drawn on.

In a :class:`Split`, ``images`` are folders, searched with all below them, ``members`` files that list images, and
``classes`` the file of the class names, ``data.yaml`` or ``classes.txt``.

Reference:
    https://docs.ultralytics.com/datasets/detect/
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lightning_convnext_det.data.annotations import DetectionAnnotations, Split, UnreadableError, canonical_split
from lightning_convnext_det.data.formats.assembly import build_annotations
from lightning_convnext_det.data.formats.exif_frames import Exif
from lightning_convnext_det.data.formats.records import AnnotationProblems, InvalidAnnotations, Records
from lightning_convnext_det.data.formats.yolo_labels import looks_like_yolo, read_labels
from lightning_convnext_det.data.formats.yolo_yaml import class_file, read_class_names, yaml_splits
from lightning_convnext_det.data.io.files import read_text
from lightning_convnext_det.data.io.listing import image_names, list_names, walk_images

_SPLITS = ("train", "val", "trainval", "test")


def read_yolo(
    split: Split,
    *,
    class_names: Sequence[str] | None = None,
    invalid_annotations: InvalidAnnotations = "auto",
    exif: Exif = "auto",
    follow_symlinks: bool = True,
) -> DetectionAnnotations:
    """Read a split; records that it refuses are left out of the table and listed in its ``problems``.

    Args:
        split: what :func:`find_yolo` finds.
        class_names: the names of the classes in order of label; those of ``data.yaml`` or ``classes.txt`` if not given.
        invalid_annotations: see ``records.py``.
        exif: see ``images.py``.
        follow_symlinks: see ``images.py``.

    Raises:
        UnreadableError: a DataError, if a list or the file of class names cannot be used.
    """
    findings = AnnotationProblems(invalid_annotations)
    names = tuple(class_names) if class_names is not None else read_class_names(split.classes)
    images = _images(split)
    where = os.path.relpath((split.images + split.members)[0], split.root)
    num_classes = None if names is None else len(names)
    lines, labels = read_labels(split.root, images, num_classes, findings, (where, ""))
    if names is None:
        names = tuple(map(str, range(1 + max((line.label for line in lines), default=0))))
        reason = "no class names: expected data.yaml, or classes.txt beside the labels; else give class_names"
        findings.suspect("LCD-D008", (str(split.root), ""), f"{reason} (labels run to {len(names) - 1})")
    records = Records(
        format="yolo",
        root=split.root,
        image_root=split.root,
        file_names=images,
        image_ids=np.arange(1, len(images) + 1),
        sizes=np.zeros((len(images), 2), np.int32),
        boxes=np.array([line.box for line in lines], np.float64).reshape(-1, 4),
        image_index=np.array([line.image for line in lines], np.int64),
        labels=np.array([line.label for line in lines], np.int64),
        crowd=np.zeros(len(lines), np.bool_),
        area=np.zeros(len(lines)),
        annotation_ids=np.arange(1, len(lines) + 1),
        class_names=names,
        category_ids=tuple(range(len(names))),
        image_where=lambda index: (images[index], ""),
        box_where=lambda row: (labels[lines[row].image], f"line {lines[row].number}"),
    )
    return build_annotations(records, findings, exif=exif, follow_symlinks=follow_symlinks)


def _images(split: Split) -> list[str]:
    """The images of a split relative to its root; those that a list names may lie outside and are refused later."""
    for folder in split.images:
        if not folder.is_dir() or not folder.is_relative_to(split.root):
            where = (
                f"below {split.root}" if folder.is_relative_to(split.root) else f"in {split.root}; make that the root"
            )
            raise UnreadableError.of("LCD-D122", folder, f"split {split.name!r}: there is no such folder {where}")
    images = [os.path.relpath(image, split.root) for image in walk_images(split.images)]
    for path in split.members:
        if not path.is_relative_to(split.root):  # its lines would be shown as file names
            raise UnreadableError.of("LCD-D122", path, f"split {split.name!r}: the list is not below {split.root}")
        images += _listed(path, split.root)
    return images


def _listed(path: Path, root: Path) -> Iterator[str]:
    """The images that a text file lists, taken from its own folder, or else from the root."""
    try:
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError.of("LCD-D122", path, f"the list of images cannot be read ({error})") from error
    start = path.parent
    if lines and not os.path.isfile(start / lines[0]) and os.path.isfile(root / lines[0]):
        start = root
    for line in lines:
        inside = not os.path.isabs(line) or Path(line).is_relative_to(root)
        yield os.path.relpath(os.path.normpath(start / line), root) if inside else line


def find_yolo(root: Path) -> dict[str, Split]:
    """Find the splits below a folder.

    Looks for ``data.yaml`` or another YAML file with ``names`` and ``train``; else for images with label files, in
    ``images/train``, ``train/images``, ``train``, ``images`` or the folder itself.
    """
    if splits := yaml_splits(root):
        return splits
    pairs = [(canonical_split(name), name) for name in list_names(root)]
    nested = [(canonical_split(name), root / "images" / name) for name in list_names(root / "images")]
    groups = (
        nested,
        [(key, root / name / "images") for key, name in pairs],
        [(key, root / name) for key, name in pairs if image_names(root / name)],
    )
    for group in groups:
        folders = {key: folder for key, folder in group if key in _SPLITS and looks_like_yolo(folder, root)}
        if folders:
            return {key: _folder_split(key, root, folder) for key, folder in folders.items()}
    for folder in (root / "images", root):
        if image_names(folder) and looks_like_yolo(folder, root):
            return {"train": _folder_split("train", root, folder)}
    return {}


def _folder_split(name: str, root: Path, folder: Path) -> Split:
    """A split that is a folder of images."""
    labels = Path(*("labels" if part == "images" else part for part in folder.relative_to(root).parts))
    places = (root / labels, root / "labels", folder, folder.parent, root)
    return Split(name, "yolo", root, (), (folder,), (), class_file(places))
