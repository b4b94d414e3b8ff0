"""The images of a report as small JPEGs: the worst ones, crops of likely label errors, and training images."""

import base64
import io
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.metrics.label_errors import LabelError
from lightning_convnext_det.report.analysis import Analysis
from lightning_convnext_det.report.dataset import TrainingImage
from lightning_convnext_det.report.evaluation import Evaluation
from lightning_convnext_det.visualization import class_colors, draw_detections

_QUALITY = 72
_SIDE = 560  # pixels, longer side of an image
_CROP = 320  # pixels, longer side of a crop
_ANNOTATED, _FOUND = (0, 114, 178), (230, 97, 1)  # blue and orange; also told apart by dashes


class WorstImage(NamedTuple):
    """An image that costs much mAP, as JPEGs in data addresses."""

    file_name: str
    image_id: int
    loss: float
    annotated: str
    found: str
    summary: str


class ErrorCrop(NamedTuple):
    """A likely label error with its crop."""

    error: LabelError
    file_name: str
    image_id: int
    annotation_id: int | None
    text: str
    crop: str | None


def draw_worst_images(evaluation: Evaluation, analysis: Analysis, count: int) -> list[WorstImage]:
    """Draw the images that cost most mAP, annotations and detections side by side."""
    annotations = evaluation.annotations
    colors = class_colors(annotations.class_names)
    limits = torch.tensor(analysis.limits, dtype=torch.float64)
    worst = []
    for image in np.argsort(-analysis.losses, kind="stable")[:count].tolist():
        if analysis.losses[image] <= 0:
            break
        pixels = _pixels(evaluation, image)
        target, detection = evaluation.targets[image], evaluation.detections[image]
        drawn = detection["scores"].double() >= limits[detection["labels"]]
        shown = (
            (target["boxes"], target["labels"], None),
            (detection["boxes"][drawn], detection["labels"][drawn], detection["scores"][drawn]),
        )
        sides = []
        for boxes, labels, scores in shown:
            names = [annotations.class_names[label] for label in labels.tolist()]
            sides.append(_jpeg(draw_detections(pixels, boxes, names, scores, colors), _SIDE))
        where = _file_name(evaluation, image), int(annotations.image_ids[image])
        loss, summary = float(analysis.losses[image]), _summary(analysis, image, limits.numpy())
        worst.append(WorstImage(*where, loss, annotated=sides[0], found=sides[1], summary=summary))
    return worst


def crop_label_errors(evaluation: Evaluation, analysis: Analysis, with_crops: int) -> list[ErrorCrop]:
    """Describe all likely label errors, and draw the first ones: annotation dashed, detection solid."""
    annotations, names = evaluation.annotations, evaluation.annotations.class_names
    crops = []
    for number, error in enumerate(analysis.label_errors):
        object_label = names[analysis.objects.label[error.object]] if error.object >= 0 else ""
        seen = ""
        if error.detection >= 0:
            row = error.detection
            seen = f"{names[analysis.matches.label[row]]} {analysis.matches.score[row]:.2f}"
        texts = {
            "missing": f"found {seen}, not annotated",
            "class": f"annotated {object_label}, found {seen}",
            "box": f"annotated {object_label} elsewhere than found {seen}",
            "nothing": f"annotated {object_label}, never found",
        }
        crops.append(ErrorCrop(
            error, _file_name(evaluation, error.image), int(annotations.image_ids[error.image]),
            int(annotations.annotation_ids[error.object]) if error.object >= 0 else None,
            texts[error.kind], _crop(evaluation, analysis, error) if number < with_crops else None,
        ))  # fmt: skip
    return crops


def draw_training_images(samples: Sequence[TrainingImage], names: Sequence[str]) -> list[str]:
    """Draw augmented training images with their boxes."""
    colors = class_colors(names)
    return [_jpeg(draw_detections(one.pixels, one.boxes, one.labels, None, colors), _CROP) for one in samples]


def _crop(evaluation: Evaluation, analysis: Analysis, error: LabelError) -> str:
    boxes = [
        (analysis.objects.box[error.object] if error.object >= 0 else None, _ANNOTATED, True),
        (analysis.boxes[error.detection] if error.detection >= 0 else None, _FOUND, False),
    ]
    shown = np.stack([box for box, _, _ in boxes if box is not None])
    pixels = Image.fromarray(_pixels(evaluation, error.image)[:3].permute(1, 2, 0).numpy())
    low, high = shown[:, :2].min(0), shown[:, 2:].max(0)
    margin = max(16.0, 0.6 * float((high - low).max()))
    left, top = np.maximum(low - margin, 0).astype(int).tolist()
    right, bottom = np.minimum(high + margin, [pixels.width, pixels.height]).round().astype(int).tolist()
    part = pixels.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    scale = _CROP / max(part.size)
    size = max(1, round(part.width * scale)), max(1, round(part.height * scale))
    part = part.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(part)
    for box, color, dashed in boxes:
        if box is not None:
            corners = ((box.reshape(2, 2) - [left, top]) * scale).ravel().tolist()
            _draw_frame(draw, corners, color, dashed)
    return _jpeg(part, _CROP)


def _draw_frame(draw: ImageDraw.ImageDraw, corners: list[float], color: tuple[int, int, int], dashed: bool) -> None:
    """Draw a frame of 3 pixels on a white one, so that it shows on any background."""
    left, top, right, bottom = corners
    sides = list(pairwise([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]))
    for start, end in sides:
        draw.line([start, end], fill="white", width=5)
    for start, end in sides:
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        steps = max(1, round(length / 9)) if dashed else 1
        points = np.linspace(start, end, (2 * steps if dashed else 1) + 1)
        for i in range(0, len(points) - 1, 2):
            draw.line([tuple(points[i]), tuple(points[i + 1])], fill=color, width=3)


def _summary(analysis: Analysis, image: int, limits: NDArray[np.float64]) -> str:
    matches = analysis.matches
    kept = (matches.image == image) & (matches.score >= limits[matches.label]) & ~matches.is_ignored[0]
    right = int((kept & matches.is_true_positive[0]).sum())
    rows = slice(*analysis.objects.offset[image : image + 2])
    count = int((~analysis.objects.is_ignored[rows]).sum())
    return f"{right} of {count} objects found, {int(kept.sum()) - right} wrong"


def _pixels(evaluation: Evaluation, image: int) -> Tensor:
    return read_image(evaluation.path(image), upright=bool(evaluation.annotations.upright[image]))


def _file_name(evaluation: Evaluation, image: int) -> str:
    name: bytes = evaluation.annotations.file_names[image]
    return name.decode()


def _jpeg(image: Image.Image, side: int) -> str:
    """A data address of the image, at most ``side`` pixels long."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
