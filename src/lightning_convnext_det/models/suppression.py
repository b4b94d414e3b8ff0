"""What becomes of detections of one class that overlap; one choice for every detector."""

from typing import Literal, get_args

from torch import Tensor
from torchvision.ops import batched_nms

from lightning_convnext_det.ops.soft_nms import batched_soft_nms

Suppression = Literal["hard", "soft", "none"]


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, method: Suppression, iou_threshold: float, sigma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress overlapping detections, each class on its own.

    Args:
        boxes: corners (x1, y1, x2, y2) in pixels, float [N, 4].
        scores: confidences, float [N].
        labels: classes, int64 [N].
        method: ``hard`` drops the weaker of two, ``soft`` lowers its score by a Gaussian, ``none`` keeps all.
        iou_threshold: IoU above which ``hard`` drops.
        sigma: width of the Gaussian of ``soft`` in IoU.

    Returns:
        Boxes, scores and labels of those that are left, by falling score.
    """
    if method == "soft":
        keep, scores = batched_soft_nms(boxes, scores, labels, sigma)
        return boxes[keep], scores, labels[keep]
    keep = batched_nms(boxes, scores, labels, iou_threshold) if method == "hard" else scores.argsort(descending=True)
    return boxes[keep], scores[keep], labels[keep]


def check_suppression(method: str) -> None:
    """Refuse a method that does not exist."""
    if method not in get_args(Suppression):
        raise ValueError(f"nms is '{method}'; choose one of {', '.join(get_args(Suppression))}")
