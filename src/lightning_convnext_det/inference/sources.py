"""What a `Predictor` is given, one image after the other: folders, patterns, lists and videos become their images."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lightning_convnext_det.data.io.inputs import find_images, names_one_image
from lightning_convnext_det.data.io.regions import RegionImage
from lightning_convnext_det.data.io.video import FrameReader
from lightning_convnext_det.data.loader import report_unreadable
from lightning_convnext_det.errors import ArgumentError, DataError
from lightning_convnext_det.inference.images import ImageSource, PixelFormat, read_source

_logger = logging.getLogger(__name__)
_ONE = (str, bytes, Path, Tensor, np.ndarray)  # they can be iterated over, too
LONG = 20  # images from which on a progress bar is shown


class Source(NamedTuple):
    """An image that is to be read."""

    image: ImageSource
    name: str
    """What messages call it."""
    is_given: bool
    """Whether the user named this image itself, so that it must be readable, or a folder or the like that holds it."""


class SourceImage(NamedTuple):
    """An image that has been read."""

    source: ImageSource
    pixels: Tensor | RegionImage
    """uint8 or float32 in 0..1, [3, H, W]."""


def list_sources(images: object, recursive: bool = False) -> Iterable[Source]:
    """Name the images of what a user gives; a list with a length, if that has one.

    Args:
        images: an `ImageSource`, a list of them, or an iterable; paths may name folders, patterns, ``.txt`` lists and
            videos.
        recursive: also take what is below the folders.

    Raises:
        DataError: if a path names nothing.
    """
    if isinstance(images, _ONE) or not isinstance(images, Iterable):
        return _expand(images, "the image", recursive)
    every = (source for i, image in enumerate(images) for source in _expand(image, f"images[{i}]", recursive))
    return list(every) if isinstance(images, Sequence) else every


def check_is_one(image: object) -> None:
    """Refuse a path that names several images where one is expected.

    Raises:
        ArgumentError: a ValueError that names the ways for many.
    """
    if isinstance(image, str | Path) and not names_one_image(image):
        raise ArgumentError(
            f"'{image}' is no single image; give a list, predictor(['{image}']), for all of its images, "
            "or use predictor.stream, which keeps none"
        )


def read_batches(sources: Iterable[Source], batch_size: int, pixel_format: PixelFormat) -> Iterator[list[SourceImage]]:
    """Read images in batches; those of folders, lists and videos that cannot be read are named and left out.

    Raises:
        DataError: if an image that was given itself cannot be read, or none of the others can.
    """
    frames, remaining = FrameReader(), iter(sources)
    num_read = num_failed = 0
    said = ""
    while wanted := list(islice(remaining, batch_size)):
        batch = []
        for source in wanted:
            try:
                pixels = read_source(source.image, source.name, frames, pixel_format)
                pixels = pixels.with_overview() if isinstance(pixels, RegionImage) else pixels  # finds damage now
                batch.append(SourceImage(source.image, pixels))
            except DataError as error:
                if source.is_given:
                    raise
                if str(error) != said:  # all frames of a damaged part of a video have one reason
                    _logger.warning("skipped: %s", error)
                said = str(error)
        num_read, num_failed = num_read + len(batch), num_failed + len(wanted) - len(batch)
        if batch:
            yield batch
    report_unreadable(num_read, num_failed)


@contextmanager
def progress_bar(sources: Iterable[Source], shown: bool) -> Iterator[Progress]:
    """A progress bar on standard error, where that is a terminal and there are many images.

    Its only task is 0; advance it by the images that are done.
    """
    total = len(sources) if isinstance(sources, Sequence) else None
    console = Console(stderr=True)
    is_long = total is None or total > LONG
    columns = TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not (shown and is_long and console.is_terminal)) as bar:
        bar.add_task("predicting", total=total)
        yield bar


def _expand(image: object, name: str, recursive: bool) -> list[Source]:
    if isinstance(image, str | Path) and not names_one_image(image):
        return [Source(path, str(path), False) for path in find_images([image], recursive, videos=True)]
    return [Source(cast(ImageSource, image), name, True)]  # other types are refused when they are read
