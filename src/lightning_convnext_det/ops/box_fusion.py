"""Weighted box fusion: the detections of several detectors, or of several views of an image, become one list."""

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_box_fusion(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], labels: Sequence[Tensor], iou_threshold: float = 0.55
) -> tuple[Tensor, Tensor, Tensor]:
    """Average the boxes on which several detectors agree, weighted by their scores.

    By descending score, a box joins the cluster of its class that it overlaps most, or begins one. A cluster's score is
    the mean of its scores, times the share of the detectors that found it.

    >>> boxes = [torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[0.0, 0.0, 10.0, 12.0]])]
    >>> scores, labels = [torch.tensor([0.9]), torch.tensor([0.3])], [torch.tensor([0]), torch.tensor([0])]
    >>> weighted_box_fusion(boxes, scores, labels)
    (tensor([[ 0.0000,  0.0000, 10.0000, 10.5000]]), tensor([0.6000]), tensor([0]))

    Args:
        boxes: for each detector, corners (x1, y1, x2, y2) in pixels of the image, float [N_i, 4].
        scores: for each detector, confidences in [0, 1], float [N_i]; boxes with score 0 are left out.
        labels: for each detector, classes, int64 [N_i].
        iou_threshold: IoU with a cluster's box above which a box joins it.

    Returns:
        Boxes, scores and labels by descending score, on the device and in the dtype of the first detector's.

    Raises:
        ValueError: if there are no detectors, or their lists differ in length.

    Reference:
        Solovyev et al., "Weighted boxes fusion", arXiv:1910.13302; the scores are those of the authors' package
        ensemble-boxes with ``conf_type="avg"``.
    """
    if not boxes or not len(boxes) == len(scores) == len(labels):
        raise ValueError(f"got boxes, scores and labels of {len(boxes)}, {len(scores)} and {len(labels)} detectors")
    like_boxes, like_scores = boxes[0], scores[0]
    all_boxes, all_scores = (torch.cat(list(x)).to("cpu", torch.float64) for x in (boxes, scores))
    all_labels = torch.cat(list(labels)).cpu()
    # one after the other, on the CPU: whether a box joins a cluster depends on those before it
    order = all_scores.argsort(descending=True, stable=True)
    order = order[all_scores[order] > 0]
    if not len(order):
        return like_boxes[:0], like_scores[:0], labels[0][:0]
    fused = []
    for label in sorted(set(all_labels[order].tolist())):
        rows = order[all_labels[order] == label]
        fused.append((*_fuse_class(all_boxes[rows], all_scores[rows], iou_threshold, len(boxes)), label))
    new_boxes, new_scores = torch.cat([b for b, _, _ in fused]), torch.cat([s for _, s, _ in fused])
    new_labels = torch.cat([torch.full((len(s),), label) for _, s, label in fused])
    ranked = new_scores.argsort(descending=True, stable=True)
    return new_boxes[ranked].to(like_boxes), new_scores[ranked].to(like_scores), new_labels[ranked].to(labels[0])


def _fuse_class(boxes: Tensor, scores: Tensor, iou_threshold: float, num_detectors: int) -> tuple[Tensor, Tensor]:
    """Cluster the boxes of one class, which come by descending score; float64."""
    weighted = boxes * scores[:, None]
    centers = torch.empty_like(boxes)  # the boxes of the clusters
    sums, weights, members = torch.zeros_like(boxes), torch.zeros_like(scores), torch.zeros_like(scores)
    num_clusters = 0
    for i, box in enumerate(boxes):
        cluster = num_clusters
        if num_clusters:
            iou, closest = _iou_with(centers[:num_clusters], box).max(0)
            cluster = int(closest) if iou > iou_threshold else num_clusters
        num_clusters = max(num_clusters, cluster + 1)
        sums[cluster] += weighted[i]
        weights[cluster] += scores[i]
        members[cluster] += 1
        centers[cluster] = sums[cluster] / weights[cluster]
    mean = weights[:num_clusters] / members[:num_clusters]
    return centers[:num_clusters], mean * members[:num_clusters].clamp(max=num_detectors) / num_detectors


def _iou_with(boxes: Tensor, box: Tensor) -> Tensor:
    """IoU of boxes [N, 4] with one box [4]."""
    sides = (torch.minimum(boxes[:, 2:], box[2:]) - torch.maximum(boxes[:, :2], box[:2])).clamp(min=0)
    shared = sides.prod(dim=1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) + (box[2:] - box[:2]).prod() - shared
    return shared / union.clamp(min=1e-12)
