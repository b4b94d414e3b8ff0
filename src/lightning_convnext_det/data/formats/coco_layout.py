"""Layouts of COCO datasets: where the annotation file of each split and its images are."""

import re
from collections.abc import Sequence
from pathlib import Path

from lightning_convnext_det.data.annotations import Split, canonical_split
from lightning_convnext_det.data.io.files import open_file
from lightning_convnext_det.data.io.listing import folder_names, list_names

_IMAGE_FOLDERS = ("images", "Images", "imgs", "JPEGImages", "data")
_FILLER_WORDS = {"instances", "annotations", "annotation", "coco", "json", "bbox", "labels", "result", ""}
_SPLIT_WORDS = {"train", "val", "test", "trainval"}
_HEAD = 1 << 16  # bytes of a file that are looked at


def find_coco(root: Path) -> dict[str, Split]:
    """Find the annotation files below a folder, by the name of the split.

    Looks for ``annotations/instances_*.json``, any COCO file in ``annotations`` or in the folder itself, and one COCO
    file in a folder named like a split, such as ``train/_annotations.coco.json`` or ``train/labels.json``.
    """
    found: dict[str, Split] = {}
    for folder in (root / "annotations", root / "Annotations", root):
        if files := _coco_files(folder):
            stems = [split_words(file.stem) for file in files]
            keys = [canonical_split(stem) for stem in stems]
            keys = keys if len(set(keys)) == len(keys) else stems
            for key, stem, file in zip(keys, stems, files, strict=True):
                found[key] = Split(key, "coco", root, (file,), image_folders(root, file, (stem, key)))
            return found
    folders = [(name, root / name) for name in folder_names(root)]
    for name, folder in folders:
        files = [folder / "_annotations.coco.json"]
        if not files[0].is_file() and canonical_split(name) in _SPLIT_WORDS:
            files = _coco_files(folder) or _coco_files(folder / "annotations")
        if len(files) == 1 and files[0].is_file():
            key = canonical_split(name)
            found[key] = Split(key, "coco", root, (files[0],), image_folders(folder, files[0], (name,)))
    return found


def _coco_files(folder: Path) -> list[Path]:
    """The annotation files in a folder; one called instances_ is taken unseen, so that damage is reported."""
    files = [folder / name for name in list_names(folder, ".json")]
    named = [file for file in files if file.name.startswith("instances_")]
    return named or [file for file in files if looks_like_coco(file)]


def looks_like_coco(path: Path) -> bool:
    """Whether a JSON file begins like an object with COCO's keys; one with classes alone accompanies other formats."""
    try:
        with open_file(path) as file:
            start = file.read(_HEAD)
    except OSError:
        return False
    keys = rb"images|annotations" if len(start) < _HEAD else rb"images|annotations|categories|licenses|info"
    is_object = start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    return is_object and re.search(rb'"(?:' + keys + rb')"\s*:', start) is not None


def image_folders(root: Path, file: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """The folders that may hold the images of an annotation file, the likeliest first."""
    names = [*names, *(("valid", "validation") if "val" in names else ())]
    names += [name for name in list_names(root) if canonical_split(name) in names and name not in names]
    bases = [root / folder for folder in ("", *_IMAGE_FOLDERS)]
    folders = [base / name for base in bases for name in names]
    folders += [root / name / inner for name in names for inner in _IMAGE_FOLDERS]
    folders += [file.parent / inner for inner in _IMAGE_FOLDERS]
    folders += [*bases[1:], file.parent, root]
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def split_words(stem: str) -> str:
    """What a file's name says about the split: ``instances_train2017`` says ``train2017``."""
    words = [word for word in re.split(r"[._\- ]", stem) if word.lower() not in _FILLER_WORDS]
    splits = [word for word in words if canonical_split(word) in _SPLIT_WORDS]
    if len(splits) == 1 and splits[0] == words[-1]:  # lvis_v1_train, person_keypoints_val2017
        return splits[0]
    return "_".join(words) or "train"
