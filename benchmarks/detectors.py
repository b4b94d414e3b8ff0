"""Time a prediction and a training step of Faster R-CNN side by side with torchvision's around the same backbone.

    python benchmarks/detectors.py                     # ConvNeXt-T at 480 x 640
    python benchmarks/detectors.py --size 800 1333 --repeats 3
    python benchmarks/detectors.py --device cuda --size 800 1333 --batch 16 --precision bf16 --repeats 5
    python benchmarks/detectors.py --only prediction --files     # also OpenVINO's, in fp32 and int8

Both have the same weights. A training step is forward, backward and AdamW of a batch. "Plain layers" is this package
with torch's and timm's layers in place of its own; on a GPU the two are one, and "compiled" is ``compile=True``. There,
images per second and the share of the GPU's rate in matrix products that the step reaches are printed as well:
floating-point operations of convolutions and products, counted by torch, without those of pooling and NMS.
"""

import copy
import functools
import tempfile
import time
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from timm.layers.grn import GlobalResponseNorm
from timm.layers.mlp import GlobalResponseNormMlp, Mlp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import detection

from lightning_convnext_det import FasterRCNN
from lightning_convnext_det.inference.export.graph import ExportGraph, record
from lightning_convnext_det.inference.export.onnx_file import write_onnx
from lightning_convnext_det.inference.export.openvino_folder import write_openvino
from lightning_convnext_det.inference.export.runtimes import load_runner
from lightning_convnext_det.models.mlp import BlockMlp, BlockResponseNormMlp
from lightning_convnext_det.models.response_norm import ResponseNorm
from lightning_convnext_det.modules.compiled import compile_parts
from lightning_convnext_det.ops.depthwise_conv import DepthwiseConv2d
from lightning_convnext_det.types import Target
from side_by_side import Contestants, compare, create_parser, print_header

CLASSES = 80


PLAIN = {
    DepthwiseConv2d: nn.Conv2d,
    BlockMlp: Mlp,
    BlockResponseNormMlp: GlobalResponseNormMlp,
    ResponseNorm: GlobalResponseNorm,
}


def with_plain_layers(net: nn.Module) -> nn.Module:
    """A copy with torch's and timm's own layers."""
    plain = copy.deepcopy(net)
    for layer in plain.modules():
        layer.__class__ = PLAIN.get(type(layer), type(layer))
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


def create_batch(size: tuple[int, int], count: int, first_label: int, device: str) -> tuple[list[Tensor], list[Target]]:
    chance = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=chance).to(device) for _ in range(count)]
    corners = torch.rand(count, 8, 2, generator=chance) * torch.tensor([size[1] - 130.0, size[0] - 130.0])
    sides = 20 + torch.rand(count, 8, 2, generator=chance) * 100
    labels = torch.randint(CLASSES, (count, 8), generator=chance) + first_label
    boxes = torch.cat([corners, corners + sides], dim=2).to(device)
    return images, [Target(boxes=b, labels=x) for b, x in zip(boxes, labels.to(device), strict=True)]


def autocast(options: Namespace) -> AbstractContextManager[None]:
    return torch.autocast(options.device, torch.bfloat16) if options.precision == "bf16" else nullcontext()


def predict(net: nn.Module, images: list[Tensor], options: Namespace) -> None:
    net.eval()
    with torch.inference_mode(), autocast(options):
        net(images)


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: list[Tensor],
    targets: list[Target],
    options: Namespace,
) -> None:
    net.train()
    optimizer.zero_grad()
    with autocast(options):
        loss = sum(net(images, targets).values())
    loss.backward()
    optimizer.step()


def print_rate(step: functools.partial[None], compiled: functools.partial[None], batch: int) -> None:
    """Images per second of a training step on the GPU, and its floating-point operations against large products."""
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    limit = 2 * side**3 / min(seconds(functools.partial(torch.mm, a, b)) for _ in range(10))
    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops()
    print(f"\nA step has {operations / 1e12:.1f} TFLOP; products of {side} x {side} in bfloat16 reach "
          f"{limit / 1e12:.0f} TFLOP/s.")  # fmt: skip
    for name, call in (("here", step), ("here, compiled", compiled)):
        own = min(seconds(call) for _ in range(5))
        print(
            f"{name}: {batch / own:.0f} images/s, {operations / own / 1e12:.0f} TFLOP/s, {operations / own / limit:.0%}"
        )


def seconds(call: functools.partial[object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def create_files(ours: FasterRCNN, size: tuple[int, int]) -> Contestants:
    """Predictions of one image by OpenVINO; int8 is calibrated on noise, which decides nothing about the time."""
    images = [torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8) for _ in range(4)]
    runs: Contestants = {}
    with tempfile.TemporaryDirectory() as folder:
        between = Path(folder) / "detector.onnx"
        write_onnx(record(ExportGraph(ours), torch.cat(images)), between, {})
        for precision in ("fp32", "int8"):
            path = Path(folder) / f"{precision}_openvino"
            write_openvino(between, path, {}, precision, images)  # type: ignore[arg-type]  # one of the two
            runs[f"OpenVINO {precision}"] = functools.partial(load_runner(path), images[0])
    return runs


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), help="height and width of the images")
    parser.add_argument("--batch", type=int, default=None, help="images (default: 1 in prediction, 2 in training)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of autocast")
    parser.add_argument("--backbone", default="convnext_tiny")
    parser.add_argument("--only", choices=("prediction", "training"), default=None)
    parser.add_argument("--files", action="store_true", help="also predict one image by OpenVINO in fp32 and int8")
    parser.set_defaults(threads=1, clock="cpu", repeats=3)
    options = parser.parse_args()
    if options.device == "cuda":
        options.clock = "wall"
    print_header(f"Faster R-CNN {options.backbone}, {options.precision}", options, ("torchvision", "timm"))
    size = tuple(options.size)
    torch.manual_seed(0)
    ours = FasterRCNN(CLASSES, options.backbone, min_size=min(size), max_size=max(size))
    nets = {"torchvision": create_peer(ours, size), "here, plain layers": with_plain_layers(ours), "here": ours}
    if options.device == "cuda":
        del nets["here, plain layers"]
        nets["here, compiled"] = copy.deepcopy(ours)
        compile_parts(nets["here, compiled"])
    nets = {name: net.to(options.device) for name, net in nets.items()}
    shape = f"{size[0]} x {size[1]}"
    if options.only != "training":
        images, _ = create_batch(size, options.batch or 1, 0, options.device)
        runs: Contestants = {name: functools.partial(predict, net, images, options) for name, net in nets.items()}
        if options.files:
            runs |= create_files(ours.eval(), size)
        compare(f"prediction of {len(images)}, {shape}", runs, options)
    if options.only != "prediction":
        runs = {}
        for name, net in nets.items():
            batch = create_batch(size, options.batch or 2, int(name == "torchvision"), options.device)
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
            runs[name] = functools.partial(train, net, optimizer, *batch, options)
        compare(f"training step of {len(batch[0])}, {shape}", runs, options)
        if options.device == "cuda":
            print_rate(runs["here"], runs["here, compiled"], len(batch[0]))


if __name__ == "__main__":
    main()
