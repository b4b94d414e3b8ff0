"""How time and memory of detectors grow: exponents over area, batch, classes, queries and objects.

    python benchmarks/scaling.py [--backbone convnext_atto] [--only faster] > benchmarks/results/cpu/scaling.md

One quantity at a time is doubled, the others stay. An exponent is the slope between the last two sizes in a logarithmic
plot: 1 is proportional, 0 does not grow. Seconds of CPU, the best of two; memory is what a call adds to the process at
its peak, after freed memory was given back to the system, in which the allocator would hide what small batches need.
"""

import argparse
import ctypes
import gc
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_convnext_det import DINO, DeformableDETR, FasterRCNN
from lightning_convnext_det.metrics.coco_map import DetectionEvaluator

KINDS: dict[str, Callable[..., nn.Module]] = {"faster": FasterRCNN, "deformable": DeformableDETR, "dino": DINO}
CLASSES, BATCH, SIDE = 80, 2, 320


class Cost(NamedTuple):
    """What a call took."""

    seconds: float
    megabytes: float


def measure(call: Callable[[], object]) -> Cost:
    """Best time and largest peak of two calls, after one that warms up."""
    call()
    costs = []
    for _ in range(2):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
        before, begun = resident("VmRSS"), time.process_time()
        call()
        costs.append((time.process_time() - begun, resident("VmHWM") - before))
    return Cost(min(s for s, _ in costs), max(m for _, m in costs))


def resident(key: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) / 1024


def images(number: int, side: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, side, side, generator=generator) for _ in range(number)]


def targets(number: int, objects: int, side: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(objects, 2, generator=generator) * side * 0.8
    boxes = torch.cat([corners, corners + 0.1 * side], 1)
    return [{"boxes": boxes, "labels": torch.arange(objects) % CLASSES}] * number


def predict(detector: nn.Module, batch: list[Tensor]) -> object:
    with torch.no_grad():
        return detector.eval()(batch)


def train(detector: nn.Module, batch: list[Tensor], objects: list[dict[str, Tensor]]) -> None:
    detector.zero_grad()
    torch.stack(list(detector.train()(batch, objects).values())).sum().backward()


def rows(kind: str, backbone: str) -> Iterator[tuple[str, list[int], Callable[[int], Callable[[], object]]]]:
    """Name, sizes, and what to call at a size, of each quantity."""

    def create(side: int = SIDE, classes: int = CLASSES, **options: object) -> nn.Module:
        torch.manual_seed(0)
        return KINDS[kind](classes, backbone, min_size=side, max_size=side, **options)

    def predicting(batch: list[Tensor], **options: object) -> Callable[[], object]:
        detector = create(**options)
        return lambda: predict(detector, batch)

    def training(number: int, objects: int) -> Callable[[], object]:
        detector, batch, annotated = create(), images(number, SIDE), targets(number, objects, SIDE)
        return lambda: train(detector, batch, annotated)

    areas = [round(SIDE**2 * 2.0**n) for n in range(-1, 3)]
    yield "area, prediction", areas, lambda n: predicting(images(BATCH, side_of(n)), side=side_of(n))
    yield "batch, prediction", [1, 2, 4, 8], lambda n: predicting(images(n, SIDE))
    yield "batch, training step", [1, 2, 4], lambda n: training(n, 10)
    yield "objects of an image, training step", [16, 64, 256], lambda n: training(BATCH, n)
    yield "classes, prediction", [80, 320, 1280], lambda n: predicting(images(BATCH, SIDE), classes=n)
    if kind != "faster":
        yield "queries, prediction", [100, 300, 900], lambda n: predicting(images(BATCH, SIDE), num_queries=n)


def side_of(area: int) -> int:
    return round(math.sqrt(area) / 32) * 32


def evaluate(number: int) -> Callable[[], object]:
    """Evaluate a number of images with 20 detections and 7 objects each."""
    generator = torch.Generator().manual_seed(0)
    annotated = targets(number, 7, 400)
    boxes = annotated[0]["boxes"][torch.randint(7, (20,), generator=generator)]
    found = {"boxes": boxes + torch.rand(20, 4, generator=generator), "labels": torch.arange(20) % 7}
    detections = [{**found, "scores": torch.rand(20, generator=generator)} for _ in range(number)]

    def call() -> object:
        evaluator = DetectionEvaluator([str(i) for i in range(CLASSES)])
        for start in range(0, number, 16):
            evaluator.update(detections[start : start + 16], annotated[start : start + 16])
        return evaluator.compute()

    return call


def print_row(what: str, sizes: list[int], costs: list[Cost]) -> None:
    growth = math.log(sizes[-1] / sizes[-2])
    exponents = [math.log(max(costs[-1][i], 1e-9) / max(costs[-2][i], 1e-9)) / growth for i in range(2)]
    cells = [", ".join(f"{size:,}" for size in sizes)]
    cells += [", ".join(f"{cost.seconds:.2f}" for cost in costs), f"{exponents[0]:.2f}"]
    cells += [", ".join(f"{cost.megabytes:,.0f}" for cost in costs), f"{exponents[1]:.2f}"]
    print(f"| {what} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="convnext_atto")
    parser.add_argument("--only", choices=[*KINDS, "evaluation"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = Path("/proc/cpuinfo").read_text()
    processor = next((x.partition(": ")[2] for x in text.splitlines() if "model name" in x), platform.machine())
    print(f"{time.strftime('%Y-%m-%d')}, {processor}, torch {torch.__version__}, one thread; {options.backbone}, ")
    print(f"{SIDE}x{SIDE}, batch {BATCH}, {CLASSES} classes where the row says nothing else.\n")
    print("| | sizes | seconds of CPU | exponent | MB added | exponent |\n|---|---|---|---:|---|---:|")
    for kind in KINDS if options.only is None else {options.only} & set(KINDS):
        for what, sizes, create in rows(kind, options.backbone):
            print_row(f"{kind}: {what}", sizes, [measure(create(size)) for size in sizes])
    if options.only in (None, "evaluation"):
        numbers = [1000, 4000, 16000]
        print_row("images, evaluation", numbers, [measure(evaluate(number)) for number in numbers])


if __name__ == "__main__":
    main()
