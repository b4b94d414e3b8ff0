"""Time the whole Deformable DETR side by side with birder's, the same weights in both, and DINO of the same backbone.

    python benchmarks/deformable_detr.py                       # CPU, 640 x 640, batch 1, float32 and bfloat16
    python benchmarks/deformable_detr.py --compile             # also under torch.compile
    python benchmarks/deformable_detr.py --threads 1 --clock cpu           # on a machine that is busy with other things
    python benchmarks/deformable_detr.py --device cuda --batch 8 --train   # forward and backward, with peak memory

Needs the extra ``parity``; on a GPU birder builds its own kernels first. Training is a forward and backward pass of the
network without matching and losses. DINO has 900 queries and ConvNeXt V2-T, without denoising; birder has no DINO.
"""

import argparse
import functools
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lightning_convnext_det import DINO
from lightning_convnext_det.convert.deformable_detr import convert_deformable_detr
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
from side_by_side import Contestants, compare, create_parser, print_header

Run = Callable[[], tuple[Tensor, Tensor]]


def create_networks(device: str) -> tuple[nn.Module, DeformableDETR]:
    """Build birder's network of the published checkpoint from random weights, and ours with the same weights."""
    if device == "cpu":
        os.environ["DISABLE_CUSTOM_KERNELS"] = "1"  # birder has no kernel for the CPU, but would look for a compiler
    from birder.model_registry import registry

    torch.manual_seed(0)
    backbone = registry.net_factory("convnext_v2_tiny", 0)
    theirs = registry.detection_net_factory("deformable_detr_boxref", 91, backbone, size=(640, 640))
    os.environ.pop("DISABLE_CUSTOM_KERNELS", None)
    converted = convert_deformable_detr(theirs.state_dict())
    ours = DeformableDETR(**converted.arguments)
    ours.load_state_dict(converted.state_dict)
    return theirs.to(device), ours.to(device)


def create_runs(options: argparse.Namespace, batch: Tensor) -> dict[str, Run]:
    theirs, ours = create_networks(options.device)
    dino = DINO(91, "convnextv2_tiny").to(options.device)
    for net in (theirs, ours, dino):
        net.train(options.train)
    forward, predict, predict_dino = theirs.forward_net, ours.predict, dino.predict
    runs: dict[str, Run] = {
        "birder": lambda: forward(batch, None),
        "here": lambda: predict(batch).decoder,
        "DINO here": lambda: predict_dino(batch).decoder,
    }
    if options.compile:
        compiled, compiled_dino = torch.compile(predict), torch.compile(predict_dino)
        runs["birder, compiled"] = functools.partial(torch.compile(forward), batch, None)
        runs["here, compiled"] = lambda: compiled(batch).decoder
        runs["DINO here, compiled"] = lambda: compiled_dino(batch).decoder
    return runs


def run_once(run: Run, dtype: torch.dtype, options: argparse.Namespace) -> None:
    autocast = torch.autocast(options.device, dtype) if dtype != torch.float32 else nullcontext()
    with autocast, torch.set_grad_enabled(options.train):
        logits, boxes = run()
        total = logits.float().sum() + boxes.float().sum()
    if options.train:
        total.backward()


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also compile the networks")
    parser.add_argument("--train", action="store_true", help="forward and backward in training mode")
    parser.set_defaults(repeats=5)
    options = parser.parse_args()
    batch = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    runs = create_runs(options, batch)
    print_header("Deformable DETR on ConvNeXt V2-T", options, ("birder", "timm"))
    task = "forward and backward" if options.train else "prediction"
    for dtype in (torch.float32, torch.bfloat16):
        contestants: Contestants = {
            name: functools.partial(run_once, run, dtype, options) for name, run in runs.items()
        }
        name = f"{task} of {options.batch}, {options.size} x {options.size}, {str(dtype).removeprefix('torch.')}"
        compare(name, contestants, options)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # birder and its imports are talkative
    main()
