"""NMS of the boxes of several images at once, and results of fixed shape: what a detector needs to be exported.

Boxes of all images are one list, each with the index of its image, so no shape depends on how the images differ.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torchvision.ops import nms

from lightning_convnext_det.ops.host_numbers import send
from lightning_convnext_det.ops.nms import Separation, grouped_nms
from lightning_convnext_det.ops.tracing import is_recording
from lightning_convnext_det.ops.triton_kernels import has_triton

_LOOPED_GROUPS = 16  # up to so many, an exported graph has one NMS for each
# more boxes than these torchvision takes group by group on the CPU, fewer it moves apart, which rounds (ops/boxes.py)
_LARGEST_MOVED = 1000
_LARGEST_ON_A_GPU = 25000  # torchvision's limit for the same there: time and memory grow with the square


def batch_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    images: Tensor,
    num_images: int,
    iou_threshold: float,
    separation: Separation = "torchvision",
    num_groups: int = 1,
    used: Tensor | None = None,
) -> Tensor:
    """Return the indices of the boxes that hard NMS keeps, each group of each image on its own.

    >>> import torch
    >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 9.0]])
    >>> scores, groups, images = torch.tensor([0.7, 0.8, 0.9]), torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1])
    >>> batch_nms(boxes, scores, groups, images, 2, iou_threshold=0.5)
    tensor([1, 2])

    On CUDA with Triton, all groups go through one kernel. While ``torch.export`` records, there is no loop over images
    either: all boxes go through one NMS (through one for each of up to 16 groups that torchvision's separation may take
    one by one), images side by side. With one image, the result differs from that of the loop by rounding alone, and
    only for more than 16 groups and more than 1000 boxes, or more than 10000 boxes with separation ``offset``. Other
    devices than CPUs do so, too, for up to 25,000 boxes, so that the host waits once, not for every image.

    Args:
        boxes: corners (x1, y1, x2, y2) in pixels, at least 0, float [N, 4].
        scores: confidences or logits, finite, float [N].
        groups: classes or levels 0 ... num_groups - 1, int64 [N].
        images: index of each box's image, int64 [N].
        num_images: how many images there are.
        iou_threshold: IoU above which the one with the lower score is dropped.
        separation: how groups are kept apart, see `grouped_nms`.
        num_groups: how many groups there are.
        used: False on boxes that take no part, bool [N]; None: all do. They may be kept, behind all others.

    Returns:
        Indices of those that are left, int64 [K]; those of one image by descending score.
    """
    if has_kernel(boxes, separation):
        return _nms_on_gpu(boxes, scores, groups, images, (num_images, num_groups), iou_threshold, used)
    if is_recording():
        if used is not None:
            rows = torch.where(used)[0]
            boxes, scores, groups, images = (x[rows] for x in (boxes, scores, groups, images))
        keep = _recorded_nms(boxes, scores, groups, images, num_images, iou_threshold, separation, num_groups)
        return keep if used is None else rows[keep]
    if boxes.device.type != "cpu" and boxes.shape[0] <= _LARGEST_ON_A_GPU:
        return _nms_of_all(boxes, scores, groups, images, iou_threshold, used)
    kept = []
    for image in range(num_images):
        rows = torch.where(images == image if used is None else (images == image) & used)[0]
        kept.append(rows[grouped_nms(boxes[rows], scores[rows], groups[rows], iou_threshold, separation)])
    return torch.cat(kept)


def _nms_on_gpu(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    images: Tensor,
    counts: tuple[int, int],
    iou_threshold: float,
    used: Tensor | None,
) -> Tensor:
    """NMS of all groups side by side, waiting for the GPU twice: for the largest group and for how many are left."""
    from lightning_convnext_det.ops.nms_triton import LARGEST_GROUP, nms_by_triton

    best = scores.sort(descending=True, stable=True).indices
    number = (images * counts[1] + groups)[best]
    number, places = number.sort(stable=True)
    order = best[places]
    starts = torch.searchsorted(number, torch.arange(counts[0] * counts[1] + 1, device=boxes.device))
    largest = int(starts.diff().amax()) if len(boxes) else 0
    if largest > LARGEST_GROUP:
        if used is not None:  # boxes without area drop no other
            boxes = torch.where(used[:, None], boxes, 0.0)
        kept = [rows[nms(boxes[rows], scores[rows], iou_threshold)] for rows in order.tensor_split(starts[1:-1].cpu())]
        keep = torch.zeros_like(images, dtype=torch.bool).index_fill_(0, torch.cat(kept), True)
        keep = keep if used is None else keep & used
    else:
        valid = torch.ones_like(order, dtype=torch.bool) if used is None else used[order]
        kept_in_order = nms_by_triton(boxes[order], valid, starts, largest, iou_threshold)
        keep = torch.empty_like(kept_in_order).scatter_(0, order, kept_in_order)
    by_image = best[images[best].sort(stable=True).indices]
    return by_image[keep[by_image]]


def has_kernel(boxes: Tensor, separation: Separation, largest: int = 0) -> bool:
    """Tell whether one kernel takes all groups where these boxes are; ``largest`` is the size of the largest group."""
    if not boxes.is_cuda or separation != "torchvision" or not has_triton() or is_recording():
        return False
    from lightning_convnext_det.ops.nms_triton import LARGEST_GROUP

    return largest <= LARGEST_GROUP


def nms_of_levels(boxes: Tensor, used: Tensor, lengths: Sequence[int], iou_threshold: float) -> Tensor:
    """Return which boxes hard NMS keeps, each level of each image on its own, where `has_kernel`; nothing waits for it.

    Args:
        boxes: corners (x1, y1, x2, y2) of one level after the other, each by descending score, float [B, K, 4].
        used: False on boxes that take no part, bool [B, K].
        lengths: how many boxes of an image each level has; K in all.
        iou_threshold: IoU above which the one with the lower score is dropped.

    Returns:
        Bool [B, K].
    """
    from lightning_convnext_det.ops.nms_triton import nms_by_triton

    count = used.shape[1]
    ends = [first + end for first in range(0, used.numel(), count) for end in accumulate(lengths)]
    starts = send([0, *ends], boxes.device)
    keep = nms_by_triton(boxes.flatten(0, 1), used.flatten(), starts, max(lengths), iou_threshold)
    return keep.view_as(used)


def group_images(num_images: int, scores: Tensor, separation: Separation) -> list[slice]:
    """Divide images for `batch_nms` where that moves boxes apart, so that they are not too many for one NMS.

    Args:
        num_images: how many images there are.
        scores: of as many boxes in every image, [B, N].
        separation: how groups are kept apart, see `grouped_nms`.
    """
    if is_recording() or scores.device.type == "cpu" or has_kernel(scores, separation):
        return [slice(None)]
    step = max(1, _LARGEST_ON_A_GPU // max(1, scores.shape[1]))
    return [slice(first, first + step) for first in range(0, num_images, step)]


def _nms_of_all(
    boxes: Tensor, scores: Tensor, groups: Tensor, images: Tensor, iou_threshold: float, used: Tensor | None
) -> Tensor:
    """Return what `batch_nms` does by one NMS of boxes that are moved apart; those without area come last and stay."""
    if used is not None:
        boxes = torch.where(used[:, None], boxes, 0.0)
        scores = torch.where(used, scores, torch.finfo(scores.dtype).min)
    keep: Tensor = nms(_move_apart(boxes, groups, images), scores, iou_threshold)
    return keep


def _move_apart(boxes: Tensor, groups: Tensor, images: Tensor) -> Tensor:
    """Move group g of image i by g + i spans to the right and by g down: as grouped_nms if there is one image."""
    span = torch.cat((boxes.flatten(), boxes.new_zeros(1))).amax(0) + 1  # the maximum of nothing is an error
    cells = torch.stack((groups + images, groups), dim=1).repeat(1, 2)
    return boxes + cells.to(boxes) * span


def _recorded_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    images: Tensor,
    num_images: int,
    iou_threshold: float,
    separation: Separation,
    num_groups: int,
) -> Tensor:
    loops = separation == "torchvision" and num_groups <= _LOOPED_GROUPS
    moved_groups = groups
    if loops:
        count = (images[:, None] == torch.arange(num_images, device=images.device)).sum(0)
        moved_groups = torch.where(count[images] > _LARGEST_MOVED, 0, groups)
    moved = _move_apart(boxes, moved_groups, images)
    if loops:
        kept = []
        for group in range(num_groups):
            rows = torch.where(groups == group)[0]
            kept.append(rows[_nms(moved[rows], scores[rows], iou_threshold)])
        keep = torch.cat(kept)
        return keep[scores[keep].sort(descending=True).indices]
    return _nms(moved, scores, iou_threshold)


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Hard NMS that may keep nothing: torchvision declares to torch.export that at least two boxes are left."""
    lonely = boxes.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])  # overlap nothing
    lowest = scores.new_full((2,), torch.finfo(scores.dtype).min)
    keep: Tensor = nms(torch.cat((boxes, lonely)), torch.cat((scores, lowest)), iou_threshold)
    return keep[keep < boxes.shape[0]]


