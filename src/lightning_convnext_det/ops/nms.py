"""What becomes of detections of one class that overlap; one choice for every detector."""

from typing import Literal, get_args

from torch import Tensor
from torchvision.ops import batched_nms, nms

from lightning_convnext_det.ops.soft_nms import batched_soft_nms

NMSMethod = Literal["hard", "soft", "none"]
Separation = Literal["torchvision", "offset"]


def apply_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    method: NMSMethod,
    iou_threshold: float,
    sigma: float,
    separation: Separation = "torchvision",
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress overlapping detections, each class on its own.

    Args:
        boxes: corners (x1, y1, x2, y2) in pixels, float [N, 4].
        scores: confidences, float [N].
        labels: classes, int64 [N].
        method: ``hard`` drops the weaker of two, ``soft`` lowers its score by a Gaussian, ``none`` keeps all.
        iou_threshold: IoU above which ``hard`` drops.
        sigma: width of the Gaussian of ``soft`` in squared IoU.
        separation: how ``hard`` keeps the classes apart, see `grouped_nms`.

    Returns:
        Boxes, scores and labels of those that are left, by descending score.
    """
    if method == "soft":
        keep, scores = batched_soft_nms(boxes, scores, labels, sigma)
        return boxes[keep], scores, labels[keep]
    if method == "hard":
        keep = grouped_nms(boxes, scores, labels, iou_threshold, separation)
    else:
        keep = scores.argsort(descending=True)
    return boxes[keep], scores[keep], labels[keep]


def grouped_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, separation: Separation = "torchvision"
) -> Tensor:
    """Drop the weaker of two overlapping boxes of the same group.

    Args:
        boxes: corners (x1, y1, x2, y2) in pixels, float [N, 4].
        scores: confidences, float [N].
        groups: classes or levels, int64 [N].
        iou_threshold: IoU above which one is dropped.
        separation: ``torchvision`` takes many boxes group by group, few like ``offset``, MMDetection's way: boxes of a
            group are moved away by a multiple of the largest coordinate, which rounds those of late groups to 1/128 px.

    Returns:
        Indices of those that are left by descending score, int64 [K].
    """
    if separation == "torchvision" or len(boxes) == 0:
        keep: Tensor = batched_nms(boxes, scores, groups, iou_threshold)
        return keep
    moved = boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None]
    # from 10000 boxes on, mmcv takes the moved boxes group by group (mmcv/ops/nms.py, split_thr)
    keep = (
        nms(moved, scores, iou_threshold) if len(boxes) < 10000 else batched_nms(moved, scores, groups, iou_threshold)
    )
    return keep


def check_nms_method(method: str) -> None:
    """Refuse a method that does not exist."""
    if method not in get_args(NMSMethod):
        raise ValueError(f"nms is '{method}'; choose one of {', '.join(get_args(NMSMethod))}")
