"""Time a prediction and a training step of Faster R-CNN side by side with torchvision's around the same backbone.

    python benchmarks/detectors.py                     # ConvNeXt-T at 480 x 640
    python benchmarks/detectors.py --size 800 1333 --repeats 3

Both have the same weights, float32. A training step is two images, forward, backward and AdamW. "Plain layers" is this
package with ``nn.Conv2d`` in place of `DepthwiseConv2d`.
"""

import copy
import functools

import torch
from torch import Tensor, nn
from torchvision.models import detection

from lightning_convnext_det import FasterRCNN
from lightning_convnext_det.ops.depthwise_conv import DepthwiseConv2d
from lightning_convnext_det.types import Target
from side_by_side import Contestants, compare, create_parser, print_header

CLASSES = 80


def with_plain_layers(net: nn.Module) -> nn.Module:
    """A copy with torch's own convolutions."""
    plain = copy.deepcopy(net)
    for layer in plain.modules():
        if isinstance(layer, DepthwiseConv2d):
            layer.__class__ = nn.Conv2d
    return plain


def create_peer(ours: FasterRCNN, size: tuple[int, int]) -> nn.Module:
    """Torchvision's Faster R-CNN with the backbone, the anchors and the weights of ours; its background is class 0."""
    backbone = with_plain_layers(ours.backbone)
    backbone.out_channels = 256
    anchors = detection.rpn.AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    peer = detection.FasterRCNN(
        backbone, CLASSES + 1, min(size), max(size), rpn_anchor_generator=anchors, box_detections_per_img=100
    )
    peer.load_state_dict(ours.state_dict())
    return peer


def create_batch(size: tuple[int, int], count: int, first_label: int) -> tuple[list[Tensor], list[Target]]:
    chance = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=chance) for _ in range(count)]
    corners = torch.rand(count, 8, 2, generator=chance) * torch.tensor([size[1] - 130.0, size[0] - 130.0])
    sides = 20 + torch.rand(count, 8, 2, generator=chance) * 100
    labels = torch.randint(CLASSES, (count, 8), generator=chance) + first_label
    boxes = torch.cat([corners, corners + sides], dim=2)
    return images, [Target(boxes=b, labels=x) for b, x in zip(boxes, labels, strict=True)]


def predict(net: nn.Module, images: list[Tensor]) -> None:
    net.eval()
    with torch.inference_mode():
        net(images)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, images: list[Tensor], targets: list[Target]) -> None:
    net.train()
    optimizer.zero_grad()
    sum(net(images, targets).values()).backward()
    optimizer.step()


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), help="height and width of the images")
    parser.add_argument("--backbone", default="convnext_tiny")
    parser.add_argument("--only", choices=("prediction", "training"), default=None)
    parser.set_defaults(threads=1, clock="cpu", repeats=3)
    options = parser.parse_args()
    print_header(f"Faster R-CNN {options.backbone}", options, ("torchvision", "timm"))
    size = tuple(options.size)
    torch.manual_seed(0)
    ours = FasterRCNN(CLASSES, options.backbone, min_size=min(size), max_size=max(size))
    nets = {"torchvision": create_peer(ours, size), "here, plain layers": with_plain_layers(ours), "here": ours}
    shape = f"{size[0]} x {size[1]}"
    if options.only != "training":
        images, _ = create_batch(size, 1, 0)
        runs: Contestants = {name: functools.partial(predict, net, images) for name, net in nets.items()}
        compare(f"prediction {shape}", runs, options)
    if options.only != "prediction":
        runs = {}
        for name, net in nets.items():
            batch = create_batch(size, 2, int(name == "torchvision"))
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
            runs[name] = functools.partial(train, net, optimizer, *batch)
        compare(f"training step {shape}", runs, options)


if __name__ == "__main__":
    main()
