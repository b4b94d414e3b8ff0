"""Time RoIAlign against torchvision's, side by side in one run: the operator, the pooler, and Faster R-CNN with each.

    python benchmarks/roi_align.py                    # CPU
    python benchmarks/roi_align.py --device cuda      # where `roi_align` is torchvision's: shows what the pooler adds
    python benchmarks/roi_align.py --no-detector      # without Faster R-CNN ConvNeXt-T

The operator pools 1,000 boxes of 16 to 500 pixels from 256 channels of 120 x 160 at stride 4. torchvision has no half
precision on the CPU: there its contestant casts to float32 and back, as autocast makes it do.
"""

import os
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor

from lightning_convnext_det.models.zoo import create_detector
from lightning_convnext_det.ops.roi_align import MultiScaleRoIAlign, roi_align
from side_by_side import Contestants, compare, create_parser, print_header

Pool = Callable[[Tensor], Tensor]


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--no-detector", action="store_true", help="leave Faster R-CNN out")
    parser.add_argument(
        "--detector-dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="what Faster R-CNN computes in; float32 on processors that only emulate bfloat16",
    )
    parser.add_argument("--only-detector", action="store_true", help="leave the operator out")
    options = parser.parse_args()
    print_header("RoIAlign", options, ("torchvision",))
    if not options.only_detector:
        time_operator(options)
    if not options.no_detector:
        time_detector(options)


def time_operator(options: Namespace) -> None:
    torch.manual_seed(0)
    rois = torch.cat((torch.zeros(1000, 1), create_boxes(1000, 480, 640)), dim=1).to(options.device)
    for name, dtype, memory_format, ratio in (
        ("float32", torch.float32, torch.contiguous_format, 2),
        ("float32, channels last", torch.float32, torch.channels_last, 2),
        ("bfloat16, channels last", torch.bfloat16, torch.channels_last, 2),
        ("float32, sampling_ratio 0", torch.float32, torch.contiguous_format, 0),
    ):
        features = torch.randn(1, 256, 120, 160, dtype=dtype, device=options.device).to(memory_format=memory_format)
        poolers: dict[str, Pool] = {
            "torchvision": lambda x, r=ratio: torchvision.ops.roi_align(x.float(), rois, 7, 0.25, r).to(x.dtype),
            "ours": lambda x, r=ratio: roi_align(x, rois, 7, 0.25, r),
        }
        time_forward_and_backward(name, poolers, features, options)
    time_pyramid(options)


def create_boxes(count: int, height: int, width: int) -> Tensor:
    centres = torch.rand(count, 2) * torch.tensor([width, height])
    half = torch.rand(count, 2) * 242 + 8
    return torch.cat((centres - half, centres + half), dim=1)


def time_forward_and_backward(name: str, poolers: dict[str, Pool], features: Tensor, options: Namespace) -> None:
    with torch.no_grad():
        forward: Contestants = {who: lambda pool=pool: pool(features) for who, pool in poolers.items()}
        compare(f"{name}, forward", forward, options)
    features = features.requires_grad_()
    grad = torch.randn_like(poolers["torchvision"](features).detach())
    both: Contestants = {
        who: lambda pool=pool: torch.autograd.grad(pool(features), features, grad) for who, pool in poolers.items()
    }
    compare(f"{name}, forward and backward", both, options)


def time_pyramid(options: Namespace) -> None:
    """1,000 boxes of an image of 800 x 1,088 over four levels, flattened as the box head does."""
    maps = OrderedDict(
        (str(i), torch.randn(1, 256, 200 >> i, 272 >> i, device=options.device).to(memory_format=torch.channels_last))
        for i in range(4)
    )
    boxes = [create_boxes(1000, 800, 1088).clamp(0, 800).to(options.device)]
    names = ["0", "1", "2", "3"]
    poolers = {"torchvision": torchvision.ops.MultiScaleRoIAlign(names, 7, 2), "ours": MultiScaleRoIAlign(names, 7, 2)}
    with torch.no_grad():
        contestants: Contestants = {
            who: lambda pool=pool: pool(maps, boxes, [(800, 1088)]).flatten(1) for who, pool in poolers.items()
        }
        compare("pooler, four levels, forward", contestants, options)


def time_detector(options: Namespace) -> None:
    """Predict one image and train on two with Faster R-CNN ConvNeXt-T, random weights."""
    torch.manual_seed(0)
    detector = create_detector("fasterrcnn_convnext_tiny_fpn", num_classes=80).to(options.device)
    images = [torch.rand(3, 480, 640, device=options.device) for _ in range(2)]
    boxes = torchvision.ops.clip_boxes_to_image(create_boxes(20, 480, 640), (480, 640))
    boxes = boxes[torchvision.ops.remove_small_boxes(boxes, 8)][:10].to(options.device)
    targets = [{"boxes": boxes, "labels": torch.arange(10, device=options.device)} for _ in images]
    disabled = {"with torchvision's": "1", "with ours": "0"}

    def use(value: str, training: bool) -> None:
        os.environ["DISABLE_CUSTOM_KERNELS"] = value
        detector.train(training)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.detector_dtype == "bfloat16"):
            if not training:
                with torch.no_grad():
                    detector(images[:1])
                return
            loss = sum(detector(images, targets).values())
        loss.backward()
        detector.zero_grad()

    for name, training in (("prediction", False), ("training step, batch 2", True)):
        contestants: Contestants = {who: lambda v=value, t=training: use(v, t) for who, value in disabled.items()}
        compare(f"Faster R-CNN ConvNeXt-T, {options.detector_dtype}, {name}", contestants, options)


if __name__ == "__main__":
    main()
