"""YOLO's ``data.yaml`` and lists of class names.

Paths in ``data.yaml`` are tried from its ``path``, from its own folder and from the root, also without a leading
``../``, as Ultralytics does for Roboflow's files; the first that exists inside the root is taken.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from lightning_convnext_det.data.annotations import Split, UnreadableError
from lightning_convnext_det.data.io.files import read_text
from lightning_convnext_det.data.io.listing import list_names

MAX_BYTES = 1 << 20  # of a file of class names
_KEYS = ("train", "val", "test")
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
    """A value for a message; of lists and objects the kind alone, as a short file can state one of any length."""
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


def class_file(folders: Sequence[Path]) -> tuple[Path, ...]:
    """The text file of class names in the first folder that has one."""
    for folder in folders:
        names = list_names(folder)
        for name in _CLASS_FILES:
            if name in names:
                return (folder / name,)
    return ()


def yaml_splits(root: Path, file: Path | None = None) -> dict[str, Split]:
    """The splits that ``data.yaml`` names; none if there is no such file.

    Args:
        root: folder that the images lie in.
        file: the YAML file; ``data.yaml`` in the root, or the only other one with ``names`` and splits, if not given.

    Raises:
        UnreadableError: a DataError, if the file cannot be read, or if several could be meant.
    """
    if file is not None:
        return _splits(_load_yaml(file), file, root)
    names = [name for name in list_names(root) if name.lower().endswith((".yaml", ".yml"))]
    known = [name for name in names if name.lower() in ("data.yaml", "data.yml", "dataset.yaml")]
    found: dict[str, dict[str, Split]] = {}
    for name in known or names:
        try:
            splits = _splits(_load_yaml(root / name), root / name, root)
        except UnreadableError:
            if known:
                raise
            continue
        if splits:
            found[name] = splits
    if len(found) > 1:
        raise UnreadableError.of(
            "LCD-L003", root, f"several files state splits: {', '.join(found)}; give one as the root"
        )
    return next(iter(found.values()), {})


def _splits(content: dict[str, object], file: Path, root: Path) -> dict[str, Split]:
    if "names" not in content:
        return {}
    start = content.get("path")
    bases = ([file.parent / start] if isinstance(start, str) else []) + [file.parent, root]
    splits = {}
    for key in _KEYS:
        stated = content.get(key)
        entries = stated if isinstance(stated, list) else [stated] if stated else []
        paths = [_resolve(entry, bases, root) for entry in entries if isinstance(entry, str) and entry]
        if len(paths) < len(entries):
            raise UnreadableError.of("LCD-D122", file, f"{key}: expected a folder, a text file, or a list of these")
        images = tuple(path for path in paths if path.suffix != ".txt")
        if paths:
            members = tuple(path for path in paths if path.suffix == ".txt")
            splits[key] = Split(key, "yolo", root, (file,), images, members, (file,))
    return splits


def _resolve(entry: str, bases: Sequence[Path], root: Path) -> Path:
    """The place that an entry means; where nothing is found, the first that was tried."""
    bare = entry
    while bare.startswith("../"):
        bare = bare.removeprefix("../")
    for base in bases:
        for variant in (entry, bare):
            path = Path(os.path.normpath(base / variant))
            if path.is_relative_to(root) and path.exists():
                return path
    return Path(os.path.normpath(bases[0] / entry))
