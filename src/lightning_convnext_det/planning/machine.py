"""What a training can use of the machine: cores, memory, accelerators, and how fast each precision is."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lightning_convnext_det.planning.precision import Rates, measure_rates

Accelerator = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Machine:
    """A machine that trains.

    Attributes:
        cores: that this process may use.
        memory: bytes of one device: of the accelerator, or of the machine on a CPU.
        accelerator: kind of the devices.
        devices: how many of them train together, on all nodes.
        bfloat16: whether the devices have arithmetic for bfloat16.
        rates: measured speed in both precisions; None where nothing is measured, as on several devices, which must
            all come to the same plan.
        nodes: machines of this kind, each with its share of the devices.
    """

    cores: int
    memory: int
    accelerator: Accelerator = "cpu"
    devices: int = 1
    bfloat16: bool = False
    rates: Rates | None = None
    nodes: int = 1

    @property
    def is_cpu(self) -> bool:
        """Whether there is no accelerator."""
        return self.accelerator == "cpu"


def find_machine(accelerator: str = "auto", devices: object = "auto", num_nodes: int = 1) -> Machine:
    """Find out what this machine has; a single device's precisions are timed for about a second.

    Args:
        accelerator: as for Lightning's Trainer; what is no CPU, CUDA or MPS counts as CUDA.
        devices: as for Lightning's Trainer: a number, a list, ``auto`` or -1.
        num_nodes: machines of this kind.
    """
    kind: Accelerator = "cpu"
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        kind = "cuda"
    elif accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        kind = "mps"
    elif accelerator not in ("auto", "cpu", "gpu", "cuda", "mps"):
        kind = "cuda"
    nodes = max(1, num_nodes)
    count = _count(devices, kind) * nodes
    memory = torch.cuda.get_device_properties(0).total_memory if kind == "cuda" and torch.cuda.is_available() else 0
    native = _has_bfloat16(kind)
    alone = count == 1 and not any(name in os.environ for name in ("LOCAL_RANK", "RANK", "SLURM_NTASKS"))
    rates = measure_rates(kind) if native and alone else None
    return Machine(_cores(), memory or _memory(), kind, count, native, rates, nodes)


def _count(devices: object, kind: Accelerator) -> int:
    if isinstance(devices, list | tuple):
        return max(1, len(devices))
    text = str(devices)
    if text in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if kind == "cuda" else 1
    if text.isdigit():
        return max(1, int(text))
    return max(1, len([part for part in text.split(",") if part.strip()]))


def _has_bfloat16(kind: Accelerator) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "mps":
        return False
    # torch has no public name for this (2.15); without it a convolution takes up to 30 times as long
    return platform.machine() in ("x86_64", "AMD64") and torch.cpu._is_avx512_bf16_supported()


def _cores() -> int:
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available is not None else os.cpu_count() or 1


def _memory() -> int:
    """Bytes of the machine's memory, or of the control group that limits it."""
    sizes = []
    try:
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows
        sizes.append(8 * 2**30)
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return min(sizes)
