"""Time and memory of DINO beside two-stage Deformable DETR and Hugging Face's RT-DETR, on ResNet-50 from random weights.

Every contestant gets the same random images, square and already resized, with ten objects each. A row gives the seconds
of a training step (losses, gradients, no optimizer) and of a prediction, the best of several, and the peak memory of the
process above what it held before the first step. Each contestant runs in a process of its own.

    python benchmarks/dino.py                                   # CPU, 320 x 320, batches of 2, float32
    PYTHONPATH=PEER python benchmarks/dino.py --clock cpu       # on a machine that is busy with other things

RT-DETR needs transformers; it may lie in a folder PEER of its own (``pip install --target PEER transformers``).
"""

import argparse
import importlib.util
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_convnext_det import DINO, DeformableDETR
from lightning_convnext_det.types import Target

CONTESTANTS = ("dino", "dino_300", "deformable_detr", "rt_detr")


def create_images(options: argparse.Namespace) -> tuple[list[Tensor], list[Target]]:
    """Draw images and their objects."""
    generator = torch.Generator().manual_seed(0)
    side = options.size
    images = [torch.rand(3, side, side, generator=generator) for _ in range(options.batch)]
    targets: list[Target] = []
    for _ in images:
        corner = torch.rand(10, 2, generator=generator) * side * 0.6
        extent = torch.rand(10, 2, generator=generator) * side * 0.3 + 8
        labels = torch.randint(80, (10,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + extent], 1), "labels": labels})
    return images, targets


def create_ours(name: str, options: argparse.Namespace) -> tuple[nn.Module, Callable[[], Tensor], Callable[[], object]]:
    """Build a detector of this package: the network, its loss and its prediction."""
    sizes = {"backbone": "resnet50", "min_size": options.size, "max_size": options.size}
    detector: nn.Module
    if name == "deformable_detr":
        detector = DeformableDETR(80, two_stage=True, num_queries=300, **sizes)
    else:
        detector = DINO(80, out_norm=False, num_queries=300 if name == "dino_300" else 900, **sizes)
    images, targets = create_images(options)
    return detector, lambda: sum(detector(images, targets).values(), torch.zeros(())), lambda: detector(images)


def create_rt_detr(options: argparse.Namespace) -> tuple[nn.Module, Callable[[], Tensor], Callable[[], object]]:
    """Build Hugging Face's RT-DETR of its default configuration (ResNet-50, 300 queries, 100 denoising queries)."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    detector = RTDetrForObjectDetection(RTDetrConfig(num_labels=80))
    images, targets = create_images(options)
    batch, side = torch.stack(images), options.size
    labels = []
    for target in targets:
        low, high = target["boxes"][:, :2] / side, target["boxes"][:, 2:] / side
        labels.append({"class_labels": target["labels"], "boxes": torch.cat([(low + high) / 2, high - low], 1)})
    return detector, lambda: detector(batch, labels=labels).loss, lambda: detector(batch)


def measure(name: str, options: argparse.Namespace) -> None:
    """Print the row of a contestant."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    create = create_rt_detr if name == "rt_detr" else lambda options: create_ours(name, options)
    detector, compute_loss, predict = create(options)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter

    def best(run: Callable[[], object]) -> float:
        times = []
        for _ in range(options.repeats + 1):  # the first warms up
            start = clock()
            run()
            times.append(clock() - start)
        return min(times[1:])

    def step() -> None:
        detector.zero_grad()
        compute_loss().backward()

    before = peak_memory()
    detector.eval()
    with torch.no_grad():
        predicting = best(predict)
    predicted = peak_memory()
    detector.train()
    training = best(step)
    parameters = sum(p.numel() for p in detector.parameters()) / 1e6
    cells = (f"{parameters:.1f}", f"{training:.2f}", f"{peak_memory() - before:.2f}")
    print(f"| {name} | {' | '.join(cells)} | {predicting:.2f} | {predicted - before:.2f} |", flush=True)


def peak_memory() -> float:
    """Peak memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CONTESTANTS, help="measure one contestant in this process")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="seconds of the wall or the process")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.only:
        measure(options.only, options)
        return
    print(f"torch {torch.__version__}, {options.batch} x {options.size} x {options.size}, {options.clock} time")
    print("| detector | million parameters | step, s | step, GB | prediction, s | prediction, GB |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    for name in CONTESTANTS:
        if name == "rt_detr" and importlib.util.find_spec("transformers") is None:
            print("RT-DETR is left out: transformers is not installed")
        else:
            subprocess.run([sys.executable, __file__, "--only", name, *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
