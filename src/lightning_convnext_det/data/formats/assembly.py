"""From the records of a split to its table: boxes checked, cut to their images and sorted by image."""

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.data.annotations import DetectionAnnotations, Format
from lightning_convnext_det.data.formats.exif_frames import Exif, ImageFrames, resolve_frames
from lightning_convnext_det.data.formats.records import AnnotationProblems, Records

ROUNDING = 0.05  # pixels that a box may reach out of its image unreported: COCO rounds coordinates to 0.01
MIN_BOX_SIDE = 0.01  # pixels; a side below COCO's rounding is none. COCO has true boxes of less than one pixel.
SUSPICIOUS_SHARE = 0.01  # of all boxes: more inverted ones than this are a mistake of format, not of drawing
NORMALISED_LIMIT = 1.5  # coordinates up to this in every box are not pixels
_STATES = {
    "coco": "COCO states x, y, width, height",
    "voc": "VOC states xmin, ymin, xmax, ymax",
    "yolo": "YOLO states the centre, width and height",
}


def build_annotations(
    records: Records,
    findings: AnnotationProblems,
    *,
    exif: Exif = "auto",
    check_images: bool = True,
    follow_symlinks: bool = True,
) -> DetectionAnnotations:
    """Check images and boxes and turn what remains into a table.

    Args:
        records: the split as its files state it.
        findings: gets every problem; what it refuses is left out of the table.
        exif: see :func:`resolve_frames`.
        check_images: see :func:`resolve_frames`.
        follow_symlinks: see :func:`resolve_frames`.
    """
    frames = resolve_frames(records, findings, exif, check_images, follow_symlinks)
    boxes, keep = _check_boxes(records, frames, findings)
    new_index = np.cumsum(frames.usable) - 1
    rows = np.flatnonzero(keep)
    rows = rows[np.argsort(records.image_index[rows], kind="stable")]
    count = int(frames.usable.sum())
    per_image = np.bincount(new_index[records.image_index[rows]], minlength=count)
    boxes_kept: NDArray[np.float32] = boxes[rows].astype(np.float32)
    sides = boxes_kept[:, 2:] - boxes_kept[:, :2]
    if count and not len(rows):
        findings.note("LCD-D109", (str(records.image_root), ""), "no image of the split has a box")
    names = [name.encode() for name, usable in zip(records.file_names, frames.usable, strict=True) if usable]
    return DetectionAnnotations(
        image_root=records.image_root,
        file_names=np.array(names, dtype=np.bytes_),
        image_ids=records.image_ids[frames.usable],
        sizes=frames.sizes[frames.usable],
        upright=frames.upright[frames.usable],
        boxes=boxes_kept,
        labels=records.labels[rows],
        crowd=records.crowd[rows],
        area=np.where(records.area[rows] > 0, records.area[rows], sides.prod(axis=1)).astype(np.float32),
        annotation_ids=records.annotation_ids[rows],
        offsets=np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64),
        class_names=records.class_names,
        category_ids=records.category_ids,
        problems=tuple(findings.problems),
    )