def fill_rows(
    values: Sequence[Tensor], images: Tensor, used: Tensor, num_images: int, length: int
) -> tuple[list[Tensor], Tensor]:
    """Arrange values of several images in tensors with one row for each image.

    >>> import torch
    >>> scores, images = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 0, 1, 1])
    >>> fill_rows([scores], images, torch.tensor([True, True, False, True]), num_images=2, length=3)
    ([tensor([[0.8000, 0.0000, 0.0000],
            [0.9000, 0.6000, 0.0000]])], tensor([1, 2]))

    Args:
        values: each [N, ...]; those of one image in the order wanted.
        images: index of each value's image, int64 [N].
        used: which to take, bool [N].
        num_images: how many images there are.
        length: how many values an image can have; those beyond are dropped.

    Returns:
        For each of ``values`` a tensor [num_images, length, ...] with zeros where an image has no more values, and the
        number of each image's values, int64 [num_images].
    """
    # [B, N] and not [N, B]: GPUs sum along the last axis twenty times as fast
    member = (images == torch.arange(num_images, device=images.device)[:, None]) & used
    place = member.cumsum(1).gather(0, images[None])[0] - 1
    place = torch.where(used & (place < length), place, length)  # one place more, for those that are dropped
    rows = []
    for value in values:
        row = value.new_zeros(num_images, length + 1, *value.shape[1:])
        row[images, place] = value
        rows.append(row[:, :length])
    return rows, member.sum(1).clamp(max=length)
