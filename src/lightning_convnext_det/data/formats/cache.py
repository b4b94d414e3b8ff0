"""Cache of checked annotations: a second start on a large dataset maps the arrays of the first instead of reading JSON.

A file holds the annotations of a split as one JSON header and the arrays behind it, which are mapped into memory, so
that all processes of a machine share their pages. Its name is the hash of the annotation file's content, of the paths,
of the options and of the version of this package: what was read from other content is never found. It is written beside
its place and renamed when complete, so a process killed meanwhile leaves the cache as it was.
"""

import hashlib
import json
import mmap
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

import lightning_convnext_det
from lightning_convnext_det.data.annotations import DetectionAnnotations, FederatedLabels, LabelLists, Problem, Split
from lightning_convnext_det.data.formats.discovery import read_split

_MAGIC = b"lightning-convnext-det annotations 2\n"
_ALIGNMENT = 64  # bytes: numpy's vector loops take aligned arrays only
_SINGLE = ("image_root", "class_names", "category_ids", "problems", "crowd_is_difficult")
_ARRAYS = tuple(field.name for field in fields(DetectionAnnotations) if field.name not in (*_SINGLE, "federated"))
LEAST_BYTES = 8 << 20  # of annotations: a smaller file is read in less than half a second
_UNUSED_DAYS = 60  # after which a cached file is removed


def cache_folder(choice: str) -> Path | None:
    """The folder of cached annotations that a user chooses; None for none.

    >>> cache_folder("none") is None, cache_folder("/data/cache").name
    (True, 'cache')

    Args:
        choice: a folder; ``auto`` for ``lightning-convnext-det`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``;
            ``none`` for none.
    """
    if choice == "none":
        return None
    if choice != "auto":
        return Path(choice)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-convnext-det"
    except RuntimeError:  # a user without a home, as in containers
        return None


def read_cached_split(split: Split, folder: Path | None, **options: Any) -> DetectionAnnotations:
    """Read a split from the cache, or else from its files, and then cache it.

    Splits of one annotation file (COCO, CVAT) of at least 8 MB are cached. Cached annotations are used as long as the
    content of that file is the same and no image was added to or removed from the folder of the images; image headers
    are not opened again.

    >>> from tempfile import mkdtemp
    >>> from lightning_convnext_det.data.formats.discovery import find_splits
    >>> from lightning_convnext_det.data.synthetic import write_synthetic_coco
    >>> split = find_splits(write_synthetic_coco(mkdtemp() + "/shapes", num_train=2, num_val=1))["train"]
    >>> len(read_cached_split(split, None))
    2

    Args:
        split: what ``find_splits`` or ``make_split`` gives.
        folder: of the cache; None reads the files.
        options: of `read_split`.

    Raises:
        DataError: as `read_split` does; what is refused is not cached.
    """
    if folder is None or not _is_large(split):
        return read_split(split, **options)
    path = folder / f"{_key(split, options)}.annotations"
    cached = load_annotations(path)
    if cached is not None:
        rank_zero_info(f"split '{split.name}': annotations from {path}; data.cache=none reads and checks them anew")
        return cached
    changed = {images: _changed(images) for images in split.images}  # before they are looked at
    annotations = read_split(split, **options)
    with suppress(OSError):  # a full or read-only disk: the next start reads anew, too
        save_annotations(annotations, path, changed.get(annotations.image_root, 0))
        _remove_unused(folder)
    return annotations


