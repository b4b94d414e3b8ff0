"""Between detections of fixed shapes, as exporters need them, and one `Detection` per image.

Rows beyond the number of detections are made zero by multiplication: what is not finite stays so, for the check.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_convnext_det.errors import DivergenceError
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
