"""Box coders (boxes as deltas of other boxes, R-CNN, arXiv:1311.2524, appendix C), torchvision's and MMDetection's."""

import math

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from lightning_convnext_det.models.rcnn.conventions import BoxCoding
from lightning_convnext_det.ops.host_numbers import send

Stds = tuple[float, float, float, float]
_MAX_LOG_RATIO = abs(math.log(16 / 1000))  # the same limit in both


def create_box_coder(stds: Stds, coding: BoxCoding) -> BoxCoder:
    """Build the coder of deltas (x, y, width, height) that are divided by ``stds`` in training."""
    return StdBoxCoder(stds) if coding == "mmdetection" else WeightBoxCoder(_weights(stds))


def _weights(stds: Stds) -> tuple[float, ...]:
    return tuple(round(1 / std, 6) for std in stds)  # 10.0 for 0.1, as torchvision writes them


class WeightBoxCoder(BoxCoder):
    """torchvision's box coder, to the bit, with its weights as numbers: as tensors they make the host wait for a GPU.

    >>> coder = WeightBoxCoder((10.0, 10.0, 5.0, 5.0))
    >>> coder.decode_single(torch.tensor([[5.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 8.0, 4.0]]))
    tensor([[ 4.,  0., 12.,  4.]])
    """

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Express boxes [N, 4] as deltas [N, 4] of proposals [N, 4]."""
        deltas, sides = [], []
        for axis, (weight, side_weight) in enumerate(zip(self.weights[:2], self.weights[2:], strict=True)):
            size, target = (b[:, axis + 2] - b[:, axis] for b in (proposals, reference_boxes))
            centre, moved = proposals[:, axis] + 0.5 * size, reference_boxes[:, axis] + 0.5 * target
            deltas.append(weight * (moved - centre) / size)
            sides.append(side_weight * torch.log(target / size))
        return torch.stack((*deltas, *sides), dim=1)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Move boxes [N, 4] by deltas [N, 4 * K] to boxes [N, 4 * K]."""
        boxes, low, high = boxes.to(rel_codes.dtype), [], []
        for axis, (weight, side_weight) in enumerate(zip(self.weights[:2], self.weights[2:], strict=True)):
            size = boxes[:, axis + 2] - boxes[:, axis]
            centre = boxes[:, axis] + 0.5 * size
            moved = rel_codes[:, axis::4] / weight * size[:, None] + centre[:, None]
            half = 0.5 * ((rel_codes[:, axis + 2 :: 4] / side_weight).clamp(max=_MAX_LOG_RATIO).exp() * size[:, None])
            low.append(moved - half)
            high.append(moved + half)
        return torch.stack((*low, *high), dim=2).flatten(1)


class StdBoxCoder(BoxCoder):
    """MMDetection's box coder: multiplies by standard deviations, and limits how much a side may shrink, too.

    >>> coder = StdBoxCoder((0.1, 0.1, 0.2, 0.2))
    >>> coder.decode_single(torch.tensor([[5.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 8.0, 4.0]]))
    tensor([[ 4.,  0., 12.,  4.]])

    Args:
        stds: standard deviations of the deltas (x, y, width, height).
    """

    def __init__(self, stds: Stds) -> None:
        super().__init__(_weights(stds))
        self.stds = stds

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Express boxes [N, 4] as deltas [N, 4] of proposals [N, 4]."""
        sizes, targets = proposals[:, 2:] - proposals[:, :2], reference_boxes[:, 2:] - reference_boxes[:, :2]
        centres, moved = ((b[:, :2] + b[:, 2:]) * 0.5 for b in (proposals, reference_boxes))
        deltas = torch.cat(((moved - centres) / sizes, (targets / sizes).log()), dim=1)
        return deltas / send(self.stds, deltas.device, deltas.dtype)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Move boxes [N, 4] by deltas [N, 4 * K] to boxes [N, 4 * K]."""
        deltas = rel_codes.reshape(rel_codes.shape[0], rel_codes.shape[1] // 4, 4)  # [N, K, 4]
        deltas = deltas * send(self.stds, deltas.device, deltas.dtype)
        boxes = boxes.to(rel_codes.dtype)
        centres, sizes = (boxes[:, :2] + boxes[:, 2:]) * 0.5, boxes[:, 2:] - boxes[:, :2]
        centres = centres[:, None] + sizes[:, None] * deltas[..., :2]
        half = sizes[:, None] * deltas[..., 2:].clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp() * 0.5
        return torch.cat((centres - half, centres + half), dim=2).flatten(1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes [..., 4] to images of (height, width) ``sizes`` [..., 2].

    >>> clip_boxes(torch.tensor([[-1.0, 2.0, 9.0, 9.0]]), torch.tensor([[4, 8]]))
    tensor([[0., 2., 8., 4.]])
    """
    limits = torch.cat((sizes.flip(-1), sizes.flip(-1)), dim=-1).to(boxes)
    return torch.minimum(boxes.clamp(min=0), limits)