def save_annotations(annotations: DetectionAnnotations, path: Path, folder_changed: int) -> None:
    """Write annotations to a file that `load_annotations` maps; it is complete or absent.

    Args:
        annotations: as `read_split` gives them.
        path: of the file.
        folder_changed: when the folder of the images was last changed, before it was read, in nanoseconds.

    Raises:
        OSError: if it cannot be written.
    """
    arrays = {name: np.ascontiguousarray(getattr(annotations, name)) for name in _ARRAYS}
    if (federated := annotations.federated) is not None:
        arrays |= {f"negative.{name}": array for name, array in federated.negative._asdict().items()}
        arrays |= {f"not_exhaustive.{name}": array for name, array in federated.not_exhaustive._asdict().items()}
    places: dict[str, dict[str, Any]] = {}
    position = 0
    for name, array in arrays.items():
        places[name] = {"dtype": array.dtype.str, "shape": array.shape, "offset": position}
        position += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    single = {name: getattr(annotations, name) for name in _SINGLE} | {"image_root": str(annotations.image_root)}
    single["frequencies"] = None if federated is None else federated.frequencies
    header = {"arrays": places, "bytes": position, "folder_changed": folder_changed, **single}
    text = json.dumps(header).encode()
    start = _start(len(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f"{path.stem}.", suffix=".part", delete=False) as file:
        try:
            file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
            for name, array in arrays.items():
                file.seek(start + places[name]["offset"])
                file.write(array.data)
            file.truncate(start + position)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the content
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def load_annotations(path: Path) -> DetectionAnnotations | None:
    """Map cached annotations; None if there are none, or if they are incomplete or older than the images' folder."""
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None
    prefix = len(_MAGIC) + 8
    if content[: len(_MAGIC)] != _MAGIC:
        return None
    length = int.from_bytes(content[len(_MAGIC) : prefix], "little")
    try:
        header = json.loads(content[prefix : prefix + length])
    except ValueError:
        return None
    start = _start(length)
    if len(content) != start + header["bytes"] or _changed(Path(header["image_root"])) != header["folder_changed"]:
        return None
    with suppress(OSError):  # another user's
        os.utime(path)  # used today
    return _restored(header, {name: _view(content, start, place) for name, place in header["arrays"].items()})


def _restored(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> DetectionAnnotations:
    federated = None
    if header["frequencies"] is not None:
        negative, not_exhaustive = (
            LabelLists(*(arrays[f"{kind}.{name}"] for name in LabelLists._fields))
            for kind in ("negative", "not_exhaustive")
        )
        federated = FederatedLabels(negative, not_exhaustive, tuple(header["frequencies"]))
    return DetectionAnnotations(
        **{name: arrays[name] for name in _ARRAYS},
        federated=federated,
        image_root=Path(header["image_root"]),
        class_names=tuple(header["class_names"]),
        category_ids=tuple(header["category_ids"]),
        problems=tuple(Problem(*one) for one in header["problems"]),
        crowd_is_difficult=header["crowd_is_difficult"],
    )


def _view(content: mmap.mmap, start: int, place: Mapping[str, Any]) -> NDArray[Any]:
    count = int(np.prod(place["shape"]))
    array = np.frombuffer(content, place["dtype"], count, start + place["offset"]) if count else np.empty(0)
    return array.astype(place["dtype"], copy=False).reshape(place["shape"])


def _start(length: int) -> int:
    """Where the arrays begin behind a header of this length."""
    return -(-(len(_MAGIC) + 8 + length) // _ALIGNMENT) * _ALIGNMENT


def _is_large(split: Split) -> bool:
    return split.format in ("coco", "cvat") and split.annotations[0].stat().st_size >= LEAST_BYTES


def _key(split: Split, options: Mapping[str, object]) -> str:
    """Hash of all that the annotations depend on, but for the images."""
    digest = hashlib.sha256(repr((lightning_convnext_det.__version__, split, sorted(options.items()))).encode())
    for path in (*split.annotations, *split.members, *split.classes):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _changed(folder: Path) -> int:
    """When a file was last added to a folder or removed from it; 0 if it does not exist."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _remove_unused(folder: Path) -> None:
    """Remove what was not used for two months, and parts of files whose writers were killed a day ago."""
    now = time.time()
    for path in folder.iterdir():
        days = {".annotations": _UNUSED_DAYS, ".part": 1}.get(path.suffix)
        if days is not None and now - path.stat().st_mtime > days * 86400:
            path.unlink(missing_ok=True)
