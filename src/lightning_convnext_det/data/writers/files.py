"""Files of one image each in a folder of results: unique names, a list of what was written, and its removal.

Each rank lists its files before it writes them, so that the next prediction can replace them whatever ended this one.
The lists are JSON in ASCII, which holds any file name.
"""

import itertools
import json
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from lightning_convnext_det.errors import ArgumentError

_logger = logging.getLogger(__name__)
_LONGEST_NAME = 255  # bytes, of the usual file systems
OF_ALL_IMAGES = -1  # in place of an image's id
_KEPT = "kept"  # in place of a rank, in the name of the list of what is kept


def hidden(folder: Path, rank: int | str, ending: str) -> Path:
    """A hidden file of a rank's own in the folder of results."""
    return folder / f".predictions-{rank}.{ending}"


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Tell a user what he can do where a folder of results cannot be written to, or is full."""
    try:
        yield
    except OSError as error:
        raise ArgumentError(
            f"cannot write predictions to folder '{folder}' ({error}); make room in it, or choose another"
        ) from error


class FileList:
    """Reserves names in a folder of results and lists them.

    Args:
        folder: of the results.
        rank: of the process that writes.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._said = False
        self._image_id: int | None = None
        self._tried: dict[tuple[Path, str, str], int] = {}  # names of files of the last image
        self._file: TextIO = open(hidden(folder, rank, "drawn"), "w")  # noqa: SIM115  # closed by close()

    def reserve(self, parent: Path, stem: str, suffix: str, image_id: int) -> Path:
        """Create an empty file for an image, under a name that no rank and no file of the user has.

        Args:
            parent: folder of the file, in the folder of results.
            stem: of the image's name; where that is taken, the image id is added; a name that is too long for the file
                system is shortened, and a warning says so once.
            suffix: of the file.
            image_id: of the image.
        """
        parent.mkdir(parents=True, exist_ok=True)
        room = _longest_name(parent) - len(suffix)
        if image_id != self._image_id:
            self._image_id, self._tried = image_id, {}
        key = parent, stem, suffix
        start = self._tried.get(key, 0)  # an image may have thousands of crops of one class
        for number in itertools.count(start):
            path = parent / f"{_name(stem, image_id, number, room)}{suffix}"
            self._tried[key] = number + 1
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            self._file.write(f"{json.dumps([path.relative_to(self.folder).as_posix(), image_id])}\n")
            self._file.flush()  # a rank that is killed has listed its files, too
            if not (self._said or path.name.startswith(stem)):
                self._said = True
                _logger.warning("names of results that the file system cannot hold are shortened, first '%s'", path)
            return path
        raise AssertionError("names do not end")

    def close(self) -> None:
        """Close the list."""
        self._file.close()


def remove_files(folder: Path, keep: Collection[int] = ()) -> tuple[int, int]:
    """Remove the files that an earlier prediction has written for its images.

    Args:
        folder: of the results.
        keep: ids of images whose files stay.

    Returns:
        How many files were removed, and how many stay in the folder itself: drawings.
    """
    lists = list(folder.glob(".predictions-*.drawn"))
    listed = [entry for path in lists for entry in _listed(path)]
    stay = [(name, image_id) for name, image_id in listed if image_id in keep]
    removed = 0
    for name, image_id in listed:
        if image_id not in keep and (path := _inside(folder, name)) is not None and path.is_file():
            path.unlink()
            removed += 1
            _remove_empty(path.parent, folder)
    if stay:
        hidden(folder, _KEPT, "tmp").write_text("".join(f"{json.dumps(entry)}\n" for entry in stay))
        hidden(folder, _KEPT, "tmp").replace(hidden(folder, _KEPT, "drawn"))
    for path in lists:
        if not stay or path != hidden(folder, _KEPT, "drawn"):
            path.unlink()
    return removed, sum("/" not in name for name, _ in stay)


def written_files(folder: Path) -> list[Path]:
    """The files that predictions have written into a folder for their images."""
    if not any(hidden(folder, rank, "drawn").exists() for rank in (0, _KEPT)):  # a folder may have a million files
        return []
    return [folder / name for path in folder.glob(".predictions-*.drawn") for name, _ in _listed(path)]


def _listed(path: Path) -> Iterator[tuple[str, int]]:
    """The names and image ids in a list; a line that a crash has truncated is skipped."""
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, TypeError):
            name, image_id = json.loads(line)
            yield str(name), int(image_id)


def _inside(folder: Path, name: str) -> Path | None:
    """The path of a listed file, unless it leads out of the folder: others may have written the list."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        return None
    resolved = (folder / path).parent.resolve()
    return folder / path if resolved == folder.resolve() or folder.resolve() in resolved.parents else None


def _remove_empty(folder: Path, root: Path) -> None:
    with suppress(OSError):  # not empty
        while folder != root:
            folder.rmdir()
            folder = folder.parent


def shorten(name: str, num_bytes: int) -> str:
    """The beginning of a name that file systems can hold in so many bytes.

    >>> shorten("photo", 9), shorten("写真写真", 9)
    ('photo', '写真写')
    """
    while len(os.fsencode(name)) > num_bytes:
        name = name[:-1]
    return name


def _longest_name(folder: Path) -> int:
    """Bytes that a name in a folder may have."""
    try:
        return min(_LONGEST_NAME, os.pathconf(folder, "PC_NAME_MAX"))
    except (AttributeError, OSError, ValueError):  # not on Windows, not of all file systems
        return _LONGEST_NAME


def _name(stem: str, image_id: int, number: int, room: int) -> str:
    ending = ("", f"-{image_id}")[number] if number < 2 else f"-{image_id}-{number}"
    return shorten(stem, room - len(ending)) + ending
