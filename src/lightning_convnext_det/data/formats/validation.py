"""Checks of images and boxes that are the same for every format: what remains is clipped and grouped by image."""

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.data.annotations import DetectionAnnotations, count_offsets
from lightning_convnext_det.data.formats.exif_frames import Exif, ImageFrames, resolve_frames
from lightning_convnext_det.data.formats.file_names import encode_names
from lightning_convnext_det.data.formats.problems import AnnotationProblems, Source
from lightning_convnext_det.data.io.decode import MAX_PIXELS

ROUNDING = 0.05  # pixels that a box may reach out of its image unreported: COCO rounds coordinates to 0.01
MIN_BOX_SIDE = 0.01  # pixels; a side below COCO's rounding is none. COCO has true boxes of less than one pixel.
SUSPICIOUS_SHARE = 0.01  # of all boxes: more inverted ones than this are a mistake of format, not of drawing
NORMALISED_LIMIT = 1.5  # coordinates up to this in every box are not pixels
_EXPECTED = {
    "coco": "COCO expects x, y, width, height",
    "voc": "VOC expects xmin, ymin, xmax, ymax",
    "cvat": "CVAT expects xtl, ytl, xbr, ybr",
    "yolo": "YOLO expects the centre, width and height",
}


def validate_annotations(
    annotations: DetectionAnnotations,
    source: Source,
    problems: AnnotationProblems,
    *,
    exif: Exif = "auto",
    check_images: bool = True,
    follow_symlinks: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> DetectionAnnotations:
    """Check images and boxes, drop what cannot be used, and clip boxes to their images.

    Args:
        annotations: as read: corners in float64, YOLO's relative to the image.
        source: where they were read.
        problems: gets every problem; refused records are left out.
        exif: see :func:`resolve_frames`.
        check_images: see :func:`resolve_frames`.
        follow_symlinks: see :func:`resolve_frames`.
        max_pixels: see :func:`resolve_frames`.
    """
    frames = resolve_frames(annotations, source, problems, exif, check_images, follow_symlinks, max_pixels)
    _note_repeated_files(annotations, source, frames, problems)
    boxes, keep = _BoxChecks(annotations, source, frames, problems).run()
    rows, usable = np.flatnonzero(keep), frames.usable
    new_index = (np.cumsum(usable) - 1)[annotations.image_index[rows]]
    boxes_kept: NDArray[np.float32] = boxes[rows].astype(np.float32)
    sides = boxes_kept[:, 2:] - boxes_kept[:, :2]
    if usable.any() and not len(rows):
        problems.note("LCD-D109", (str(annotations.image_root), ""), "no image of the split has a box")
    area = annotations.area[rows]
    return replace(
        annotations,
        file_names=encode_names([name for name, use in zip(frames.file_names, usable, strict=True) if use]),
        image_ids=annotations.image_ids[usable],
        sizes=frames.sizes[usable],
        upright=frames.upright[usable],
        boxes=boxes_kept,
        labels=annotations.labels[rows],
        crowd=annotations.crowd[rows],
        area=np.where(area > 0, area, sides.prod(axis=1)).astype(np.float32),
        annotation_ids=annotations.annotation_ids[rows],
        offsets=count_offsets(new_index, int(usable.sum())),
        problems=tuple(problems.problems),
    )


def _note_repeated_files(
    annotations: DetectionAnnotations, source: Source, frames: ImageFrames, problems: AnnotationProblems
) -> None:
    """Note files that are listed more than once: each listing has only its own share of the objects."""
    names = [_normalised(name) for name, use in zip(frames.file_names, frames.usable, strict=True) if use]
    if len(set(names)) == len(names):
        return
    repeated = {name: count for name, count in Counter(names).items() if count > 1}
    first = next(iter(repeated))
    ids = annotations.image_ids[frames.usable][[name == first for name in names]]
    reason = f"{len(repeated)} files are listed several times, such as {first!r} under the image ids "
    reason += f"{', '.join(map(str, ids[:5]))}; each lacks the objects of the others: join them under one id"
    problems.note("LCD-D127", (source.image_place(0)[0] if source.format != "yolo" else first, ""), reason)


def _normalised(name: str) -> str:
    while "./" in name or "//" in name:  # os.path.normpath takes ten times as long
        shorter = name.replace("/./", "/").replace("//", "/").removeprefix("./")
        if shorter == name:
            break
        name = shorter
    return name


class _BoxChecks:
    """Checks of the boxes of a split, each of those that passed the ones before."""

    def __init__(
        self, annotations: DetectionAnnotations, source: Source, frames: ImageFrames, problems: AnnotationProblems
    ) -> None:
        self.source, self.problems = source, problems
        self.images, self.labels, self.crowd = annotations.image_index, annotations.labels, annotations.crowd
        self.limits = frames.sizes[self.images][:, [1, 0, 1, 0]].astype(np.float64)  # [M, 4]: width, height twice
        self.alive = frames.usable[self.images]  # [M]
        self.annotated = source.as_annotated(annotations.boxes.astype(np.float64))
        with np.errstate(invalid="ignore"):
            self.corners = annotations.boxes * self.limits if source.format == "yolo" else annotations.boxes

    def run(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Corners clipped to the image, float64 [M, 4], and which boxes are kept, bool [M]."""
        self.report(~np.isfinite(self.annotated).all(axis=1), "LCD-D103", "is not finite", doubtful=True)
        self.suspect_format()
        with np.errstate(invalid="ignore"):
            sides = self.annotated[:, 2:]
            if self.source.format in ("voc", "cvat"):
                sides = sides - self.annotated[:, :2]
        expected = _EXPECTED[self.source.format]
        inverted = self.alive & (sides < 0).any(axis=1)
        many = inverted.sum() > SUSPICIOUS_SHARE * max(1, self.alive.sum())
        self.report(inverted, "LCD-D102", f"is inverted; {expected}", doubtful=bool(many))
        self.report((sides == 0).any(axis=1), "LCD-D101", f"has no area; {expected}")
        outside = ((self.corners[:, 2:] <= 0) | (self.corners[:, :2] >= self.limits[:, :2])).any(axis=1)
        self.report(outside, "LCD-D104", "lies outside its image")
        clipped = np.clip(self.corners, 0, self.limits)
        tiny = ((clipped[:, 2:] - clipped[:, :2]) < MIN_BOX_SIDE).any(axis=1)
        self.report(tiny, "LCD-D106", f"is less than {MIN_BOX_SIDE} pixels wide or high inside its image")
        self.report(self.repeated(clipped), "LCD-D107", "repeats an earlier one of the same class")
        self.report_clipped(clipped)
        return clipped, self.alive

    def report(self, bad: NDArray[np.bool_] | np.bool_, code: str, reason: str, doubtful: bool = False) -> None:
        """Report boxes that fail a check, and leave them out from then on."""
        report = self.problems.refuse if doubtful else self.problems.drop
        for row in np.flatnonzero(bad & self.alive):
            report(code, self.source.box_place(int(row)), f"box {_shown(self.annotated[row])} {reason}")
        self.alive = self.alive & ~bad

    def suspect_format(self) -> None:
        """Find splits whose boxes are not written as the format says."""
        annotated, corners, limits = self.annotated[self.alive], self.corners[self.alive], self.limits[self.alive]
        if not len(annotated) or self.source.format == "yolo":  # relative boxes are checked line by line
            return
        is_coco = self.source.format == "coco"
        place = (self.source.box_place(0)[0] if is_coco else str(self.source.root), "")
        if annotated.max() <= NORMALISED_LIMIT and limits.max() > 16:
            reason = (
                f"no coordinate of {len(annotated)} boxes is above {NORMALISED_LIMIT}: they look relative to the image"
            )
            self.problems.suspect("LCD-D113", place, f"{reason}; {_EXPECTED[self.source.format]} in pixels")
            return
        if not is_coco:
            return
        overhang = (corners > limits + 1).any(axis=1).mean()
        ordered = (annotated[:, 2:] > annotated[:, :2]).all() and (annotated >= 0).all()
        if overhang > 0.1 and ordered and (annotated <= limits + 1).all():
            reason = (
                f"{overhang:.0%} of {len(annotated)} boxes reach out of their images, and all fit if read as corners"
            )
            self.problems.suspect("LCD-D108", place, f"{reason}; {_EXPECTED['coco']}")

    def repeated(self, boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which boxes equal an earlier one of the same image and class, crowd or not alike; bool [M]."""
        rows = np.flatnonzero(self.alive)
        keys = np.column_stack([self.images[rows], self.labels[rows], self.crowd[rows], boxes[rows]])
        order = np.lexsort(keys.T)  # stable: equal ones keep their order
        equal = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
        repeated = np.zeros(len(boxes), np.bool_)
        repeated[rows[order[1:][equal]]] = True
        return repeated

    def report_clipped(self, clipped: NDArray[np.float64]) -> None:
        """Report boxes that reach out of their images by more than rounding."""
        excess = np.abs(self.corners - clipped).max(axis=1, initial=0)
        for row in np.flatnonzero(self.alive & (excess > ROUNDING)):
            before = np.prod(self.corners[row, 2:] - self.corners[row, :2])
            lost = 1 - np.prod(clipped[row, 2:] - clipped[row, :2]) / before
            reason = f"box {_shown(self.annotated[row])} reaches out of its image of "
            reason += f"{self.limits[row, 0]:.0f}x{self.limits[row, 1]:.0f} by {excess[row]:.4g} px"
            if lost > 0.5:
                reason += f" and loses {lost:.0%} of its area"
            if self.source.format == "voc" and self.annotated[row, :2].min() == 0:
                reason += "; VOC counts pixels from 1"
            self.problems.clip("LCD-D105", self.source.box_place(int(row)), reason)


def _shown(box: NDArray[np.float64]) -> str:
    return "[" + ", ".join(f"{value:.10g}" for value in box) + "]"
