"""File names in annotation files: which file is meant, and none outside of the dataset.

Exporters write Windows' separators, addresses, percent signs, folders of other machines, and other Unicode forms of
accents. A name that leads to no file is tried in the forms that it may stand for; the first that exists is taken.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from lightning_convnext_det.data.io.listing import is_utf8, list_names

_SAMPLE = 50  # names that decide between folders


def name_variants(name: str) -> Iterator[str]:
    """Relative paths that a name may stand for, the likeliest first; the name itself is not among them."""
    if "\0" in name or not is_utf8(name):
        return
    plain = name.replace("\\", "/")
    plain = plain.partition("?d=")[2] or plain  # Label Studio: /data/local-files/?d=images/a.jpg
    plain = re.sub(r"^[a-zA-Z][\w+.-]*://[^/]*/?|^[a-zA-Z]:/", "", plain)
    seen = {name}
    for form in (plain, unquote(plain), unquote(plain).partition("?")[0]):
        for accents in (form, unicodedata.normalize("NFC", form), unicodedata.normalize("NFD", form)):
            parts = [part for part in accents.split("/") if part not in ("", ".", "..")]
            for start in range(len(parts)):
                variant = "/".join(parts[start:])
                if variant not in seen:
                    seen.add(variant)
                    yield variant


def find_variant(folder: str | Path, name: str) -> str | None:
    """The first form of a name that is a file below a folder."""
    return next((variant for variant in name_variants(name) if os.path.isfile(os.path.join(folder, variant))), None)


def choose_folder(folders: Sequence[Path], file_names: Sequence[str]) -> Path:
    """The folder that holds the most of a sample of files, the first of those that hold equally many."""
    step = max(1, len(file_names) // _SAMPLE)
    sample = [name for name in file_names[::step] if name and "\0" not in name and is_utf8(name)]

    def rank(folder: Path) -> tuple[int, int]:
        exact = [name for name in sample if _leaves(name, 0) == "" and os.path.isfile(folder / name)]
        return sum(name in exact or find_variant(folder, name) is not None for name in sample), len(exact)

    return max(folders, key=rank)


def resolve_names(
    names: Sequence[str], root: Path, image_root: Path, follow_symlinks: bool
) -> tuple[list[str], dict[int, str]]:
    """The file that each name means, relative to ``image_root``, and the reason why a name leaves the root.

    A form is taken only if no other name leads to the same file.
    """
    outside = _outside_check(root, image_root, follow_symlinks)
    reasons = {index: reason for index, name in enumerate(names) if (reason := outside(name))}
    resolved = list(names)
    found: dict[int, str] = {}
    for index, name in enumerate(names):
        if index in reasons or not os.path.exists(os.path.join(image_root, name)):
            variant = find_variant(image_root, name)
            if variant is not None and not outside(variant):
                found[index] = variant
    for index, variant in found.items():
        resolved[index] = variant
    # two names for one file may be two files of which one is not here; the same name twice is reported by another check
    takers = Counter(dict.fromkeys(zip(resolved, names, strict=True)).keys())
    files = Counter(file for file, _ in takers)
    for index, variant in found.items():
        if files[variant] > 1:
            resolved[index] = names[index]
        else:
            reasons.pop(index, None)
    return resolved, reasons


def suggest_name(path: Path, folders: dict[Path, dict[str, str]]) -> str:
    """The file that may be meant: the same name in another case or with another ending."""
    if "\\" in path.name:
        return "; the name holds backslashes, folders are separated by /"
    if path.parent not in folders:
        names = list_names(path.parent)
        folders[path.parent] = {Path(name).stem.lower(): name for name in names} | {n.lower(): n for n in names}
    names_by_key = folders[path.parent]
    close = names_by_key.get(path.name.lower()) or names_by_key.get(path.stem.lower())
    return f"; is {close!r} meant?" if close else ""


def encode_names(names: Sequence[str]) -> "np.ndarray":
    """File names as UTF-8 bytes [N]."""
    return np.array([name.encode(errors="surrogatepass") for name in names], np.bytes_)


def _outside_check(root: Path, image_root: Path, follow_symlinks: bool) -> Callable[[str], str]:
    """A function that says in what way a file name leaves ``root``; empty if it does not."""
    depth = len(image_root.relative_to(root).parts)
    real_root = os.path.realpath(root)

    def outside(name: str) -> str:
        if reason := _leaves(name, depth):
            return reason
        if not follow_symlinks and not _within(os.path.realpath(os.path.join(image_root, name)), real_root):
            return f"is a link out of {root}, and follow_symlinks is off"
        return ""

    return outside


def _leaves(name: str, depth: int) -> str:
    """Why a name, taken from a folder ``depth`` levels below the root, is not a path inside the root."""
    if not name or name == ".":
        return "names no file"
    if "\0" in name or not is_utf8(name):
        return "holds bytes that no UTF-8 file name has"
    if "://" in name:
        return "is an address; images are read from disk only"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name):
        return "is absolute; it must be relative to the folder of the images"
    if ".." in name:
        for part in re.split(r"[/\\]", name):
            depth += -1 if part == ".." else part not in ("", ".")
            if depth < 0:
                return "leads out of the root"
    return ""


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))
