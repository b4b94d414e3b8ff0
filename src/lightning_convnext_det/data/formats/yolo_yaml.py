"""YOLO's ``data.yaml``, darknet's ``obj.data``, and lists of class names.

Paths in ``data.yaml`` are tried from its ``path``, from its own folder and from the root, also without their first
folders, as Roboflow's ``../train/images`` and the paths of another machine need; the first that exists inside the root
is taken.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lightning_convnext_det.data.annotations import Split, UnreadableError, canonical_split
from lightning_convnext_det.data.io.files import read_text
from lightning_convnext_det.data.io.listing import folder_names, list_names, walk_images

MAX_BYTES = 1 << 20  # of a file of class names
_CLASS_FILES = ("classes.txt", "obj.names", "classes.names", "_darknet.labels")


def read_class_names(files: Sequence[Path]) -> tuple[str, ...] | None:
    """The class names in order of label, from ``data.yaml`` or a text file with one per line; None without a file.

    Raises:
        UnreadableError: a DataError, if there is a file but no list of unique names in it.
    """
    if not files:
        return None
    path = files[0]
    if path.suffix.lower() in (".yaml", ".yml"):
        content = _load_yaml(path)
        names = _names_in_order(content.get("names"), path)
        if content.get("nc", len(names)) != len(names):
            raise UnreadableError.of(
                "LCD-D008", path, f"nc is {_shown(content['nc'])}, but there are {len(names)} names"
            )
    else:
        names = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise UnreadableError.of("LCD-D008", path, f"expected unique class names, found {names}")
    return tuple(names)


def _names_in_order(names: object, path: Path) -> list[str]:
    """The names of a list, or of an object that gives each label its name."""
    if isinstance(names, dict):
        names = {int(key) if isinstance(key, str) and key.isdecimal() else key: name for key, name in names.items()}
        if set(names) != set(range(len(names))):
            reason = f"names: expected labels 0 to {len(names) - 1}, found {', '.join(map(_shown, names))}"
            raise UnreadableError.of("LCD-D008", path, reason)
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list):
        raise UnreadableError.of("LCD-D008", path, "names: expected a list of class names, or label: name pairs")
    for label, name in enumerate(names):
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            reason = f"the name of class {label} is {_shown(name)}, not text; quote it (YAML reads no as false)"
            raise UnreadableError.of("LCD-D008", path, reason)
    return [str(name).strip() for name in names]


def _shown(value: object) -> str:
    """A value for a message; of lists and objects the kind alone, as a short file can hold one of any length."""
    return repr(value) if value is None or isinstance(value, (str, int, float)) else type(value).__name__


def _load_yaml(path: Path) -> dict[str, object]:
    try:
        content = yaml.safe_load(_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split()) or "nested too deep"
        raise UnreadableError.of("LCD-D008", path, f"no YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UnreadableError.of("LCD-D008", path, "expected keys such as names, train, val")
    return content


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UnreadableError.of("LCD-D008", path, f"larger than {MAX_BYTES >> 20} MiB")
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError.of("LCD-D008", path, f"cannot be read as UTF-8 text ({error})") from error


def read_key_points(files: Sequence[Path]) -> tuple[int, int] | None:
    """``kpt_shape`` of ``data.yaml``: the number of key points, and 2 or 3 numbers for each; None if it is not there.

    Raises:
        UnreadableError: a DataError, if it is something else; [0, 0] means outlines.
    """
    if not files or files[0].suffix.lower() not in (".yaml", ".yml"):
        return None
    shape = _load_yaml(files[0]).get("kpt_shape")
    if shape is None:
        return None
    if isinstance(shape, list) and shape == [0, 0]:
        return 0, 0
    if not isinstance(shape, list) or len(shape) != 2 or shape[1] not in (2, 3) or type(shape[0]) is not int:
        reason = f"kpt_shape is {shape!r:.60}; expected [number of key points, 2 or 3]"
        raise UnreadableError.of("LCD-D008", files[0], reason)
    return shape[0], shape[1]


def class_file(folders: Sequence[Path]) -> tuple[Path, ...]:
    """The text file of class names in the first folder that has one: a usual name, or the only ``*.names``."""
    for folder in folders:
        names = list_names(folder)
        for name in _CLASS_FILES:
            if name in names:
                return (folder / name,)
        others = [name for name in names if name.endswith(".names")]
        if len(others) == 1:
            return (folder / others[0],)
    return ()


def yaml_splits(root: Path, file: Path | None = None) -> dict[str, Split]:
    """The splits that ``data.yaml`` names; none if there is no such file.

    Args:
        root: folder that the images lie in.
        file: the YAML file (default: ``data.yaml`` in the root, or the only other one with ``names`` and splits, there
            or in a folder of the root).

    Raises:
        UnreadableError: a DataError, if the file cannot be read, or if several could be meant.
    """
    if file is not None:
        return _splits(_load_yaml(file), file, root)
    ends = (".yaml", ".yml")
    names = list_names(root, ends)
    known = [name for name in names if name.lower() in ("data.yaml", "data.yml", "dataset.yaml")]
    inner = [] if names else [os.path.join(f, n) for f in folder_names(root) for n in list_names(root / f, ends)]
    found: dict[str, dict[str, Split]] = {}
    for name in known or names or inner:
        try:
            splits = _splits(_load_yaml(root / name), root / name, root)
        except UnreadableError:
            if known:
                raise
            continue
        if splits and (name not in inner or all(path.exists() for split in splits.values() for path in split.images)):
            found[name] = splits
    if len(found) > 1:
        raise UnreadableError.of(
            "LCD-L003", root, f"several files name splits: {', '.join(found)}; give one as the root"
        )
    return next(iter(found.values()), {})


def root_of_yaml(file: Path) -> Path:
    """The folder that a YAML file describes: its ``path``, if that is here, else its own folder."""
    start = _load_yaml(file).get("path")
    if not isinstance(start, str):
        return file.parent
    folder = Path(os.path.normpath(file.parent / _slashes(start)))
    return folder if folder.is_dir() and not folder.is_relative_to(file.parent) else file.parent


def _splits(content: dict[str, object], file: Path, root: Path) -> dict[str, Split]:
    if "names" not in content:
        return {}
    start = content.get("path")
    bases = ([file.parent / _slashes(start)] if isinstance(start, str) else []) + [file.parent, root]
    splits = {}
    missing = {}
    for key, keys in (("train", ("train",)), ("val", ("val", "valid")), ("test", ("test",))):
        given = next((content[name] for name in keys if content.get(name)), None)
        entries = given if isinstance(given, list) else [given] if given else []
        paths = [_resolve(_slashes(entry), bases, root, key) for entry in entries if isinstance(entry, str) and entry]
        if len(paths) < len(entries):
            raise UnreadableError.of("LCD-D122", file, f"{key}: expected a folder, a text file, or a list of these")
        if paths and key != "train" and not any(path.exists() for path in paths):
            missing[key] = str(entries[0])
        elif paths:
            images = tuple(path for path in paths if path.suffix != ".txt")
            members = tuple(path for path in paths if path.suffix == ".txt")
            splits[key] = Split(key, "yolo", root, (file,), images, members, (file,))
    notes = tuple(f"{key}: {entry} does not exist; there is no split {key!r}" for key, entry in missing.items())
    if notes and "train" in splits:
        splits["train"] = splits["train"]._replace(notes=notes)
    return splits


def _slashes(entry: str) -> str:
    """A path with folders separated by /, as on Windows they may not be."""
    return entry.replace("\\", "/")


def _resolve(entry: str, bases: Sequence[Path], root: Path, split: str = "") -> Path:
    """The place that an entry means; where nothing is found, the first that was tried."""
    for variant in _path_variants(entry, split):
        for base in bases:
            path = Path(os.path.normpath(base / variant))
            if not path.is_relative_to(root) or not path.exists():
                continue
            if variant == entry or path.is_file() or walk_images([path]):  # a shorter path may lead to the labels
                return path
    return Path(os.path.normpath(bases[0] / entry))


def _path_variants(entry: str, split: str) -> Iterator[str]:
    """An entry, and without its first folders: those of another machine, or steps up; the split's own name stays."""
    yield entry
    parts = [part for part in entry.split("/") if part not in ("", ".", "..") and not re.fullmatch("[A-Za-z]:", part)]
    last = max((at for at, part in enumerate(parts) if canonical_split(part) == split), default=len(parts) - 1)
    for start in range(last + 1):
        yield "/".join(parts[start:])


def darknet_splits(root: Path) -> dict[str, Split]:
    """The splits that darknet's ``*.data`` names (CVAT's YOLO 1.1); none if there is no such file."""
    files = [name for name in list_names(root) if name.endswith(".data")]
    if len(files) != 1:
        return {}
    try:
        pairs = [line.partition("=") for line in _text(root / files[0]).splitlines()]
    except UnreadableError:
        return {}
    content = {key.strip(): _slashes(value.strip()) for key, equals, value in pairs if equals}
    names = _resolve(content.get("names", ""), [root], root)
    classes = (names,) if names.is_file() else class_file([root])
    splits = {}
    for key, keys in (("train", ("train",)), ("val", ("valid", "val", "validation")), ("test", ("test",))):
        path = next((_resolve(content[name], [root], root) for name in keys if content.get(name)), None)
        if path is not None and path.is_file():
            splits[key] = Split(key, "yolo", root, (root / files[0],), (), (path,), classes)
    return splits
