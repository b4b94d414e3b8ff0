"""mAP of an exported file beside that of the detector, where single boxes may differ: in int8."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_convnext_det.errors import ExportError
from lightning_convnext_det.inference.export.graph import ExportGraph
from lightning_convnext_det.inference.export.runtimes import Runner
from lightning_convnext_det.metrics.coco_map import DetectionEvaluator
from lightning_convnext_det.models.image_transform import scale_boxes
from lightning_convnext_det.models.tensor_detections import split_detections
from lightning_convnext_det.types import Detection, Target, TensorDetections

Annotated = Iterable[tuple[Sequence[Tensor], Sequence[Target]]]
"""Batches of uint8 images [C, H, W] with their targets."""


@dataclass
class Accuracy:
    """mAP of the detector and of the file on the same images, 0..1."""

    images: int
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f"mAP on {self.images} images: {100 * self.before:.2f} before, {100 * self.after:.2f} after "
            f"({100 * (self.after - self.before):+.2f})"
        )


def measure_map(
    run: Runner,
    graph: ExportGraph,
    class_names: list[str],
    annotated: Callable[[], Annotated] | None,
    prepare: Callable[[Tensor], Tensor],
    allowed_loss: float,
    name: object,
) -> Accuracy | None:
    """Compare the mAP of a file with the detector's on the same images, prepared alike.

    Raises:
        ExportError: if the file loses more than is allowed.
    """
    if annotated is None:
        return None
    before, count = evaluate(as_detector(graph, prepare), annotated(), class_names)
    after, _ = evaluate(as_detector(run, prepare), annotated(), class_names)
    accuracy = Accuracy(count, before, after)
    if before - after > allowed_loss:
        raise ExportError(
            f"[LCD-X001] {name} loses too much: {accuracy}; give more calibration images, or precision=fp16"
        )
    return accuracy


def as_detector(
    run: Callable[[Tensor], Sequence[Tensor]], prepare: Callable[[Tensor], Tensor]
) -> Callable[[list[Tensor]], list[Detection]]:
    """An exported file, or its graph, as a function of a list of images, which it takes one by one as prepared."""

    def detect(images: list[Tensor]) -> list[Detection]:
        found = []
        for image in images:
            given = prepare(image[None])
            detection = split_detections(TensorDetections(*run(given)))[0]
            sizes = [(pixels.shape[-2], pixels.shape[-1]) for pixels in (given, image)]
            boxes = scale_boxes(detection["boxes"], *sizes)
            found.append(Detection(boxes=boxes, labels=detection["labels"], scores=detection["scores"]))
        return found

    return detect


def evaluate(
    detect: Callable[[list[Tensor]], list[Detection]],
    annotated: Annotated,
    class_names: list[str],
) -> tuple[float, int]:
    """Return the mAP (0..1) and the number of images."""
    evaluator, count = DetectionEvaluator(class_names), 0
    with torch.no_grad():
        for images, targets in annotated:
            evaluator.update(detect(list(images)), list(targets))
            count += len(images)
    return float(evaluator.compute()["map"]), count
