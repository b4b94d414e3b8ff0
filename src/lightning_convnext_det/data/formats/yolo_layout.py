"""Layouts of YOLO datasets: folders of images with label files, data.yaml, and darknet's obj.data."""

import os
from pathlib import Path

from lightning_convnext_det.data.annotations import Split, canonical_split
from lightning_convnext_det.data.formats.yolo_labels import IMAGE_FOLDERS, LABEL_FOLDERS, looks_like_yolo
from lightning_convnext_det.data.formats.yolo_yaml import class_file, darknet_splits, yaml_splits
from lightning_convnext_det.data.io.listing import folder_names, has_images, list_names

_SPLITS = ("train", "val", "trainval", "test")


def find_yolo(root: Path) -> dict[str, Split]:
    """Find the splits below a folder.

    Looks for ``data.yaml`` or another YAML file with ``names`` and ``train``; for darknet's ``obj.data``; else for
    images with label files, in ``images/train``, ``train/images``, ``train``, ``images`` or the folder itself.
    """
    if splits := yaml_splits(root) or darknet_splits(root):
        return splits
    children = folder_names(root)
    image_folders = [root / name for name in children if name.lower() in IMAGE_FOLDERS]
    inner = [(canonical_split(name), folder / name) for folder in image_folders for name in list_names(folder)]
    below = [
        (canonical_split(name), root / name / child)
        for name in children
        for child in folder_names(root / name)
        if child.lower() in IMAGE_FOLDERS
    ]
    beside = [(canonical_split(name), root / name) for name in children if has_images(root / name)]
    for group in (inner, below, beside):
        folders = {key: folder for key, folder in group if key in _SPLITS and looks_like_yolo(folder, root)}
        if folders:
            return {key: _folder_split(key, root, folder) for key, folder in folders.items()}
    for folder in (*image_folders, root):
        if has_images(folder) and looks_like_yolo(folder, root):
            return {"train": _folder_split("train", root, folder)}
    return {}


def _folder_split(name: str, root: Path, folder: Path) -> Split:
    """A split that is a folder of images."""
    parts = folder.relative_to(root).parts
    labels = [
        root / Path(*(label if part.lower() in IMAGE_FOLDERS else part for part in parts)) for label in LABEL_FOLDERS
    ]
    places = (*labels, *(root / label for label in LABEL_FOLDERS), folder, folder.parent, root)
    return Split(name, "yolo", root, (), (folder,), (), class_file([Path(os.path.normpath(p)) for p in places]))
