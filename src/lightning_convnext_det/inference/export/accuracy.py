"""mAP of an exported file beside that of the detector, where single boxes may differ: in int8."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_convnext_det.errors import ExportError
from lightning_convnext_det.inference.export.graph import ExportGraph
from lightning_convnext_det.inference.export.runtimes import Runner
from lightning_convnext_det.metrics.coco_map import DetectionEvaluator
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
    detector: nn.Module,
    class_names: list[str],
    annotated: Callable[[], Annotated] | None,
    include: Sequence[str],
    allowed_loss: float,
    path: Path,
) -> Accuracy | None:
    """Compare the mAP of a file with the detector's, and keep both in the file's ``metadata.json``.

    Raises:
        ExportError: if the file loses more than is allowed.
    """
    if annotated is None:
        return None
    before, count = evaluate(lambda images: detector(images), annotated(), class_names, detector)
    after, _ = evaluate(as_detector(run, detector, include), annotated(), class_names)
    accuracy = Accuracy(count, before, after)
    if before - after > allowed_loss:
        raise ExportError(
            f"[LCD-X001] {path} loses too much: {accuracy}; give more calibration images, or precision=fp16"
        )
    card = path / "metadata.json"
    if card.is_file():
        content: dict[str, Any] = json.loads(card.read_text())
        card.write_text(json.dumps({**content, "accuracy": asdict(accuracy)}, indent=2, ensure_ascii=False) + "\n")
    return accuracy


def as_detector(run: Runner, detector: nn.Module, include: Sequence[str]) -> Callable[[list[Tensor]], list[Detection]]:
    """An exported file as a function of a list of images, which it takes one by one."""
    graph = None if "normalise" in include else ExportGraph(detector, include)  # type: ignore[arg-type]

    def detect(images: list[Tensor]) -> list[Detection]:
        given = [image[None] if graph is None else graph.normalise(image[None], 1.0) for image in images]
        return [split_detections(TensorDetections(*run(image)))[0] for image in given]

    return detect


def evaluate(
    detect: Callable[[list[Tensor]], list[Detection]],
    annotated: Annotated,
    class_names: list[str],
    detector: nn.Module | None = None,
) -> tuple[float, int]:
    """Return the mAP (0..1) and the number of images."""
    evaluator, count = DetectionEvaluator(class_names), 0
    if detector is not None:
        detector.eval()
    with torch.no_grad():
        for images, targets in annotated:
            evaluator.update(detect(list(images)), list(targets))
            count += len(images)
    return float(evaluator.compute()["map"]), count
