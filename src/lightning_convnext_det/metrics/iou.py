"""Intersection over union in float64, with COCO's rule for crowd regions: the share of the box inside the region."""

import numpy as np
from numpy.typing import NDArray


def pairwise_iou(
    boxes: NDArray[np.float64], others: NDArray[np.float64], is_crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """IoU of boxes [D, 4] with boxes [G, 4], corners.

    Returns:
        In [0, 1], float64 [D, G]; 0 where both areas are 0.
    """
    return _iou(boxes[:, None], others[None], None if is_crowd is None else is_crowd[None])


def paired_iou(
    boxes: NDArray[np.float64], others: NDArray[np.float64], is_crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """IoU of each box with the box of the same row, [N]."""
    return _iou(boxes, others, is_crowd)


def _iou(
    boxes: NDArray[np.float64], others: NDArray[np.float64], is_crowd: NDArray[np.bool_] | None
) -> NDArray[np.float64]:
    width = np.minimum(boxes[..., 2], others[..., 2]) - np.maximum(boxes[..., 0], others[..., 0])
    height = np.minimum(boxes[..., 3], others[..., 3]) - np.maximum(boxes[..., 1], others[..., 1])
    common = width.clip(min=0) * height.clip(min=0)
    own, theirs = ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (boxes, others))
    union = own + theirs - common
    if is_crowd is not None:
        union = np.where(is_crowd, own, union)
    iou: NDArray[np.float64] = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return iou
