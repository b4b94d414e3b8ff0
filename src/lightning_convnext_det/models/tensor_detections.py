"""Between detections of fixed shapes, as exporters need them, and one `Detection` per image.

Rows beyond the number of detections are made zero by multiplication: what is not finite stays so, for the check.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_convnext_det.errors import DivergenceError
from lightning_convnext_det.ops.host_numbers import send
from lightning_convnext_det.types import Detection, TensorDetections


def split_detections(found: TensorDetections) -> list[Detection]:
    """Return the detections of each image, with one transfer from the device.

    >>> boxes = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 0.0, 0.0]]])
    >>> found = TensorDetections(boxes, torch.tensor([[0.5, 0.0]]), torch.tensor([[1, 0]]), torch.tensor([1]))
    >>> split_detections(found)
    [{'boxes': tensor([[0., 0., 8., 8.]]), 'labels': tensor([1]), 'scores': tensor([0.5000])}]

    Raises:
        DivergenceError: if a score or box is not finite.
    """
    finite = torch.stack([found.scores.isfinite().all(), found.boxes.isfinite().all()])
    *counts, has_scores, has_boxes = torch.cat([found.count, finite.to(found.count)]).tolist()
    for name, is_finite in (("scores", has_scores), ("boxes", has_boxes)):
        if not is_finite:
            raise DivergenceError(f"[LCD-N001] the {name} are not finite: the weights have diverged or are damaged")
    return [
        Detection(boxes=found.boxes[i, :n], labels=found.labels[i, :n], scores=found.scores[i, :n])
        for i, n in enumerate(counts)
    ]


def join_detections(detections: Sequence[Detection], rows: int) -> TensorDetections:
    """Join the detections of several images into tensors of ``rows`` rows per image.

    >>> found = Detection(boxes=torch.ones(1, 4), labels=torch.tensor([2]), scores=torch.tensor([0.5]))
    >>> join_detections([found], 3).scores
    tensor([[0.5000, 0.0000, 0.0000]])
    """
    missing = [rows - d["scores"].shape[0] for d in detections]
    boxes = [F.pad(d["boxes"], (0, 0, 0, n)) for d, n in zip(detections, missing, strict=True)]
    scores = [F.pad(d["scores"], (0, n)) for d, n in zip(detections, missing, strict=True)]
    labels = [F.pad(d["labels"], (0, n)) for d, n in zip(detections, missing, strict=True)]
    count = send([d["scores"].shape[0] for d in detections], scores[0].device)
    return TensorDetections(torch.stack(boxes), torch.stack(scores), torch.stack(labels), count)


def keep_first(boxes: Tensor, scores: Tensor, labels: Tensor, count: Tensor, rows: int) -> TensorDetections:
    """Keep the first ``count`` [B] rows of boxes [B, N, 4], scores and labels [B, N], filled up with zeros.

    >>> boxes, scores, labels = torch.ones(1, 2, 4), torch.tensor([[0.9, 0.1]]), torch.tensor([[3, 4]])
    >>> keep_first(boxes, scores, labels, torch.tensor([1]), rows=3).scores
    tensor([[0.9000, 0.0000, 0.0000]])
    """
    kept = torch.arange(scores.shape[1], device=scores.device) < count[:, None]  # [B, N]
    missing = rows - scores.shape[1]
    return TensorDetections(
        F.pad(boxes * kept[..., None].to(boxes), (0, 0, 0, missing)),
        F.pad(scores * kept.to(scores), (0, missing)),
        F.pad(labels * kept.to(labels), (0, missing)),
        count,
    )
