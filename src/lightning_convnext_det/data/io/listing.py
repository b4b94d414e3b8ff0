"""Images in folders."""

import heapq
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lightning_convnext_det.data.io.decode import IMAGE_SUFFIXES


def is_utf8(name: str) -> bool:
    """Whether a text has no halves of surrogate pairs, which JSON can hold and nothing can print."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def list_names(folder: Path, suffix: str | tuple[str, ...] = "") -> list[str]:
    """Sorted names in a folder, without hidden ones such as macOS' ``._a.xml``; none if there is no such folder.

    Args:
        folder: where to look.
        suffix: names that do not end so, or in one of several ways, in upper or lower case, are left out.
    """
    try:
        names = (name for name in os.listdir(folder) if name.lower().endswith(suffix))
        return sorted(name for name in names if not name.startswith(".") and name != "__MACOSX")
    except OSError:
        return []


def folder_names(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder, links to folders included, without hidden ones."""
    try:
        with os.scandir(folder) as entries:  # which tell a folder without another call for each of a million files
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []
    return sorted(name for name in names if not name.startswith(".") and name != "__MACOSX")


def walk_files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted paths of the files below a folder with one of the suffixes, relative to it; no hidden ones."""
    found = []
    for parent, children, names in os.walk(folder):
        children[:] = [child for child in children if not child.startswith(".") and child != "__MACOSX"]
        start = os.path.relpath(parent, folder)
        chosen = [name for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
        found += [os.path.normpath(os.path.join(start, name)) for name in chosen]
    return sorted(found)


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image's; hidden files do not count."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def image_names(folder: Path) -> list[str]:
    """The sorted names of the images that lie in a folder itself."""
    return [name for name in list_names(folder) if is_image_name(name)]


def has_images(folder: Path) -> bool:
    """Whether an image lies in a folder itself."""
    try:
        with os.scandir(folder) as entries:
            return any(is_image_name(entry.name) for entry in entries)
    except OSError:
        return False


def walk_images(folders: Iterable[Path], also: Callable[[str], bool] | None = None) -> list[Path]:
    """The sorted images in folders and everything below them, links followed; hidden folders are passed over.

    Args:
        folders: where to look.
        also: tells of other file names that they are taken too.
    """
    found = []
    for parent, names in _walk(folders):
        found += [Path(parent, name) for name in names if is_image_name(name) or (also and also(name))]
    return sorted(found)


def first_images(folder: Path, count: int) -> list[Path]:
    """The first images that `walk_images` gives of a folder, without a path for each of the others."""
    found = []
    for parent, names in _walk([folder]):
        found += [Path(parent, name) for name in heapq.nsmallest(count, filter(is_image_name, names))]
    return sorted(found)[:count]


def _walk(folders: Iterable[Path]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder and the names of its files, links followed, hidden folders left out."""
    for folder in folders:
        visited: set[str] = set()  # real paths, as links may lead in a circle
        for parent, children, names in os.walk(folder, followlinks=True):
            if (real := os.path.realpath(parent)) in visited:
                children.clear()
                continue
            visited.add(real)
            children[:] = [child for child in children if not child.startswith(".") and child != "__MACOSX"]
            yield parent, names
