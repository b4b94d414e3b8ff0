"""Soft-NMS (arXiv:1704.04503): lower the scores of overlapping boxes instead of discarding them.

The paper's loop takes the box with the highest score, lowers those of its neighbours, and repeats. Classes do not
affect each other, so a round here takes the best box of every class at once, and there are as many rounds as boxes in
the largest class. Everything is computed in float64: the boxes and their order are those of a plain loop in float64.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

_TABLE_SIZE = 2**15  # decays of all pairs are computed beforehand if so few that no operation spreads over threads


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    method: Literal["gaussian", "linear"] = "gaussian",
    iou_threshold: float = 0.3,
) -> tuple[Tensor, Tensor]:
    """Lower the scores of overlapping boxes instead of discarding them.

    Among equal scores the box that comes first is taken first, and is first in the result. A box that is not finite
    overlaps nothing, and one whose score is NaN is dropped.

    >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]])
    >>> soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]))  # 0.8 * exp(-0.9 ** 2 / 0.5)
    (tensor([0, 2, 1]), tensor([0.9000, 0.7000, 0.1583]))

    Args:
        boxes: corners ``(x1, y1, x2, y2)`` in pixels, float [N, 4], x1 <= x2 and y1 <= y2.
        scores: confidences in [0, 1], float [N].
        sigma: width of the Gaussian decay, ``exp(-iou ** 2 / sigma)``; smaller lowers scores more.
        score_threshold: boxes whose decayed score is not above this are dropped.
        method: ``gaussian``, or ``linear``: the score is multiplied by 1 - iou from ``iou_threshold`` on.
        iou_threshold: overlap from which the linear decay applies.

    Returns:
        Indices int64 [K] by descending decayed score, and those scores [K] in their dtype. K is 0 for no boxes.

    Raises:
        ValueError: if ``boxes`` is not [N, 4] or its length differs from ``scores``, or a setting is out of range.

    Reference:
        Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code", arXiv:1704.04503.
    """
    labels = torch.zeros(scores.shape, dtype=torch.int64, device=scores.device)
    return batched_soft_nms(boxes, scores, labels, sigma, score_threshold, method, iou_threshold)


def batched_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    method: Literal["gaussian", "linear"] = "gaussian",
    iou_threshold: float = 0.3,
) -> tuple[Tensor, Tensor]:
    """Apply `soft_nms` to each class on its own, all classes at once.

    >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0]])
    >>> batched_soft_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]))
    (tensor([0, 1]), tensor([0.9000, 0.8000]))

    Args:
        boxes: corners ``(x1, y1, x2, y2)`` in pixels, float [N, 4], x1 <= x2 and y1 <= y2.
        scores: confidences in [0, 1], float [N].
        labels: class of each box, any integers, [N]. Boxes of different classes do not affect each other.
        sigma: see `soft_nms`, as for the other settings.
        score_threshold: boxes whose decayed score is not above this are dropped.
        method: ``gaussian`` or ``linear``.
        iou_threshold: overlap from which the linear decay applies.

    Returns:
        Indices int64 [K] by descending decayed score over all classes, and those scores [K] in the dtype of ``scores``.

    Raises:
        ValueError: if the shapes do not belong together or a setting is out of range.
    """
    _check(boxes, scores, labels, sigma, method)
    dtype = torch.float32 if boxes.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    candidates = torch.where(scores > score_threshold)[0]  # the others would be dropped, and lower none that is kept
    corners = boxes[candidates].to(dtype)
    corners = torch.where(corners.isfinite().all(dim=1, keepdim=True), corners, 0.0)
    slots, counts = _lay_out(labels[candidates])
    size = len(counts), max(counts, default=0)  # classes, boxes in the largest
    padded_boxes, padded_scores = corners.new_zeros(4, size[0] * size[1]), corners.new_zeros(size[0] * size[1])
    padded_boxes[:, slots], padded_scores[slots] = corners.t(), scores[candidates].to(dtype)

    def decay(iou: Tensor) -> Tensor:
        if method == "gaussian":
            return iou.square().div_(-sigma).exp_()
        return torch.where(iou < iou_threshold, 1, 1 - iou)

    decayed = _decay_in_rounds(padded_boxes.view(4, *size), padded_scores.view(size), counts, decay, score_threshold)
    decayed, order = decayed.flatten()[slots].sort(descending=True, stable=True)
    kept = decayed > score_threshold
    return candidates[order[kept]], decayed[kept].to(scores.dtype)


def _lay_out(labels: Tensor) -> tuple[Tensor, list[int]]:
    """Arrange the boxes in a matrix of one class per row, the largest class first.

    Returns:
        Place of each box in the flattened matrix, int64 [N], and the number of boxes in each row.
    """
    _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    order = classes.argsort(stable=True)  # class by class, in which boxes keep their order
    begin = counts.cumsum(0) - counts
    column = torch.empty_like(order)
    column[order] = torch.arange(len(order), device=order.device) - begin[classes[order]]
    counts, by_size = counts.sort(descending=True, stable=True)
    row = torch.empty_like(by_size)
    row[by_size] = torch.arange(len(by_size), device=by_size.device)
    sizes: list[int] = counts.tolist()
    return row[classes] * max(sizes, default=0) + column, sizes


def _decay_in_rounds(
    boxes: Tensor, scores: Tensor, counts: list[int], decay: Callable[[Tensor], Tensor], score_threshold: float
) -> Tensor:
    """Decayed scores [classes, N] of the boxes taken before the best score falls to the threshold, -inf for others.

    Args:
        boxes: corners, [4, classes, N]; a row's boxes come first, and what follows is ignored.
        scores: [classes, N].
        counts: boxes in each row, descending.
        decay: factor for an overlap.
        score_threshold: lowest score, exclusive, at which to go on.
    """
    scores, result = scores.clone(), torch.full_like(scores, -torch.inf)
    rows, columns = (torch.arange(n, device=scores.device) for n in scores.shape)
    taken = columns >= scores.new_tensor(counts)[:, None]
    has_table = boxes[0].numel() * len(columns) < _TABLE_SIZE
    table = decay(_overlap(boxes[..., None], boxes[:, :, None])) if has_table else None
    active = len(counts)
    for number in range(len(columns)):
        while counts[active - 1] <= number:  # the smallest classes, which are last, are done first
            active -= 1
        best_score, best = scores[:active].masked_fill(taken[:active], -torch.inf).max(dim=1, keepdim=True)
        if number % 16 == 0 and not (best_score > score_threshold).any():  # asked rarely, since a GPU must answer
            break
        result[:active].scatter_(1, best, best_score)
        taken[:active].scatter_(1, best, True)
        if table is not None:
            factor = table[rows[:active], best[:, 0]]
        else:
            here = boxes[:, :active]
            factor = decay(_overlap(here.gather(2, best.expand(4, -1, -1)), here))
        scores[:active] *= factor
    return result


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes [4, ...], zero where they do not meet."""
    width = (torch.minimum(one[2], other[2]) - torch.maximum(one[0], other[0])).clamp_(min=0)
    height = (torch.minimum(one[3], other[3]) - torch.maximum(one[1], other[1])).clamp_(min=0)
    intersection = width.mul_(height)
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return intersection.div_(areas.sub_(intersection).clamp_(min=torch.finfo(one.dtype).tiny))  # 0 / tiny, not 0 / 0


def _check(boxes: Tensor, scores: Tensor, labels: Tensor, sigma: float, method: str) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4], but their shape is {list(boxes.shape)}")
    for name, tensor in (("scores", scores), ("labels", labels)):
        if tensor.shape != boxes.shape[:1]:
            raise ValueError(
                f"{name} must be [{len(boxes)}], one for each box, but their shape is {list(tensor.shape)}"
            )
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}; it must be above 0, as the paper's 0.5")
    if method not in ("gaussian", "linear"):
        raise ValueError(f"method is {method!r}; choose 'gaussian' or 'linear'")
