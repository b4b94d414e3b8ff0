"""Time several ways to do the same thing in one run, turn by turn, and print them as rows of a Markdown table.

A loaded machine slows all contestants of a turn alike, so the ratios within a turn are steadier than the times; both
are printed as medians over the turns. Under heavy load, ``--threads 1 --clock cpu`` counts the process's own time.
"""

import datetime
import os
import platform
import statistics
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

Contestants = dict[str, Callable[[], object]]


def create_parser(description: str | None) -> ArgumentParser:
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the CPU")
    parser.add_argument("--repeats", type=int, default=7, help="turns per row")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: time spent on this process alone"
    )
    return parser


def print_header(title: str, options: Namespace, packages: tuple[str, ...] = ()) -> None:
    torch.set_num_threads(options.threads)
    on_cpu = f"{_processor()}, threads: {options.threads}, {options.clock} time"
    machine = torch.cuda.get_device_name() if options.device == "cuda" else on_cpu
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", *packages))
    print(f"# {title}\n\n{datetime.date.today()}, {machine}, Python {platform.python_version()}, {versions}.")
    print("Medians over turns in which the contestants alternate; the ratio is to the first of the row.\n")
    print("| | contestant | ms | ratio | peak MB on the GPU |\n|---|---|---:|---:|---:|", flush=True)


def compare(name: str, contestants: Contestants, options: Namespace) -> None:
    """Print one line per contestant: milliseconds, ratio to the first, and on a GPU the peak of memory in use."""
    device, clock = options.device, time.process_time if options.clock == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    peaks = dict.fromkeys(contestants, 0.0)
    counts = {contestant: _count_calls(call, device, clock) for contestant, call in contestants.items()}
    for _ in range(options.repeats):
        for contestant, call in contestants.items():
            seconds, peaks[contestant] = _measure(call, counts[contestant], device, clock)
            times[contestant].append(seconds)
    first = next(iter(times.values()))
    for contestant, own in times.items():
        ratio = statistics.median(mine / base for mine, base in zip(own, first, strict=True))
        peak = f"{peaks[contestant]:.0f}" if device == "cuda" else ""
        print(f"| {name} | {contestant} | {statistics.median(own) * 1e3:.2f} | {ratio:.3f} | {peak} |", flush=True)
        name = ""


def _count_calls(call: Callable[[], object], device: str, clock: Callable[[], float]) -> int:
    """Warm up, and find how many calls take a twentieth of a second."""
    call()
    seconds, _ = _measure(call, 1, device, clock)
    return max(1, min(200, round(0.05 / max(seconds, 1e-6))))


def _measure(call: Callable[[], object], count: int, device: str, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds per call, and the peak of memory in MB beyond what was in use."""
    if device != "cuda":
        start = clock()
        for _ in range(count):
            call()
        return (clock() - start) / count, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), clock()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (clock() - start) / count, (torch.cuda.max_memory_allocated() - before) / 2**20


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
