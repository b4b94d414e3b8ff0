"""Cascade R-CNN against Faster R-CNN: time of a prediction and of a training step, and the peak of memory on the CPU.

Both have the same backbone, pyramid and proposals; Cascade R-CNN with heads of two fully connected layers, and with the
ConvNeXt authors' of four convolutions. On a GPU, ``--device cuda`` prints its peak of memory in the same table.

    python benchmarks/cascade.py [--backbone convnext_tiny] [--sides 480 640]
"""

import multiprocessing
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_convnext_det import create_detector
from lightning_convnext_det.types import Target
from side_by_side import compare, create_parser, print_header

DETECTORS: dict[str, dict[str, object]] = {
    "Faster R-CNN": {"name": "fasterrcnn_fpn", "convention": "mmdetection"},
    "Cascade R-CNN, two_fc": {"name": "cascadercnn_fpn", "box_head": "two_fc"},
    "Cascade R-CNN, four_conv": {"name": "cascadercnn_fpn", "box_head": "four_conv"},
}


def create_step(training: bool, contestant: str, backbone: str, sides: list[int], device: str) -> Callable[[], object]:
    torch.manual_seed(0)
    options = {"min_size": min(sides), "max_size": max(sides), "backbone": backbone, **DETECTORS[contestant]}
    detector = create_detector(num_classes=80, **options).to(device).train(training)
    image = torch.randint(0, 256, (3, *sides), dtype=torch.uint8).to(device)
    corners = torch.rand(8, 2, device=device) * min(sides) * 0.6
    target = Target(boxes=torch.cat((corners, corners + min(sides) * 0.3), 1), labels=torch.arange(8, device=device))
    return partial(_train if training else _predict, detector, [image], [target])


def _train(detector: nn.Module, images: list[Tensor], targets: list[Target]) -> None:
    detector.zero_grad()
    torch.stack(list(detector(images, targets).values())).sum().backward()


@torch.no_grad()
def _predict(detector: nn.Module, images: list[Tensor], targets: list[Target]) -> None:
    detector(images)


def _peak(queue: "multiprocessing.Queue[float]", *arguments: object) -> None:
    torch.set_num_threads(1)
    step = create_step(*arguments)  # type: ignore[arg-type]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far becomes the present size; man 5 proc
    before = _resident_peak()
    step()
    queue.put(_resident_peak() - before)


def _resident_peak() -> float:
    """MB that this process has had at most in memory. The peak of ``getrusage`` is the parent's, if that is larger."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "no VmHWM in /proc/self/status"
    return int(found.group(1)) / 1024


def print_memory(chosen: list[str], backbone: str, sides: list[int]) -> None:
    """Print the memory that one step of a fresh process takes beyond the network itself."""
    print("\n| | contestant | MB beyond the network, CPU |\n|---|---|---:|")
    context = multiprocessing.get_context("spawn")
    for name, training in (("prediction", False), ("training step", True)):
        for contestant in chosen:
            queue = context.Queue()
            process = context.Process(target=_peak, args=(queue, training, contestant, backbone, sides, "cpu"))
            process.start()
            print(f"| {name} | {contestant} | {queue.get():.0f} |", flush=True)
            process.join()


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--backbone", default="convnext_tiny", help="timm name")
    parser.add_argument("--sides", type=int, nargs=2, default=[480, 640], help="height and width of the image")
    parser.add_argument(
        "--heads",
        nargs="+",
        default=["two_fc", "four_conv"],
        help="of Cascade R-CNN; four_conv takes its time on a CPU",
    )
    options = parser.parse_args()
    chosen = [c for c in DETECTORS if DETECTORS[c].get("box_head", "two_fc") in options.heads]
    print_header("Cascade R-CNN and Faster R-CNN", options, ("torchvision", "timm"))
    for name, training in (("prediction", False), ("training step", True)):
        steps = {c: create_step(training, c, options.backbone, options.sides, options.device) for c in chosen}
        compare(name, steps, options)
    if options.device == "cpu" and Path("/proc/self/clear_refs").exists():
        print_memory(chosen, options.backbone, options.sides)


if __name__ == "__main__":
    main()
