"""Frames of videos, decoded one after the other by PyAV; a frame has a name such as ``clip.mp4#000123``."""

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_convnext_det.data.annotations import UnreadableError
from lightning_convnext_det.data.io.decode import MAX_PIXELS
from lightning_convnext_det.data.io.pixels import Channels
from lightning_convnext_det.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor  # imported where pixels become tensors

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"))
_FORMATS: dict[Channels, str] = {1: "gray", 3: "rgb24", 4: "rgba"}
_FRAME = re.compile(r"(.+)#(\d{6,})")


def is_video_name(name: str) -> bool:
    """Tell whether a file name ends like a video's; hidden files do not count."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not os.path.basename(name).startswith(".")


def frame_name(video: str | Path, index: int) -> str:
    """Name a frame, counted from 0.

    >>> frame_name("clip.mp4", 123)
    'clip.mp4#000123'
    """
    return f"{video}#{index:06d}"


def parse_frame_name(name: str | Path) -> tuple[str, int] | None:
    """Split the name of a frame into its video and its number; None for other names.

    >>> parse_frame_name("clip.mp4#000123"), parse_frame_name("photo.jpg")
    (('clip.mp4', 123), None)
    """
    found = _FRAME.fullmatch(str(name))
    if found is None or not is_video_name(found.group(1)):
        return None
    return found.group(1), int(found.group(2))


def count_frames(path: str | Path) -> int:
    """Count the frames of a video without decoding them.

    Raises:
        UnreadableError: a DataError, if the file is no video that can be read.
        DataError: if PyAV is not installed.
    """
    with _open(path) as container:
        try:
            return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
        except _av().error.FFmpegError as error:
            raise UnreadableError.of("LCD-I040", path, f"the video is damaged or cut short ({error})") from error


class FrameReader:
    """Reads frames of videos; those of one video in rising order are decoded once.

    A reader keeps the last video open: one frame at a time is in memory. It can be copied to a worker process, where
    it begins anew.
    """

    def __init__(self) -> None:
        self._path: str | None = None
        self._frames: Iterator[Any] | None = None  # PyAV's classes have no types
        self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": None, "_frames": None, "_next": 0}

    def read(self, path: str | Path, index: int, channels: Channels = 3, max_pixels: int = MAX_PIXELS) -> "Tensor":
        """Decode a frame, turned upright as players show it.

        Args:
            path: the video.
            index: of the frame, from 0.
            channels: 1 for grey, 3 for RGB, 4 for RGBA.
            max_pixels: larger frames are an error.

        Returns:
            uint8 [channels, H, W].

        Raises:
            UnreadableError: a DataError, if the video cannot be read or has no such frame.
            DataError: if PyAV is not installed.
        """
        if self._frames is None or self._path != str(path) or index < self._next:
            self._path, self._frames, self._next = str(path), _decode(path), 0
        for frame in self._frames:
            self._next += 1
            if self._next > index:
                return _to_tensor(frame, path, channels, max_pixels)
        self._frames = None
        raise UnreadableError.of("LCD-I041", path, f"has no frame {index}; it ends after {self._next}")


def _decode(path: str | Path) -> Iterator[Any]:
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            yield from container.decode(stream)
        except _av().error.FFmpegError as error:
            raise UnreadableError.of("LCD-I040", path, f"the video is damaged or cut short ({error})") from error


# one of PyAV's containers
def _open(path: str | Path) -> Any:
    av = _av()
    if not os.path.isfile(path):
        raise UnreadableError.of("LCD-I003", path, "no such file")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise UnreadableError.of("LCD-I040", path, f"not a video that can be read ({error})") from error
    if not container.streams.video:
        container.close()
        raise UnreadableError.of("LCD-I040", path, "has no video, only sound or text")
    return container


def _to_tensor(frame: Any, path: str | Path, channels: Channels, max_pixels: int) -> "Tensor":
    import torch

    if frame.width * frame.height > max_pixels:
        reason = f"{frame.width}x{frame.height} is more than max_pixels = {max_pixels:,}"
        raise UnreadableError.of("LCD-I023", path, reason)
    pixels = torch.from_numpy(frame.to_ndarray(format=_FORMATS[channels]))
    pixels = pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
    # of phones: degrees counter-clockwise by which players turn it
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return torch.rot90(pixels, turns, (1, 2)).contiguous()


def _av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError:
        raise DataError("[LCD-P004] reading videos needs PyAV: pip install 'lightning-convnext-det[video]'") from None
