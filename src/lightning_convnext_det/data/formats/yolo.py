"""Reader of YOLO: a text file per image with a line per box: class, centre, width, height, relative to the image.

The text file of ``images/train/a.jpg`` is ``labels/train/a.txt``, else ``a.txt`` beside the image. An image without
one has no objects. Lines with more numbers are outlines, of which the bounding box is taken, or boxes with key points.
No file has the size of an image, so one with an EXIF orientation is refused until the user says what boxes refer to.

In a :class:`Split`, ``images`` are folders, searched with all below them, ``members`` files that list images, and
``classes`` the file of the class names, ``data.yaml`` or ``classes.txt``.

Reference:
    https://docs.ultralytics.com/datasets/detect/
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lightning_convnext_det.data.annotations import DetectionAnnotations, Split, UnreadableError, count_offsets
from lightning_convnext_det.data.formats.exif_frames import Exif
from lightning_convnext_det.data.formats.file_names import encode_names, find_variant
from lightning_convnext_det.data.formats.problems import AnnotationProblems, InvalidAnnotations, Source
from lightning_convnext_det.data.formats.validation import validate_annotations
from lightning_convnext_det.data.formats.yolo_labels import read_labels
from lightning_convnext_det.data.formats.yolo_yaml import read_class_names, read_key_points
from lightning_convnext_det.data.io.decode import MAX_PIXELS
from lightning_convnext_det.data.io.files import read_text
from lightning_convnext_det.data.io.listing import walk_images


def read_yolo(
    split: Split,
    *,
    class_names: Sequence[str] | None = None,
    invalid_annotations: InvalidAnnotations = "auto",
    exif: Exif = "auto",
    follow_symlinks: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> DetectionAnnotations:
    """Read a split; refused records are left out and listed in ``problems``.

    Args:
        split: what :func:`find_yolo` finds.
        class_names: names of the classes in order of label (default: those of ``data.yaml`` or ``classes.txt``).
        invalid_annotations: see ``problems.py``.
        exif: see ``exif_frames.py``.
        follow_symlinks: see ``exif_frames.py``.
        max_pixels: see ``exif_frames.py``.

    Raises:
        UnreadableError: a DataError, if a list or the file of class names cannot be used.
    """
    problems = AnnotationProblems(invalid_annotations)
    names = tuple(class_names) if class_names is not None else read_class_names(split.classes)
    images = _images(split)
    place = (os.path.relpath((split.images + split.members)[0], split.root), "")
    for note in split.notes:
        problems.note("LCD-D122", (os.path.relpath(split.classes[0], split.root) if split.classes else "", ""), note)
    num_classes = None if names is None else len(names)
    lines, labels = read_labels(
        split.root, images, num_classes, read_key_points(split.classes), problems, place, not split.members
    )
    if names is None:
        names = tuple(map(str, range(1 + max((line.label for line in lines), default=0))))
        reason = "no class names: expected data.yaml, or classes.txt beside the labels; else give class_names"
        problems.suspect("LCD-D008", (str(split.root), ""), f"{reason} (labels run to {len(names) - 1})")
    boxes = np.array([line.box for line in lines], np.float64).reshape(-1, 4)
    with np.errstate(invalid="ignore"):
        start, half = boxes[:, :2], boxes[:, 2:] / 2
    annotations = DetectionAnnotations(
        image_root=split.root,
        file_names=encode_names(images),
        image_ids=np.arange(1, len(images) + 1),
        sizes=np.zeros((len(images), 2), np.int32),
        upright=np.zeros(len(images), np.bool_),
        boxes=np.concatenate([start - half, start + half], axis=1),
        labels=np.array([line.label for line in lines], np.int64),
        crowd=np.zeros(len(lines), np.bool_),
        area=np.zeros(len(lines)),
        annotation_ids=np.arange(1, len(lines) + 1),
        offsets=count_offsets([line.image for line in lines], len(images)),
        class_names=names,
        category_ids=tuple(range(len(names))),
    )
    source = Source(
        format="yolo",
        root=split.root,
        file_names=images,
        image_place=lambda index: (images[index], ""),
        box_place=lambda row: (labels[lines[row].image], f"line {lines[row].number}"),
    )
    return validate_annotations(
        annotations, source, problems, exif=exif, follow_symlinks=follow_symlinks, max_pixels=max_pixels
    )


def _images(split: Split) -> list[str]:
    """The images of a split relative to its root; those that a list names may lie outside and are refused later."""
    for folder in split.images:
        if not folder.is_dir() or not folder.is_relative_to(split.root):
            inside = folder.is_relative_to(split.root)
            place = f"below {split.root}" if inside else f"in {split.root}; make that the root"
            raise UnreadableError.of("LCD-D122", folder, f"split {split.name!r}: there is no such folder {place}")
    images = [os.path.relpath(image, split.root) for image in walk_images(split.images)]
    for path in split.members:
        if not path.is_relative_to(split.root):  # its lines would be shown as file names
            raise UnreadableError.of("LCD-D122", path, f"split {split.name!r}: the list is not below {split.root}")
        images += _listed(path, split.root)
    return images


def _listed(path: Path, root: Path) -> Iterator[str]:
    """The images that a text file lists, taken from its own folder, from the root, or from another machine's."""
    try:
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError.of("LCD-D122", path, f"the list of images cannot be read ({error})") from error
    start = path.parent
    if lines and not os.path.isfile(start / lines[0]) and os.path.isfile(root / lines[0]):
        start = root
    for line in lines:
        inside = not os.path.isabs(line) or Path(line).is_relative_to(root)
        name = os.path.relpath(os.path.normpath(start / line), root) if inside else line
        if not os.path.isfile(root / name) or not inside or name.startswith(os.pardir):
            name = find_variant(root, line) or name  # also refused later if two lines lead to one file
        yield name
