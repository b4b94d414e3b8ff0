"""A training step under Lightning's Trainer against a bare loop over the same model and batches.

Both run in turns in one process, and the ratio of the medians is printed:

    python benchmarks/trainer_overhead.py [--steps 20] [--rounds 5]
"""

import argparse
import logging
import statistics
import time
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch.utils.data import DataLoader

from lightning_convnext_det import FasterRCNNModule
from lightning_convnext_det.modules.detection import Batch


class Clock(pl.Callback):
    """Notes the time at the end of each training batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter())


def create_module() -> FasterRCNNModule:
    torch.manual_seed(0)
    return FasterRCNNModule(
        3,
        backbone="convnext_atto",
        min_size=240,
        max_size=320,
        fpn_channels=128,
        box_head_features=256,
        schedule="constant",
    )


def create_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        images = [torch.randint(0, 256, (3, 240, 320), dtype=torch.uint8, generator=generator) for _ in range(4)]
        corner = [torch.rand(6, 2, generator=generator) * 150 for _ in range(4)]
        targets = [{"boxes": torch.cat([c, c + 60], 1), "labels": torch.arange(6) % 3} for c in corner]
        batches.append((images, targets))
    return batches


def time_bare_loop(batches: list[Batch]) -> list[float]:
    module = create_module()
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=1e-4)
    times = []
    for images, targets in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(module.detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter())
    return times


def time_trainer(batches: list[Batch]) -> list[float]:
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=1,
        callbacks=[clock, RichProgressBar()],
        logger=True,
        default_root_dir="/tmp/trainer_overhead",
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = DataLoader(batches, batch_size=None, generator=torch.Generator())
    trainer.fit(create_module(), loader)
    return clock.times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(2)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    batches = create_batches(options.steps + 3)
    ratios = []
    for _ in range(options.rounds):
        bare, trainer = (
            statistics.median(b - a for a, b in zip(times[2:], times[3:], strict=False))
            for times in (time_bare_loop(batches), time_trainer(batches))
        )
        ratios.append(trainer / bare)
        print(f"bare loop {bare * 1e3:.0f} ms, Trainer {trainer * 1e3:.0f} ms, ratio {trainer / bare:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
