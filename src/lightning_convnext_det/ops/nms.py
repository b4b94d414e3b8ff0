"""Non-maximum suppression (NMS) of overlapping detections: hard, soft or none; one choice for every detector."""

from typing import Literal

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
    """Remove overlapping detections, or lower their scores, each class on its own.

    >>> import torch
    >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 9.0]])
    >>> scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1])
    >>> apply_nms(boxes, scores, labels, "hard", iou_threshold=0.5, sigma=0.5)[1:]
    (tensor([0.9000, 0.7000]), tensor([0, 1]))
    >>> apply_nms(boxes, scores, labels, "soft", iou_threshold=0.5, sigma=0.5)[1:]  # 0.8 * exp(-0.9 ** 2 / 0.5)
    (tensor([0.9000, 0.7000, 0.1583]), tensor([0, 1, 0]))

    Args:
        boxes: corners (x1, y1, x2, y2) in pixels, float [N, 4].
        scores: confidences, float [N].
        labels: classes, int64 [N].
        method: ``hard`` drops the one with the lower score, ``soft`` lowers it by a Gaussian, ``none`` keeps all.
        iou_threshold: IoU above which ``hard`` drops.
        sigma: width of the Gaussian of ``soft`` in squared IoU.
        separation: how ``hard`` keeps the classes apart, see `grouped_nms`.

    Returns:
        Boxes, scores and labels of those that are left, by descending score.

    Reference:
        Hard and soft NMS: Bodla et al., arXiv:1704.04503.
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
    """Return the indices of the boxes that hard NMS keeps, each group on its own.

    >>> import torch
    >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 9.0]])
    >>> grouped_nms(boxes, torch.tensor([0.7, 0.8, 0.9]), torch.tensor([0, 0, 1]), iou_threshold=0.5)
    tensor([2, 1])

    Args:
        boxes: corners (x1, y1, x2, y2) in pixels, float [N, 4].
        scores: confidences, float [N].
        groups: classes or levels, int64 [N].
        iou_threshold: IoU above which one is dropped.
        separation: how groups are kept apart. ``offset``, MMDetection's way, moves the boxes of each group by a
            multiple of the largest coordinate, which rounds those of late groups to 1/128 px; ``torchvision`` does so
            for few boxes, and takes many group by group.

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
