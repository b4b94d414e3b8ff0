"""Time the whole Deformable DETR side by side with birder's, the same weights in both, alternating run by run.

    python benchmarks/deformable_detr.py                       # CPU, 640 x 640, batch 1, float32 and bfloat16
    python benchmarks/deformable_detr.py --compile             # also under torch.compile
    python benchmarks/deformable_detr.py --threads 1 --clock cpu           # on a machine that is busy with other things
    python benchmarks/deformable_detr.py --device cuda --batch 8 --train   # forward and backward, with peak memory

Needs the extra ``parity``. Every line is one precision: best and median time of both, and the ratio of the best times.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lightning_convnext_det.convert.deformable_detr import convert_deformable_detr
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR

Run = Callable[[], tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="seconds of the wall or of the process"
    )
    parser.add_argument("--compile", action="store_true", help="also compile both networks")
    parser.add_argument("--train", action="store_true", help="forward and backward in training mode")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    theirs, ours = create_networks(options.device)
    theirs.train(options.train)
    ours.train(options.train)
    batch = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    print(f"{tuple(batch.shape)} on {options.device}, {options.threads} threads, torch {torch.__version__}")
    print(f"{'':22}{'birder best':>12}{'median':>9}{'ours best':>12}{'median':>9}{'ratio':>8}   peak memory")
    for compiled in (False, True) if options.compile else (False,):
        runs = create_runs(theirs, ours, batch, compiled)
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{str(dtype).removeprefix('torch.')}{' compiled' if compiled else ''}"
            compare(name, runs, dtype, options)


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


def create_runs(theirs: nn.Module, ours: DeformableDETR, batch: Tensor, compiled: bool) -> list[Run]:
    forward, predict = theirs.forward_net, ours.predict
    if compiled:
        forward, predict = torch.compile(forward), torch.compile(predict)
    return [lambda: forward(batch, None), lambda: predict(batch).decoder]


def compare(name: str, runs: list[Run], dtype: torch.dtype, options: argparse.Namespace) -> None:
    times: list[list[float]] = [[] for _ in runs]
    peaks = [0.0 for _ in runs]
    for repeat in range(options.repeats + 1):
        for i, run in enumerate(runs):
            seconds, peak = measure(run, dtype, options)
            if repeat:  # the first run warms up
                times[i].append(seconds)
                peaks[i] = peak
    best, median = [min(t) for t in times], [statistics.median(t) for t in times]
    line = "".join(f"{b:>12.3f}{m:>9.3f}" for b, m in zip(best, median, strict=True))
    memory = f"{peaks[0]:.2f} / {peaks[1]:.2f} GiB" if options.device != "cpu" else "-"
    print(f"{name:22}{line}{best[1] / best[0]:>8.2f}   {memory}", flush=True)


def measure(run: Run, dtype: torch.dtype, options: argparse.Namespace) -> tuple[float, float]:
    """Time one run in seconds, and its peak memory in GiB on a GPU."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    on_gpu = options.device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = clock()
    autocast = torch.autocast(options.device, dtype) if dtype != torch.float32 else nullcontext()
    with autocast, torch.set_grad_enabled(options.train):
        logits, boxes = run()
        total = logits.float().sum() + boxes.float().sum()
    if options.train:
        total.backward()
    if on_gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return clock() - start, peak


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # birder and its imports are talkative
    main()
