"""Find the splits of a dataset by looking at its folder, and read them in any format."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from lightning_convnext_det.data.annotations import (
    Action,
    DetectionAnnotations,
    Format,
    Problem,
    Split,
    UnreadableError,
    canonical_split,
)
from lightning_convnext_det.data.formats.coco import read_coco
from lightning_convnext_det.data.formats.coco_layout import find_coco, image_folders, split_words
from lightning_convnext_det.data.formats.cvat import find_cvat, looks_like_cvat, read_cvat
from lightning_convnext_det.data.formats.exif_frames import Exif
from lightning_convnext_det.data.formats.problems import InvalidAnnotations, refuse_problems
from lightning_convnext_det.data.formats.voc import read_voc
from lightning_convnext_det.data.formats.voc_layout import find_voc, image_folder_of
from lightning_convnext_det.data.formats.yolo import read_yolo
from lightning_convnext_det.data.formats.yolo_layout import find_yolo
from lightning_convnext_det.data.formats.yolo_yaml import root_of_yaml, yaml_splits
from lightning_convnext_det.data.io.decode import MAX_PIXELS
from lightning_convnext_det.data.io.files import open_file
from lightning_convnext_det.data.io.listing import list_names

_OTHERS = {  # ends of file names, by which annotations that are not read are recognised
    ".createml.json": "CreateML's JSON",
    ".json.gz": "a compressed archive",
    ".zip": "an archive",
    ".tar": "an archive",
    ".tar.gz": "an archive",
    ".tgz": "an archive",
    ".csv": "a table",
    ".tfrecord": "TFRecord",
    ".parquet": "a table",
}

_FINDERS: dict[Format, Callable[[Path], dict[str, Split]]] = {
    "coco": find_coco,
    "voc": find_voc,
    "yolo": find_yolo,
    "cvat": find_cvat,
}
_LOOKED_FOR: dict[Format, str] = {
    "coco": "COCO: annotations/instances_*.json, */_annotations.coco.json, *.json beside images",
    "voc": "VOC: ImageSets/Main/*.txt with Annotations/*.xml, *.xml beside images or in a folder next to theirs",
    "yolo": "YOLO: data.yaml, obj.data, images with label files *.txt beside them or in labels/",
    "cvat": "CVAT for images: annotations.xml",
}
_ORDER = ("train", "trainval", "val", "test")


def find_splits(root: str | Path, format: Literal["auto"] | Format = "auto") -> dict[str, Split]:
    """Find the splits of a dataset by name: ``train``, ``val``, ``trainval``, ``test`` or what its files call them.

    Args:
        root: folder of the dataset, or its ``data.yaml``, or one COCO file.
        format: ``auto`` tries all.

    Returns:
        At least one split; training before validation before test.

    Raises:
        UnreadableError: a DataError, if there is no such folder, nothing in it, no layout that is known, or several.
        ValueError: if ``format`` is not one of its values.
    """
    if format not in ("auto", *_FINDERS):
        raise ValueError(f"format is {format!r}; it can be 'auto', {', '.join(map(repr, _FINDERS))}")
    root = Path(os.path.abspath(root))
    if root.is_file():
        return _splits_of_file(root)
    if not root.is_dir():
        parent = next(folder for folder in root.parents if folder.is_dir())
        raise UnreadableError.of("LCD-L001", root, f"there is no such folder; {parent} holds {_contents(parent)}")
    if not list_names(root):
        raise UnreadableError.of("LCD-L001", root, "the folder is empty")
    formats: list[Format] = list(_FINDERS) if format == "auto" else [format]
    found = {name: splits for name in formats if (splits := _FINDERS[name](root))}
    if len(found) > 1:
        raise UnreadableError.of(
            "LCD-L003", root, f"holds {' and '.join(map(str.upper, found))} annotations; give format"
        )
    if not found:
        raise UnreadableError.of("LCD-L002", root, _unknown(root, formats))
    splits = next(iter(found.values()))
    order = sorted(splits, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    return {name: splits[name] for name in order}


def make_split(annotations: str | Path, images: str | Path | None = None, name: str = "train") -> Split:
    """Describe a split by its paths, where looking at a folder does not find it.

    Args:
        annotations: a COCO file, or a folder of VOC's XML. For YOLO give ``data.yaml`` to ``find_splits``.
        images: the folder of the images; looked for beside the annotations if not given.
        name: what the split is called; ``annotations`` may be missing from the file of a ``test`` split.

    Raises:
        UnreadableError: a DataError, if a path does not exist or is of another kind.
    """
    path = Path(os.path.abspath(annotations))
    folder = None if images is None else Path(os.path.abspath(images))
    if not path.exists() or (folder is not None and not folder.is_dir()):
        missing = path if not path.exists() or folder is None else folder
        raise UnreadableError.of("LCD-L001", missing, "there is no such file or folder")
    if path.is_file() and path.suffix.lower() == ".json":
        if folder is not None:
            return Split(name, "coco", folder, (path,), (folder,))
        root = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
        return Split(name, "coco", root, (path,), image_folders(root, path, (split_words(path.stem), name)))
    if path.is_file() and looks_like_cvat(path):
        root = path.parent if folder is None else Path(os.path.commonpath([path.parent, folder]))
        return Split(name, "cvat", root, (path,), (folder,) if folder else image_folders(root, path, (name,)))
    if path.is_dir() and list_names(path, ".xml"):
        folder = folder or image_folder_of(path)
        root = Path(os.path.commonpath([path, folder]))
        return Split(name, "voc", root, (path,), (folder,), (), (path,))
    raise UnreadableError.of(
        "LCD-L002", path, "expected a COCO file *.json, a folder of VOC's *.xml, or CVAT's annotations.xml"
    )


def read_split(
    split: Split,
    *,
    class_names: Sequence[str] | None = None,
    invalid_annotations: InvalidAnnotations = "auto",
    train_on_difficult: bool = False,
    exif: Exif = "auto",
    check_images: bool = True,
    follow_symlinks: bool = True,
    max_pixels: int = MAX_PIXELS,
    collect: bool = False,
) -> DetectionAnnotations:
    """Read a split of any format, check every record, and refuse it if one cannot be used.

    Args:
        split: what ``find_splits`` or ``make_split`` gives.
        class_names: the names of the classes in order of label; those of the dataset if not given.
        invalid_annotations: ``auto`` leaves out harmless ones (no area, outside the image, repeated) and refuses
            doubtful ones (not finite, unknown category, missing image); ``drop`` leaves out both, ``refuse`` refuses
            both.
        train_on_difficult: treat VOC's ``difficult`` objects like the others, instead of as crowd.
        exif: ``auto`` lets the annotated size of an image, or its boxes, decide whether they refer to the upright or
            the stored image; ``upright`` and ``raw`` say it.
        check_images: open every image's header. Without it images are taken as they are annotated.
        follow_symlinks: accept images that are links out of the root.
        max_pixels: larger images are refused, before they are decoded.
        collect: keep what is refused in ``problems`` and raise nothing for it.

    Raises:
        DataError: if a file as a whole cannot be used, or, without ``collect``, if a record is refused or no image is
            left; it names the first 20 records and counts all.
    """
    reader: Callable[..., DetectionAnnotations] = read_yolo
    if split.format == "coco":
        reader = partial(read_coco, check_images=check_images)
    elif split.format == "voc":
        reader = partial(read_voc, check_images=check_images, train_on_difficult=train_on_difficult)
    elif split.format == "cvat":
        reader = partial(read_cvat, check_images=check_images)
    annotations = reader(
        split,
        class_names=class_names,
        invalid_annotations=invalid_annotations,
        exif=exif,
        follow_symlinks=follow_symlinks,
        max_pixels=max_pixels,
    )
    annotations = replace(annotations, problems=(*annotations.problems, *_similar_classes(annotations, split)))
    if not collect:
        refuse_problems(annotations)
        if not len(annotations):
            count = len(annotations.problems)
            first = f"; the first of {count} problems: {annotations.problems[0]}" if count else ""
            raise UnreadableError.of("LCD-L004", split.root, f"split {split.name!r} has no images{first}")
    return annotations


def _similar_classes(annotations: DetectionAnnotations, split: Split) -> list[Problem]:
    """Notes on classes whose names differ in case or blanks only."""
    groups: dict[str, list[str]] = {}
    for name in annotations.class_names:
        groups.setdefault("".join(name.split()).casefold(), []).append(name)
    return [
        Problem("LCD-D159", str(split.root), "", f"classes {names} differ in case or blanks only", "noted")
        for names in groups.values()
        if len(names) > 1
    ]


def compare_classes(splits: Mapping[str, DetectionAnnotations]) -> list[Problem]:
    """Problems of splits whose class names or category ids are not those of the first one.

    A split that lacks classes of the first one is noted, any other difference is refused.
    """
    problems = []
    names = list(splits)
    for name in names[1:]:
        first, other = splits[names[0]], splits[name]
        ours = dict(zip(first.class_names, first.category_ids, strict=True))
        theirs = dict(zip(other.class_names, other.category_ids, strict=True))
        # a negative id stands for a class that the file does not declare
        wrong = [c for c in theirs if c not in ours or (ours[c] != theirs[c] and min(ours[c], theirs[c]) >= 0)]
        action: Action = "refused"
        if wrong:
            where = f"id {ours[wrong[0]]}" if wrong[0] in ours else "nowhere"
            detail = f"class {wrong[0]!r} of id {theirs[wrong[0]]} is {where} there"
        elif len(theirs) < len(ours):
            action, detail = "noted", f"it has {len(theirs)} of the {len(ours)} classes, which are those of training"
        elif [c for c in ours if c in theirs] != list(theirs):
            detail = "their order is another"
        else:
            continue
        reason = f"the classes differ from those of split {names[0]!r}: {detail}"
        problems.append(Problem("LCD-D120", str(other.image_root), f"split {name!r}", reason, action))
    return problems


def compare_objects(train: DetectionAnnotations, other: DetectionAnnotations, name: str) -> Problem | None:
    """The problem of a split whose objects are of classes that training has no object of; None without any.

    It is refused if that goes for all of them, as the mAP would be 0, else noted.
    """
    learned = {train.class_names[label] for label in np.unique(train.labels[~train.crowd])}
    labels, counts = np.unique(other.labels[~other.crowd], return_counts=True)
    objects = dict(zip((other.class_names[label] for label in labels), counts.tolist(), strict=True))
    unknown = {kind: count for kind, count in objects.items() if kind not in learned}
    if not unknown:
        return None
    kinds = ", ".join(f"{kind!r} ({count})" for kind, count in list(unknown.items())[:5])
    more = f" and {len(unknown) - 5} more classes" if len(unknown) > 5 else ""
    share = "all" if len(unknown) == len(objects) else f"{sum(unknown.values())} of {sum(objects.values())}"
    reason = f"{share} objects are of classes that training has no object of: {kinds}{more}; none of them can be found"
    action: Action = "refused" if len(unknown) == len(objects) else "noted"
    return Problem("LCD-D128", str(other.image_root), f"split {name!r}", reason, action)


def _splits_of_file(path: Path) -> dict[str, Split]:
    """The splits of a data.yaml, or the one of a COCO or CVAT file."""
    if path.suffix.lower() in (".yaml", ".yml"):
        splits = yaml_splits(root_of_yaml(path), path)
        if not splits:
            raise UnreadableError.of("LCD-L002", path, "expected the keys names and train, val or test")
        return splits
    split = make_split(path)
    name = canonical_split(split_words(path.stem))
    return {name: split._replace(name=name)}


def _unknown(root: Path, formats: Sequence[Format]) -> str:
    """What was looked for in a folder and what is there."""
    reason = f"no known layout. Looked for {'; '.join(_LOOKED_FOR[name] for name in formats)}. Found {_contents(root)}"
    folders = [root / name for name in list_names(root)[:50] if (root / name).is_dir()]
    below = [folder / name for folder in folders for name in list_names(folder)[:50] if (folder / name).is_dir()]
    for folder in (*folders, *below[:100]):
        if any(_FINDERS[kind](folder) for kind in formats):
            return f"{reason}. Is {folder} meant?"
    return f"{reason}{_other_format(root, folders)}"


def _other_format(root: Path, folders: Sequence[Path]) -> str:
    """Say which annotations of a format that is not read a folder, or one in it, seems to have."""
    for folder in (root, *folders):
        for name in list_names(folder):
            kind = next((kind for suffix, kind in _OTHERS.items() if name.lower().endswith(suffix)), None)
            if kind is None and name.lower().endswith(".json"):
                with suppress(OSError), open_file(folder / name) as file:
                    kind = "LabelMe's JSON" if b'"shapes"' in file.read(4096) else None
            if kind is not None:
                remedy = "unpack it" if "archive" in kind else "export the dataset as COCO, VOC or YOLO"
                return f". {folder / name} looks like {kind}, which is not read: {remedy}"
    return ""


def _contents(folder: Path, shown: int = 8) -> str:
    """The first entries of a folder, for a message."""
    names = [name + "/" * (folder / name).is_dir() for name in list_names(folder)]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more if names else "nothing"
