"""Hard NMS of many groups at once as a Triton kernel, for CUDA, without waiting for the GPU.

Imported only where Triton is installed. One program takes one group with all its boxes, so that the groups run side by
side; torchvision's kernel takes one list after the other, and reads its matrix of overlaps by a single block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_GROUP = 8192  # boxes of a group that a program holds in registers: 64 a thread


def nms_by_triton(boxes: Tensor, valid: Tensor, starts: Tensor, largest: int, iou_threshold: float) -> Tensor:
    """Return which boxes hard NMS keeps, each group on its own, bool [N].

    Takes CPU tensors only under Triton's interpreter (``TRITON_INTERPRET=1``), which is for tests.

    Args:
        boxes: corners (x1, y1, x2, y2), float [N, 4], group after group, by descending score within each.
        valid: which boxes take part, bool [N].
        starts: first box of each group, and N at the end, int64 [G + 1].
        largest: at least as many boxes as the largest group has, at most ``LARGEST_GROUP``.
        iou_threshold: IoU above which the box with the lower score is dropped.
    """
    groups = len(starts) - 1
    keep = torch.zeros(len(boxes), dtype=torch.int8, device=boxes.device)
    if groups and len(boxes):
        block = max(16, triton.next_power_of_2(largest))
        # neither fused multiply-adds nor a fast division: an IoU equal to the threshold is judged as on the CPU
        _kernel[(groups,)](
            boxes.to(torch.float32).contiguous(),
            valid.to(torch.int8).contiguous(),
            starts,
            keep,
            iou_threshold,
            BLOCK=block,
            num_warps=max(1, min(16 if block > 4096 else 8, block // 128)),
            enable_fp_fusion=False,
        )
    return keep.to(torch.bool)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(boxes, valid, starts, keep, iou_threshold, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.load(starts + tl.program_id(0))
    count = (tl.load(starts + tl.program_id(0) + 1) - start).to(tl.int32)
    index = tl.arange(0, BLOCK)
    inside = index < count
    corner = boxes + (start + index) * 4
    left, top = tl.load(corner, mask=inside, other=0.0), tl.load(corner + 1, mask=inside, other=0.0)
    right, bottom = tl.load(corner + 2, mask=inside, other=0.0), tl.load(corner + 3, mask=inside, other=0.0)
    area = (right - left) * (bottom - top)
    alive = tl.load(valid + start + index, mask=inside, other=0).to(tl.int32)
    for best in range(count):
        if tl.max(tl.where(index == best, alive, 0), axis=0) > 0:
            own = boxes + (start + best) * 4
            x1, y1, x2, y2 = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
            width = tl.maximum(tl.minimum(right, x2) - tl.maximum(left, x1), 0.0)
            height = tl.maximum(tl.minimum(bottom, y2) - tl.maximum(top, y1), 0.0)
            shared = width * height
            overlaps = tl.div_rn(shared, (x2 - x1) * (y2 - y1) + area - shared) > iou_threshold
            alive = tl.where(overlaps & (index > best), 0, alive)
    tl.store(keep + start + index, alive.to(tl.int8), mask=inside)
