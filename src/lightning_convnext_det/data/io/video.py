"""Frames of videos, decoded one after the other by PyAV; a frame has a name such as ``clip.mp4#000123``."""

import importlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_only

from lightning_convnext_det.data.annotations import UnreadableError
from lightning_convnext_det.data.io.decode import MAX_PIXELS
from lightning_convnext_det.data.io.pixels import Channels
from lightning_convnext_det.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor  # imported where pixels become tensors

_warn = rank_zero_only(logging.getLogger(__name__).warning)
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
    """Count the frames of a video without decoding them; a warning says so if it is cut short.

    Raises:
        UnreadableError: a DataError, if the file is no video that can be read.
        DataError: if PyAV is not installed.
    """
    times, is_cut = _scan(path)
    if is_cut:
        _warn("[LCD-I040] %s: cut short, it ends in frame %d", path, len(times) - 1)
    return len(times)


class FrameReader:
    """Reads frames of videos; those of one video in rising order are decoded once.

    A reader keeps the last video open: one frame at a time is in memory. It can be copied to a worker process, where
    it begins anew. Damaged frames are missing, and those after them keep their numbers.
    """

    def __init__(self) -> None:
        self._path: str | None = None
        self._frames: Iterator[tuple[int, Any]] = iter(())  # PyAV's classes have no types
        self._last: tuple[int, Any] = -1, None  # the frame that was decoded last, and its number
        self._gap = 0  # the first frame after the one before it

    def __getstate__(self) -> dict[str, Any]:
        return vars(FrameReader())

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
            UnreadableError: a DataError, if the video cannot be read, has no such frame, or the frame is damaged; the
                message is the same for all frames of a damaged part.
            DataError: if PyAV is not installed.
        """
        if self._path != str(path) or index < self._gap:
            self._path, self._frames = str(path), _decode(path)
            self._last, self._gap = (-1, None), 0
        while self._last[0] < index:
            try:
                following = next(self._frames, None)
            except DataError:
                self._path = None  # the next call tries again
                raise
            if following is None:
                raise UnreadableError.of("LCD-I041", path, f"has no frame {index}; it ends after {self._last[0]}")
            self._last, self._gap = following, self._last[0] + 1
        number, frame = self._last
        if number == index and frame is None:
            raise UnreadableError.of("LCD-I041", path, f"has no frame {index}; it ends after {number}")
        if number == index:
            return _to_tensor(frame, path, channels, max_pixels)
        part = f"frame {index} is" if self._gap == number - 1 else f"frames {self._gap} to {number - 1} are"
        raise UnreadableError.of("LCD-I040", path, f"{part} damaged and cannot be decoded")


def _scan(path: str | Path) -> tuple[list[int | None], bool]:
    """The times of a video's frames in the order of the file, and whether it ends in the middle of one.

    Damage ends the list. Frames before the cut of an edit are not in it.
    """
    times: list[int | None] = []
    is_cut = False
    with _open(path) as container, suppress(_av().error.FFmpegError):
        for packet in container.demux(container.streams.video[0]):
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
                is_cut = packet.is_corrupt
    return times, is_cut


def _decode(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield the frames of a video that can be decoded, each with its number; then the number of all, and None."""
    done = -1
    time: Any = None
    for frame in _decode_with(path, "AUTO"):
        if frame is None:
            break
        done, time = done + 1, frame.pts
        yield done, frame
    # Threads that decode several frames at once lose those beside a damaged one, and at the end say nothing of it: so
    # the rest is decoded one by one, and numbered by the times of the packets, as frames are missing.
    times, _ = _scan(path)
    numbers = {time: number for number, time in enumerate(sorted(x for x in times if x is not None))}
    numbers = numbers if len(numbers) == len(times) else {}  # some formats have no times
    shift = done - numbers.get(time, done)  # of frames at the beginning that have never been decoded
    number, end = -1, len(times) + shift
    for frame in _decode_with(path, "SLICE") if done + 1 < end else ():
        place = None if frame is None else numbers.get(frame.pts)
        number = number + 1 if place is None else place + shift
        if frame is not None and number > done:
            yield number, frame
            done = number
    yield max(done + 1, end), None


def _decode_with(path: str | Path, threads: str) -> Iterator[Any]:
    """Yield the frames of a video, and None where a part cannot be decoded."""
    errors = _av().error  # now: a generator that is left may be closed when nothing can be imported any more
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = threads
        try:
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except errors.InvalidDataError:
                    frames = [None]
                yield from frames
        except errors.FFmpegError:
            yield None


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
