"""Confusion matrix of a detector, with background."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_convnext_det.metrics.matching import match_detections


def confusion_matrix(
    detections: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    num_classes: int,
    score_threshold: float | Sequence[float] = 0.0,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> NDArray[np.int64]:
    """Count which class is taken for which.

    Detections and objects are matched as in `match_detections`, but regardless of their classes.

    >>> import torch
    >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    >>> detection = {"boxes": boxes, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    >>> confusion_matrix([detection], [{"boxes": boxes, "labels": torch.tensor([0])}], num_classes=2)
    array([[0, 1, 0],
           [0, 0, 0],
           [0, 0, 0]])

    Args:
        detections: of each image, on the CPU.
        targets: of each image.
        num_classes: foreground classes.
        score_threshold: detections with a lower score are left out; one number, or one of each class.
        iou_threshold: least IoU of a match.
        max_detections: how many detections of an image count, the best by score.

    Returns:
        Annotated class by detected class, [C + 1, C + 1]; the last row holds detections without an object, the last
        column objects without a detection. Objects that are ignored count nowhere, nor what is matched with them.
    """
    limits = np.broadcast_to(np.asarray(score_threshold, np.float32), num_classes)
    kept = [_above(detection, limits) for detection in detections]
    classless = [{**target, "labels": target["labels"] * 0} for target in targets]
    matches = match_detections(
        [{**d, "labels": d["labels"] * 0} for d in kept], classless, 1, (iou_threshold,), max_detections
    )
    labels = [d["labels"].numpy() for d in kept]
    objects = [t["labels"].numpy() for t in targets]
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    found = [np.zeros(len(o), np.bool_) for o in objects]
    for image, detection, row, is_right, is_ignored in zip(
        matches.image, matches.detection, matches.object[0], matches.is_true_positive[0], matches.is_ignored[0],
        strict=True,
    ):  # fmt: skip
        if is_right:
            matrix[objects[image][row], labels[image][detection]] += 1
            found[image][row] = True
        elif not is_ignored:
            matrix[num_classes, labels[image][detection]] += 1
    for image, target in enumerate(targets):
        counts = ~found[image]
        for name in ("iscrowd", "difficult"):
            if name in target:
                counts &= ~target[name].numpy().astype(np.bool_)
        matrix[:-1, -1] += np.bincount(objects[image][counts], minlength=num_classes)
    return matrix


def _above(detection: Mapping[str, Tensor], limits: NDArray[np.float32]) -> dict[str, Tensor]:
    """The detections with at least the score that their class asks for."""
    from torch import from_numpy

    kept = from_numpy(detection["scores"].numpy() >= limits[detection["labels"].numpy()])
    return {name: detection[name][kept] for name in ("boxes", "labels", "scores")}
