"""Images in folders."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from lightning_convnext_det.data.io.decode import IMAGE_SUFFIXES


def is_utf8(name: str) -> bool:
    """Whether a text has no halves of surrogate pairs, which JSON can hold and nothing can print."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def list_names(folder: Path) -> list[str]:
    """Sorted names in a folder, without hidden ones such as macOS' ``._a.xml``; none if there is no such folder."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "__MACOSX")
    except OSError:
        return []


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


def walk_images(folders: Iterable[Path], also: Callable[[str], bool] | None = None) -> list[Path]:
    """The sorted images in folders and everything below them, links followed; hidden folders are passed over.

    Args:
        folders: where to look.
        also: tells of other file names that they are taken too.
    """
    found = []
    for folder in folders:
        visited: set[str] = set()  # real paths, as links may lead in a circle
        for parent, children, names in os.walk(folder, followlinks=True):
            if (real := os.path.realpath(parent)) in visited:
                children.clear()
                continue
            visited.add(real)
            children[:] = [child for child in children if not child.startswith(".") and child != "__MACOSX"]
            found += [Path(parent, name) for name in names if is_image_name(name) or (also and also(name))]
    return sorted(found)
