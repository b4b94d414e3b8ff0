"""Speed of both precisions, measured with the kinds of products and convolutions that a detector on ConvNeXt has.

An instruction set says little: on one processor with AVX512-BF16 but without AMX, bfloat16 products run at half the
speed of float32 (84 against 157 GFLOP/s), on another at twice the speed.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_convnext_det.ops.depthwise_conv import DepthwiseConv2d

MIN_GAIN = 1.05  # of bfloat16 over float32: less is no more than the noise of a measurement of a second
_SECONDS = 0.4  # for each precision
_LEAST_PASSES = 3


class Rates(NamedTuple):
    """Forward and backward passes per second."""

    float32: float
    bfloat16: float

    @property
    def gain(self) -> float:
        """How many times as fast bfloat16 is."""
        return self.bfloat16 / self.float32


class _Block(nn.Module):
    """A ConvNeXt block (depthwise 7 x 7, two products), a convolution of the pyramid and a layer of the box head."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.pyramid = nn.Conv2d(width, 64, 3, padding=1)
        self.head = nn.Linear(64 * 49, 256)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + self.narrow(nn.functional.gelu(self.wide(y))).permute(0, 3, 1, 2)
        maps = self.pyramid(x)
        pooled = nn.functional.adaptive_avg_pool2d(maps, 56).reshape(-1, 64 * 49)  # 128 boxes
        loss: Tensor = self.head(pooled).float().square().mean() + maps.float().square().mean()
        return loss


@cache  # a notebook's second training has the same machine
def measure_rates(device: str, seconds: float = _SECONDS) -> Rates:
    """Time forward and backward passes in float32 and under bfloat16 autocast, in turns, each for some seconds.

    Other programs must not decide: the fastest pass counts, and on a CPU the processor's time of one thread, since
    threads that wait for others also use it.
    """
    clock, threads = time.process_time if device == "cpu" else time.perf_counter, torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else threads)
    try:
        return _measure(device, seconds, clock)
    finally:
        torch.set_num_threads(threads)


def _measure(device: str, seconds: float, clock: Callable[[], float]) -> Rates:
    with torch.random.fork_rng(devices=[]):  # the run's random numbers do not depend on whether this is measured
        block = _Block().to(torch.device(device)).to(memory_format=torch.channels_last)
        images = torch.randn(2, 96, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for half in (False, True):
        _step(block, images, device, half)  # choice of kernels, first use of memory
    while min(sum(times) for times in taken.values()) < seconds or len(taken[True]) < _LEAST_PASSES:
        half = sum(taken[True]) < sum(taken[False])
        start = clock()
        _step(block, images, device, half)
        taken[half].append(clock() - start)
    return Rates(1 / min(taken[False]), 1 / min(taken[True]))


def _step(block: nn.Module, images: Tensor, device: str, half: bool) -> None:
    with torch.autocast(device, torch.bfloat16, enabled=half):
        loss: Tensor = block(images)
    torch.autograd.backward(loss)
    block.zero_grad(set_to_none=True)
    float(loss.detach())  # waits for the device