def _check_boxes(
    records: Records, frames: ImageFrames, findings: AnnotationProblems
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Corners cut to the image, float64 [M, 4], and which boxes are kept, bool [M]."""
    stated = records.boxes
    limits = frames.sizes[records.image_index][:, [1, 0, 1, 0]].astype(np.float64)  # [M, 4]: width, height twice
    alive = frames.usable[records.image_index]
    _report(records, findings, alive & ~np.isfinite(stated).all(axis=1), "LCD-D103", "is not finite", doubtful=True)
    alive &= np.isfinite(stated).all(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):  # rows that are not finite are no longer alive
        corners, sides = _corners(records.format, stated, limits)
    _suspect_format(records, findings, corners[alive], limits[alive], stated[alive])
    states = _STATES[records.format]
    inverted = alive & (sides < 0).any(axis=1)
    many = inverted.sum() > SUSPICIOUS_SHARE * max(1, alive.sum())
    _report(records, findings, inverted, "LCD-D102", f"is inverted; {states}", doubtful=bool(many))
    empty = alive & ~inverted & (sides == 0).any(axis=1)
    _report(records, findings, empty, "LCD-D101", f"has no area; {states}")
    alive &= ~inverted & ~empty
    outside = alive & ((corners[:, 2:] <= 0) | (corners[:, :2] >= limits[:, :2])).any(axis=1)
    _report(records, findings, outside, "LCD-D104", "lies outside its image")
    clipped = np.clip(corners, 0, limits)
    tiny = alive & ~outside & ((clipped[:, 2:] - clipped[:, :2]) < MIN_BOX_SIDE).any(axis=1)
    _report(records, findings, tiny, "LCD-D106", f"is less than {MIN_BOX_SIDE} pixels wide or high inside its image")
    alive &= ~outside & ~tiny
    repeated = _repeated(records, clipped, alive)
    _report(records, findings, repeated, "LCD-D107", "repeats an earlier one of the same class")
    alive &= ~repeated
    _report_clipped(records, findings, corners, clipped, limits, alive)
    return clipped, alive


def _corners(
    format: Format, stated: NDArray[np.float64], limits: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corners in pixels [M, 4], counted from the image's upper left edge, and the sides as stated [M, 2]."""
    first, second = stated[:, :2], stated[:, 2:]
    if format == "coco":
        return np.concatenate([first, first + second], axis=1), second
    if format == "voc":  # pixels are counted from 1 and the last one is inside: (1, 1, W, H) is the whole image
        return np.concatenate([first - 1, second], axis=1), second - first
    return np.concatenate([first - second / 2, first + second / 2], axis=1) * limits, second


def _suspect_format(
    records: Records,
    findings: AnnotationProblems,
    corners: NDArray[np.float64],
    limits: NDArray[np.float64],
    stated: NDArray[np.float64],
) -> None:
    """Find sets whose boxes are stated in another way than the format's."""
    if not len(stated) or records.format == "yolo":  # relative boxes are checked line by line
        return
    where = (records.box_where(0)[0] if records.format == "coco" else str(records.root), "")
    if stated.max() <= NORMALISED_LIMIT and limits.max() > 16:
        reason = f"no coordinate of {len(stated)} boxes is above {NORMALISED_LIMIT}: they look relative to the image"
        findings.suspect("LCD-D113", where, f"{reason}; {_STATES[records.format]} in pixels")
        return
    if records.format != "coco":
        return
    overhang = (corners > limits + 1).any(axis=1).mean()
    fit_as_corners = (stated[:, 2:] > stated[:, :2]).all() and (stated >= 0).all() and (stated <= limits + 1).all()
    if overhang > 0.1 and fit_as_corners:
        reason = f"{overhang:.0%} of {len(stated)} boxes reach out of their images, and all fit if read as corners"
        findings.suspect("LCD-D108", where, f"{reason}; {_STATES['coco']}")


def _repeated(records: Records, boxes: NDArray[np.float64], alive: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which boxes equal an earlier one of the same image and class, crowd or not alike; bool [M]."""
    rows = np.flatnonzero(alive)
    keys = np.column_stack([records.image_index[rows], records.labels[rows], records.crowd[rows], boxes[rows]])
    order = np.lexsort(keys.T)  # stable: equal ones keep their order
    equal = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    repeated = np.zeros(len(boxes), np.bool_)
    repeated[rows[order[1:][equal]]] = True
    return repeated


def _report(
    records: Records,
    findings: AnnotationProblems,
    bad: NDArray[np.bool_],
    code: str,
    reason: str,
    doubtful: bool = False,
) -> None:
    report = findings.refuse if doubtful else findings.drop
    for row in np.flatnonzero(bad):
        report(code, records.box_where(int(row)), f"box {_shown(records.boxes[row])} {reason}")


def _report_clipped(
    records: Records,
    findings: AnnotationProblems,
    corners: NDArray[np.float64],
    clipped: NDArray[np.float64],
    limits: NDArray[np.float64],
    alive: NDArray[np.bool_],
) -> None:
    excess = np.abs(corners - clipped).max(axis=1, initial=0)
    for row in np.flatnonzero(alive & (excess > ROUNDING)):
        before = np.prod(corners[row, 2:] - corners[row, :2])
        lost = 1 - np.prod(clipped[row, 2:] - clipped[row, :2]) / before
        reason = f"box {_shown(records.boxes[row])} reaches out of its image of "
        reason += f"{limits[row, 0]:.0f}x{limits[row, 1]:.0f} by {excess[row]:.4g} px"
        if lost > 0.5:
            reason += f" and loses {lost:.0%} of its area"
        if records.format == "voc" and records.boxes[row, :2].min() == 0:
            reason += "; VOC counts pixels from 1"
        findings.clip("LCD-D105", records.box_where(int(row)), reason)


def _shown(box: NDArray[np.float64]) -> str:
    return "[" + ", ".join(f"{value:.10g}" for value in box) + "]"
