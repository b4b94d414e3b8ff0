"""Box losses of proposals and detections: smooth L1 or L1 of the deltas, or GIoU of the decoded boxes.

All are sums; the caller divides by the number of samples.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import generalized_box_iou_loss

from lightning_convnext_det.models.rcnn.conventions import BoxLoss, ProposalLoss

DeltaLoss = Callable[[Tensor, Tensor], Tensor]
"""Takes predicted deltas [P, 4] and wanted ones [P, 4], returns a scalar."""


def create_delta_loss(kind: ProposalLoss, beta: float = 1 / 9) -> DeltaLoss:
    """Build a loss of deltas; below a difference of ``beta``, ``smooth_l1`` is quadratic."""
    if kind == "l1":
        return partial(F.l1_loss, reduction="sum")
    return partial(F.smooth_l1_loss, beta=beta, reduction="sum")


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
        """Sum the loss over deltas, boxes and ground truth, each [P, 4]."""
        return self.loss(deltas, self.coder.encode_single(ground_truth, boxes))


class DecodedBoxLoss:
    """Compares moved boxes with the ground truth by their generalised IoU (arXiv:1902.09630).

    Args:
        coder: decodes the predicted deltas.
    """

    def __init__(self, coder: BoxCoder) -> None:
        self.coder = coder

    def __call__(self, deltas: Tensor, boxes: Tensor, ground_truth: Tensor) -> Tensor:
        """Sum the loss over deltas, boxes and ground truth, each [P, 4]."""
        moved = self.coder.decode_single(deltas, boxes)
        loss: Tensor = generalized_box_iou_loss(moved, ground_truth, reduction="sum")
        return loss
