"""Score threshold, NMS and number of detections: which of a detector's boxes are its detections."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lightning_convnext_det.arguments import Count, Fraction, Positive, check_arguments
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.ops.batch_nms import batch_nms, fill_rows
from lightning_convnext_det.ops.nms import NMSMethod, Separation
from lightning_convnext_det.ops.soft_nms import batched_soft_nms
from lightning_convnext_det.ops.tracing import is_recording
from lightning_convnext_det.types import TensorDetections

T = TypeVar("T")


@dataclass
class Selection:
    """Chooses the detections of images; each value can be changed at any time.

    >>> selection = Selection(score_threshold=0.5)
    >>> selection.nms_threshold = 5
    Traceback (most recent call last):
    lightning_convnext_det.errors.ArgumentError: nms_threshold is 5; it must be at least 0 and at most 1

    Args:
        score_threshold: detections with a score that is not higher are dropped.
        nms: ``hard`` drops the weaker of two overlapping detections of a class, ``soft`` lowers its score, ``none``
            keeps all.
        nms_threshold: IoU above which ``hard`` drops.
        soft_nms_sigma: width of the Gaussian by which ``soft`` lowers scores, in squared IoU; smaller lowers more.
        detections_per_image: how many detections are kept per image.

    Raises:
        ValueError: if a value is out of range, also when it is set later.
    """

    score_threshold: Fraction = 0.05
    nms: NMSMethod = "hard"
    nms_threshold: Fraction = 0.5
    soft_nms_sigma: Positive = 0.5
    detections_per_image: Count = 100

    def __setattr__(self, name: str, value: Any) -> None:  # checked here, by name
        check_arguments(Selection.__init__, {name: value})
        super().__setattr__(name, value)

    def select(
        self,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        images: Tensor,
        num_images: int,
        num_classes: int,
        separation: Separation = "torchvision",
        used: Tensor | None = None,
    ) -> TensorDetections:
        """Choose from the boxes of several images, which are one list; can be exported but for soft NMS.

        Args:
            boxes: corners (x1, y1, x2, y2) in pixels, float [N, 4].
            scores: confidences, float [N].
            labels: classes, int64 [N].
            images: index of each box's image, int64 [N].
            num_images: how many images there are.
            num_classes: how many classes there are.
            separation: how hard NMS keeps classes apart, see `grouped_nms`.
            used: False on boxes that are none, bool [N]; None: all are.

        Raises:
            ArgumentError: in an export, with soft NMS.
        """
        if self.nms == "hard":
            keep = batch_nms(
                boxes, scores, labels, images, num_images, self.nms_threshold, separation, num_classes, used
            )
            scores = scores[keep]
        else:
            if used is not None:
                rows = torch.where(used)[0]
                boxes, scores, labels, images, used = (x[rows] for x in (boxes, scores, labels, images, used))
            keep, scores = self._rank(boxes, scores, labels, images, num_images)
        high = scores > self.score_threshold  # soft NMS lowers scores
        high = high if used is None else high & used[keep]
        (boxes, scores, labels), count = fill_rows(
            (boxes[keep], scores, labels[keep]), images[keep], high, num_images, self.detections_per_image
        )
        return TensorDetections(boxes, scores, labels, count)

    def _rank(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, images: Tensor, num_images: int
    ) -> tuple[Tensor, Tensor]:
        """Order the boxes of each image by score, which soft NMS lowers before: indices [K] and scores [K]."""
        if is_recording():
            if self.nms == "soft":
                raise ArgumentError("soft NMS cannot be exported; set the detector's nms to 'hard' or 'none'")
            keep = scores.sort(descending=True).indices
            return keep, scores[keep]
        indices, values = [], []
        for image in range(num_images):
            rows = torch.where(images == image)[0]
            if self.nms == "soft":
                keep, lowered = batched_soft_nms(boxes[rows], scores[rows], labels[rows], self.soft_nms_sigma)
            else:
                keep = scores[rows].argsort(descending=True)
                lowered = scores[rows][keep]
            indices.append(rows[keep])
            values.append(lowered)
        return torch.cat(indices), torch.cat(values)


class Setting(Generic[T]):
    """An attribute of a detector, or of a part of it, that its ``selection`` holds.

    Args:
        name: its name there (default: the same).
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name or ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = self.name or name

    def __get__(self, detector: Any, owner: type) -> T:  # whatever has a selection
        if detector is None:
            return self  # type: ignore[return-value]  # as properties do on the class
        value: T = getattr(detector.selection, self.name)
        return value

    def __set__(self, detector: Any, value: T) -> None:
        setattr(detector.selection, self.name, value)


class SelectsDetections:
    """Gives a detector the values of its ``selection`` as attributes that can be read and set at any time."""

    selection: Selection
    score_threshold = Setting[float]()
    nms = Setting[NMSMethod]()
    nms_threshold = Setting[float]()
    soft_nms_sigma = Setting[float]()
    detections_per_image = Setting[int]()
