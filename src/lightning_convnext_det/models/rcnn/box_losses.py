"""Box losses of proposals and detections: smooth L1 or L1 of the deltas, or GIoU of the decoded boxes.

All are given box by box; the caller adds those of objects and divides by the number of samples.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from lightning_convnext_det.models.rcnn.conventions import BoxLoss, ProposalLoss

_GIOU_EPS = 1e-7  # torchvision.ops.generalized_box_iou_loss

DeltaLoss = Callable[[Tensor, Tensor], Tensor]
"""Takes predicted deltas [P, 4] and wanted ones [P, 4], returns the loss of each box and delta [P, 4]."""


def create_delta_loss(kind: ProposalLoss, beta: float = 1 / 9) -> DeltaLoss:
    """Build a loss of deltas; below a difference of ``beta``, ``smooth_l1`` is quadratic."""
    if kind == "l1":
        return partial(F.l1_loss, reduction="none")
    return partial(F.smooth_l1_loss, beta=beta, reduction="none")


def create_box_loss(kind: BoxLoss, coder: BoxCoder, beta: float) -> "EncodedBoxLoss | DecodedBoxLoss":
    """Build a loss of deltas [P, 4] that should move boxes [P, 4] to the ground truth [P, 4]."""
    return DecodedBoxLoss(coder) if kind == "giou" else EncodedBoxLoss(coder, create_delta_loss(kind, beta))


class EncodedBoxLoss:
    """Compares predicted deltas with those of the ground truth.

    Args:
        coder: encodes the ground truth.
        loss: compares the deltas.
    """

    def __init__(self, coder: BoxCoder, loss: DeltaLoss) -> None:
        self.coder, self.loss = coder, loss

    def __call__(self, deltas: Tensor, boxes: Tensor, ground_truth: Tensor) -> Tensor:
        """Compute the loss of each box, [P], from deltas, boxes and ground truth, each [P, 4]."""
        return self.loss(deltas, self.coder.encode_single(ground_truth, boxes)).sum(dim=1)


class DecodedBoxLoss:
    """Compares moved boxes with the ground truth by their generalised IoU (arXiv:1902.09630).

    Args:
        coder: decodes the predicted deltas.
    """

    def __init__(self, coder: BoxCoder) -> None:
        self.coder = coder

    def __call__(self, deltas: Tensor, boxes: Tensor, ground_truth: Tensor) -> Tensor:
        """Compute the loss of each box, [P], from deltas, boxes and ground truth, each [P, 4]."""
        return generalized_iou_loss(self.coder.decode_single(deltas, boxes), ground_truth)


def generalized_iou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute 1 - GIoU of pairs of boxes (x1, y1, x2, y2), float [P].

    As ``torchvision.ops.generalized_box_iou_loss``, which selects the pairs that overlap by a mask and so makes the
    host wait for a GPU.

    >>> generalized_iou_loss(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, 2.0, 1.0]]))
    tensor([0.5000])
    """
    sides = torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])
    intersection = torch.where((sides > 0).all(dim=1), _area(sides), 0.0)
    union = _area(boxes[:, 2:] - boxes[:, :2]) + _area(others[:, 2:] - others[:, :2]) - intersection
    hull = _area(torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2]))
    return 1 - (intersection / (union + _GIOU_EPS) - (hull - union) / (hull + _GIOU_EPS))


def _area(sides: Tensor) -> Tensor:
    return sides[:, 0] * sides[:, 1]  # the gradient of prod() would look for zeros on the host
