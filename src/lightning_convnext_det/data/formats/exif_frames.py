"""Whether boxes refer to the stored image or to the one turned upright by its EXIF orientation.

Annotation tools disagree: some store boxes of the image as a viewer turns it, others of the pixels as stored, and some
the stored size with boxes of the upright image. The annotated size decides, unless boxes fit the other frame only.
Where neither can tell (no size, a square, a half turn), the other images of the split do, else the user is asked.
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.data.annotations import DetectionAnnotations, UnreadableError
from lightning_convnext_det.data.formats.file_names import resolve_names, suggest_name
from lightning_convnext_det.data.formats.problems import AnnotationProblems, Place, Source
from lightning_convnext_det.data.io.decode import MAX_PIXELS, read_size

Exif = Literal["auto", "upright", "raw"]

TOLERANCE = 1.0  # pixels that a box may reach out of the frame that it fits
_REMEDY = "say which by exif: upright or exif: raw"


class ImageFrames(NamedTuple):
    """The frame that the boxes of each image refer to."""

    file_names: list[str]
    """Relative to ``image_root``."""
    sizes: NDArray[np.int32]
    """Height and width in pixels, int32 [N, 2]."""
    upright: NDArray[np.bool_]
    """Whether the EXIF orientation must be applied to get it, bool [N]."""
    usable: NDArray[np.bool_]
    """False where the image is left out or refused, bool [N]."""


def resolve_frames(
    annotations: DetectionAnnotations,
    source: Source,
    problems: AnnotationProblems,
    exif: Exif = "auto",
    check_images: bool = True,
    follow_symlinks: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> ImageFrames:
    """Read the header of every image, once, and find the frame of its boxes.

    Args:
        annotations: as read, with annotated sizes or 0.
        source: where they were read.
        problems: gets missing and damaged images, sizes that differ, unknown frames.
        exif: ``auto`` decides as the module says, ``upright`` and ``raw`` say what the boxes were drawn on.
        check_images: without it only images of unknown size are opened, and the others are taken as annotated, in the
            stored frame: for millions of images on slow storage.
        follow_symlinks: without it an image whose real path is outside the root is refused.
        max_pixels: larger images are refused.

    Raises:
        ValueError: if ``exif`` is not one of its values.
    """
    if exif not in ("auto", "upright", "raw"):
        raise ValueError(f"exif is {exif!r}; it can be 'auto', 'upright' or 'raw'")
    resolver = _FrameResolver(annotations, source, problems)
    resolver.measure(check_images, follow_symlinks, max_pixels)
    if exif == "auto":
        resolver.refuse_unsized()
        resolver.decide_by_size_and_boxes()
    else:
        resolver.upright = resolver.oriented & (exif == "upright")
    resolver.refuse_other_sizes()
    sizes = np.where(resolver.upright[:, None], resolver.turned, resolver.stored)
    return ImageFrames(resolver.names, sizes, resolver.upright & resolver.usable, resolver.usable)


class _FrameResolver:
    """Stored sizes, orientations, and what has been decided, for the images of a split."""

    def __init__(self, annotations: DetectionAnnotations, source: Source, problems: AnnotationProblems) -> None:
        self.annotations, self.source, self.problems = annotations, source, problems
        self.names = list(source.file_names)
        self.annotated = annotations.sizes
        self.stored = annotations.sizes.copy()
        self.orientation = np.ones(len(self.names), np.int64)
        self.usable = np.ones(len(self.names), np.bool_)
        self.upright = np.zeros(len(self.names), np.bool_)

    def measure(self, check_images: bool, follow_symlinks: bool, max_pixels: int) -> None:
        """Find the files and read their headers."""
        root, image_root = self.source.root, self.annotations.image_root
        self.names, outside = resolve_names(self.source.file_names, root, image_root, follow_symlinks)
        folders: dict[Path, dict[str, str]] = {}
        for index, name in enumerate(self.names):
            if index in outside:
                place = self.source.image_place(index)
                self.problems.refuse("LCD-S001", place, f"file name {name!r} {outside[index]}")
                self.usable[index] = False
            elif check_images or self.stored[index].min() <= 0:
                try:
                    size = read_size(os.path.join(image_root, name), max_pixels)
                except UnreadableError as error:
                    problem = error.problem_of(name)
                    reason = problem.reason
                    if problem.code == "LCD-I003":
                        reason += f" in {image_root}" + suggest_name(image_root / name, folders)
                    self.problems.refuse(problem.code, self.image(index), reason)
                    self.usable[index] = False
                else:
                    self.stored[index] = size[:2]
                    self.orientation[index] = size.orientation
        self._note_names(outside)

    def _note_names(self, outside: dict[int, str]) -> None:
        changed = [index for index, name in enumerate(self.names) if name != self.source.file_names[index]]
        if changed:
            shown = f"{self.source.file_names[changed[0]]!r} as {self.names[changed[0]]!r}"
            reason = f"{len(changed)} file names are read as those that exist in {self.annotations.image_root}: {shown}"
            self.problems.note("LCD-D153", (self.source.image_place(changed[0])[0], ""), reason)

    @property
    def turned(self) -> NDArray[np.int32]:
        """Sizes after the orientation is applied, int32 [N, 2]."""
        return np.where((self.orientation >= 5)[:, None], self.stored[:, ::-1], self.stored)

    @property
    def oriented(self) -> NDArray[np.bool_]:
        """Images that can be used and have an orientation, bool [N]."""
        oriented: NDArray[np.bool_] = self.usable & (self.orientation != 1)
        return oriented

    @property
    def sized(self) -> NDArray[np.bool_]:
        """Images with an annotated size, bool [N]."""
        sized: NDArray[np.bool_] = np.all(self.annotated > 0, axis=1)
        return sized

    def refuse_unsized(self) -> None:
        """Refuse turned images without an annotated size."""
        for index in np.flatnonzero(self.oriented & ~self.sized):
            reason = (
                f"EXIF orientation {self.orientation[index]}, and no annotated size tells whether the boxes are of "
            )
            reason += f"the upright or of the stored image; {_REMEDY}"
            self.problems.refuse("LCD-I024", self.image(index), reason)
            self.usable[index] = False

    def decide_by_size_and_boxes(self) -> None:
        """Decide for every turned image, or refuse it."""
        fits_stored, fits_turned = self._fits(self.stored), self._fits(self.turned)
        self.upright = self.oriented & fits_turned & ~fits_stored
        as_stored = self.oriented & fits_stored & ~fits_turned
        if as_stored.any():
            self._decide_by_boxes(as_stored)
        stored = bool((as_stored & ~self.upright & self.usable).any())
        turned = bool(self.upright.any())
        for index in np.flatnonzero(self.oriented & fits_stored & fits_turned):
            reason = (
                f"EXIF orientation {self.orientation[index]}, and the annotated size fits the upright and the stored"
            )
            if turned and stored:
                reason += f" image, as others of the split differ; {_REMEDY}"
                self.problems.refuse("LCD-I025", self.image(index), reason)
                self.usable[index] = False
            elif turned or stored:
                self.problems.note(
                    "LCD-I025", self.image(index), f"{reason} image; taken as the others of the split are"
                )
                self.upright[index] = turned
            else:
                self.problems.note("LCD-I025", self.image(index), f"{reason} image; taken as stored; else {_REMEDY}")

    def _decide_by_boxes(self, as_stored: NDArray[np.bool_]) -> None:
        """Take images of the stored size as upright if their boxes fit that frame only: Label Studio writes such."""
        in_stored, in_turned = self._holds_boxes(self.stored), self._holds_boxes(self.turned)
        only_stored, only_turned = as_stored & in_stored & ~in_turned, as_stored & in_turned & ~in_stored
        count = int(as_stored.sum())
        if only_stored.any() and only_turned.any():
            for index in np.flatnonzero(only_turned):
                reason = "the boxes fit the upright image only, those of other images the stored image only"
                self.problems.refuse("LCD-I025", self.image(index), f"{reason}; {_REMEDY}")
                self.usable[index] = False
        elif only_turned.any():
            self.upright |= as_stored
            reason = (
                f"{count} images have the stored size and an EXIF orientation, but the boxes of {only_turned.sum()} "
            )
            reason += "fit the upright image only: all are taken as upright; else exif: raw"
            self.problems.note("LCD-I026", self.image(np.flatnonzero(only_turned)[0]), reason)
        elif not only_stored.any():
            reason = f"{count} images have the stored size and an EXIF orientation, and their boxes fit the stored and "
            reason += f"the upright image: taken as stored; look at them (Label Studio's are upright) and {_REMEDY}"
            self.problems.note("LCD-I026", self.image(np.flatnonzero(as_stored)[0]), reason)

    def _fits(self, sizes: NDArray[np.int32]) -> NDArray[np.bool_]:
        fits: NDArray[np.bool_] = self.sized & np.all(self.annotated == sizes, axis=1)
        return fits

    def _holds_boxes(self, sizes: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether all boxes of an image lie inside a frame, bool [N]."""
        boxes, images = self.annotations.boxes, self.annotations.image_index
        limits = sizes[images][:, [1, 0]] + TOLERANCE
        with np.errstate(invalid="ignore"):
            outside = (boxes[:, 2:] > limits).any(axis=1) | (boxes[:, :2] < -TOLERANCE).any(axis=1)
        held: NDArray[np.bool_] = np.bincount(images[outside], minlength=len(sizes)) == 0
        return held

    def refuse_other_sizes(self) -> None:
        """Refuse images whose size is not the annotated one; the stored size is accepted for upright boxes."""
        fits = self._fits(self.stored) | (self.upright & self._fits(self.turned))
        for index in np.flatnonzero(self.usable & self.sized & ~fits):
            height, width = (self.turned if self.upright[index] else self.stored)[index]
            turn = f", EXIF orientation {self.orientation[index]}" if self.orientation[index] != 1 else ""
            reason = f"the image is {width}x{height}{turn}, the annotation says "
            reason += f"{self.annotated[index, 1]}x{self.annotated[index, 0]} (width x height)"
            self.problems.refuse("LCD-I020", self.image(index), reason)
            self.usable[index] = False

    def image(self, index: int | np.intp) -> Place:
        """Names an image, not the file that annotates it."""
        return os.path.relpath(self.annotations.image_root / self.names[index], self.source.root), ""
