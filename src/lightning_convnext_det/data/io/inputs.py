"""Images to predict on, from what a user names: files, folders, patterns, lists in text files, and videos."""

import itertools
import logging
import os
from collections.abc import Sequence
from glob import escape, glob
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from lightning_convnext_det.data.annotations import UnreadableError
from lightning_convnext_det.data.io.listing import is_image_name, list_names, walk_images
from lightning_convnext_det.data.io.video import count_frames, frame_name, is_video_name, parse_frame_name
from lightning_convnext_det.data.writers.files import written_files
from lightning_convnext_det.errors import DataError

_warn = rank_zero_only(logging.getLogger(__name__).warning)
_NO_IMAGES = ("", ".json", ".xml", ".txt", ".yaml", ".yml", ".csv", ".tsv", ".md", ".names", ".cache", ".zip", ".html")
_SHOWN = 10
_SIGNS = "*?["  # of patterns


def find_images(sources: Sequence[str | Path], recursive: bool = False, videos: bool = False) -> list[Path]:
    """List the images that folders, patterns, lists, videos and single paths name, each once.

    Args:
        sources: files of any name; folders, whose images and videos are taken in sorted order; patterns such as
            ``photos/**/*.jpg``, of which only images and videos are taken; ``.txt`` files with one of these in each
            line, relative to the list's folder, where ``#`` begins a comment; frames of videos, ``clip.mp4#000123``.
        recursive: also take what is below the folders.
        videos: replace each video by its frames, ``clip.mp4#000000`` ...; otherwise videos are passed over.

    Drawings and crops that a prediction has written into a folder are left out, with a warning, unless they are given
    themselves. Other files that may be images, such as HEIC without pillow-heif, are counted and named in a warning;
    videos that cannot be read are named in one each.

    Raises:
        DataError: if a source yields none.
    """
    found: dict[Path, None] = {}
    skipped: list[str] = []
    unread: list[DataError] = []
    for source in _expand_lists(map(Path, sources)):
        files, others = _candidates(source, recursive, videos)
        if files and not (files := _without_results(source, files)):
            raise DataError(f"[LCD-P001] {source} holds nothing but drawings and crops of earlier predictions")
        if not files:
            below = "give recursive, or end it in /**/*, for those below it"
            what = f"holds no images itself; {below}" if source.is_dir() and not recursive else "holds no images"
            what = what if source.is_dir() else "is not there"
            what = f"holds no image that can be read, only {_listed(others)}" if others else what
            raise DataError(f"[LCD-P001] {source} {what}")
        for file in files:
            try:
                found.update(dict.fromkeys(_frames(file) if videos and is_video_name(file.name) else [file]))
            except DataError as error:
                unread.append(error)
        skipped += others
    if unread and not found:
        raise unread[0]
    for message in dict.fromkeys(map(str, unread)):
        _warn("skipped: %s", message)
    if skipped:
        _warn(
            "[LCD-P003] %d files are skipped, as their names are not those of images: %s",
            len(skipped),
            _listed(skipped),
        )
    return list(found)


def names_one_image(source: str | Path) -> bool:
    """Tell whether a path names one image, not a folder, a pattern, a list or a video."""
    path = Path(source)
    if path.is_dir() or is_video_name(path.name) or path.suffix.lower() == ".txt":
        return False
    return path.is_file() or not any(sign in str(source) for sign in _SIGNS)


def _candidates(source: Path, recursive: bool, videos: bool) -> tuple[list[Path], list[str]]:
    """The files that a source names, and other files that may be images."""
    frame = parse_frame_name(source) if videos else None
    if frame is not None and not source.is_file():
        return ([source] if os.path.isfile(frame[0]) else []), []
    if source.is_file():
        return [source], []
    if source.is_dir() and recursive:
        return walk_images([source], is_video_name if videos else None), []
    if source.is_dir():
        every = [source / name for name in list_names(source)]
    else:
        every = [Path(name) for name in sorted(glob(str(source), recursive=True))]
    taken = [file for file in every if is_image_name(file.name) or (videos and is_video_name(file.name))]
    rest = set(every) - set(taken)
    return taken, [str(file) for file in every if file in rest and _may_be_an_image(file)]


def _without_results(source: Path, files: list[Path]) -> list[Path]:
    """The files without those that predictions have written into the folders of a folder or pattern."""
    if files == [source]:
        return files
    plain = list(itertools.takewhile(lambda part: not any(sign in part for sign in _SIGNS), source.parts))
    depth = len(source.parts if source.is_dir() else plain)
    folders = {folder for parent in {file.parent for file in files} for folder in (parent, *parent.parents)}
    results = {path for folder in folders if len(folder.parts) >= depth for path in written_files(folder)}
    kept = [file for file in files if file not in results] if results else files
    if len(kept) < len(files):
        _warn("[LCD-P003] %d drawings and crops of earlier predictions are skipped", len(files) - len(kept))
    return kept


def _expand_lists(sources: Sequence[Path] | map) -> list[Path]:  # type: ignore[type-arg]  # of paths
    """Replace ``.txt`` files by the paths in their lines."""
    expanded: list[Path] = []
    for source in sources:
        if source.suffix.lower() != ".txt" or not source.is_file():
            expanded.append(source)
            continue
        try:
            lines = source.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"[LCD-P001] {source} cannot be read as a list of images ({error})") from error
        paths = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not paths:
            raise DataError(f"[LCD-P001] {source} lists no images; write one path in each line")
        expanded += [_in_folder(source.parent, path) for path in paths]
    return expanded


def _in_folder(folder: Path, name: str) -> Path:
    """A path or pattern in a folder; signs of patterns in the name of the folder stand for themselves."""
    path = folder / name
    is_pattern = any(sign in name for sign in _SIGNS) and not path.exists()
    return path if Path(name).is_absolute() or not is_pattern else Path(escape(str(folder))) / name


def _frames(video: Path) -> list[Path]:
    count = count_frames(video)
    if count == 0:
        raise UnreadableError.of("LCD-I040", video, "holds no frames")
    return [Path(frame_name(video, index)) for index in range(count)]


def _may_be_an_image(file: Path) -> bool:
    """Whether a file that is not read is worth a word: neither hidden nor of a format that annotations have."""
    return file.suffix.lower() not in _NO_IMAGES and not file.name.startswith(".") and file.is_file()


def _listed(files: Sequence[str]) -> str:
    shown = ", ".join(files[:_SHOWN]) + (f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else "")
    heif = any(file.lower().endswith((".heic", ".heif")) for file in files)
    return shown + (" (for HEIC and HEIF: pip install pillow-heif)" if heif else "")
