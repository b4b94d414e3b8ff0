"""Layouts of Pascal VOC datasets: where the XML files, the images and the lists of each split are."""

import re
from pathlib import Path

from lightning_convnext_det.data.annotations import Split, canonical_split
from lightning_convnext_det.data.io.decode import IMAGE_SUFFIXES
from lightning_convnext_det.data.io.files import open_file
from lightning_convnext_det.data.io.listing import folder_names, has_images, list_names, walk_files

_SETS = ("train", "val", "trainval", "test")
_XML_FOLDERS = ("Annotations", "annotations", "annots", "labels", "xml")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "img")


def find_voc(root: Path) -> dict[str, Split]:
    """Find the splits below a folder.

    Looks for ``ImageSets/Main/*.txt`` with ``Annotations`` and ``JPEGImages``, in the folder itself and in ``VOC2007``,
    ``VOC2012``, ... of it or of its ``VOCdevkit`` (years are joined); else for XML beside the images or in a folder
    next to theirs, in ``train``, ``valid``, ``test`` or in the folder itself.
    """
    found: dict[str, list[tuple[Path, Path, Path | None]]] = {}
    for year in _years(root):
        xml = year / "Annotations"
        for key, file in _lists(year / "ImageSets" / "Main").items():
            found.setdefault(key, []).append((xml, image_folder_of(xml), file))
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


def _lists(folder: Path) -> dict[str, Path]:
    """The lists of splits; a single one of another name, such as CVAT's ``default.txt``, is for training."""
    files = {Path(name).stem: folder / name for name in list_names(folder) if name.endswith(".txt")}
    splits = {canonical_split(stem): file for stem, file in files.items() if canonical_split(stem) in _SETS}
    others = [
        stem for stem in files if not re.search(r"_(train|val|trainval|test)$", stem)
    ]  # those are of single classes
    return splits or ({"train": files[others[0]]} if len(others) == 1 else {})


def _years(root: Path) -> list[Path]:
    """The folders that hold Annotations and ImageSets/Main."""
    parents = [root, root / "VOCdevkit"]
    children = [parent / name for parent in parents for name in list_names(parent) if name.startswith("VOC2")]
    folders = [*parents, *children]
    return [folder for folder in folders if (folder / "Annotations").is_dir() and (folder / "ImageSets/Main").is_dir()]


def _xml_folder(folder: Path) -> Path | None:
    """The folder of VOC's XML: the folder itself or one in it."""
    if _holds_voc(folder, _xml_files(folder)):
        return folder
    names = [name for name in folder_names(folder) if _holds_voc(folder / name, _xml_files(folder / name))]
    known = [name for name in _XML_FOLDERS if name in names]
    chosen = known or (names if len(names) == 1 else [])
    return folder / chosen[0] if chosen else None


def _xml_files(folder: Path) -> list[str]:
    """The XML files in a folder; also those below it if it has a name that VOC and CVAT give."""
    if folder.name in _XML_FOLDERS:
        return walk_files(folder, (".xml",))
    return list_names(folder, ".xml")


def _holds_voc(folder: Path, names: list[str]) -> bool:
    """Whether the first of some XML files is an annotation."""
    if not names:
        return False
    try:
        with open_file(folder / names[0]) as file:
            start = file.read(4096).replace(b"\0", b"")  # UTF-16, which the parser reads by its byte order mark
        return re.search(rb"<annotation[\s>]", start) is not None
    except OSError:
        return False


def image_folder_of(xml: Path) -> Path:
    """The folder of the images that a folder of XML describes."""
    if has_images(xml):
        return xml
    siblings = [name for name in folder_names(xml.parent) if walk_files(xml.parent / name, tuple(IMAGE_SUFFIXES))]
    known = [name for name in _IMAGE_FOLDERS if name in siblings]
    chosen = known or (siblings if len(siblings) == 1 else [])
    return xml.parent / chosen[0] if chosen else xml.parent
