"""Time Soft-NMS against birder's, side by side in one run, on boxes that overlap in clusters of about ten.

python benchmarks/soft_nms.py
python benchmarks/soft_nms.py --device cuda       # birder's compiled CUDA kernel
"""

import os
import warnings
from functools import partial

import torch
from torch import Tensor

from lightning_convnext_det.ops.soft_nms import batched_soft_nms
from side_by_side import Contestants, compare, create_parser, print_header

SIGMA, SCORE_THRESHOLD = 0.5, 1e-3


def main() -> None:
    options = create_parser(__doc__).parse_args()
    print_header("Soft-NMS", options, ("birder",))
    if options.device == "cpu":
        os.environ["DISABLE_CUSTOM_KERNELS"] = "1"
    from birder.ops.soft_nms import SoftNMS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        birder = SoftNMS()
    for count, classes in ((100, 80), (1000, 80), (5000, 80), (300, 1), (1000, 1)):
        boxes, scores, labels = (tensor.to(options.device) for tensor in create_boxes(count, classes))
        contestants: Contestants = {
            "birder's": partial(birder, boxes, scores, labels, SIGMA, SCORE_THRESHOLD),
            "ours": partial(batched_soft_nms, boxes, scores, labels, SIGMA, SCORE_THRESHOLD),
        }
        compare(f"{count:,} boxes, {classes} classes", contestants, options)


def create_boxes(count: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    centres = torch.rand(max(1, count // 10), 2) * 600
    centre = centres[torch.randint(len(centres), (count,))] + torch.randn(count, 2) * 10
    half = torch.rand(count, 2) * 60 + 10
    return torch.cat((centre - half, centre + half), dim=1), torch.rand(count), torch.randint(classes, (count,))


if __name__ == "__main__":
    main()
