"""Callback that resumes a training with the results it would have had without the interruption.

The images of a step are a function of seed and epoch (`data.sampler`), their augmentations of seed, epoch and image
(`data.dataset`). Here, whatever else draws random numbers in a step (drop path, the sampling of proposals) is made a
function of seed, epoch, step and rank, and no state of a generator has to be saved.
"""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR


class ExactResume(Callback):
    """Seeds the generators of torch, NumPy and Python at each step, and keeps the seed in checkpoints.

    The seed is that of torch's generator when the training begins: what ``seed_everything`` was given. Learning rate
    and weight decay are those that the module was built with, also where they differ from the checkpoint's; what a
    schedule has made of them is continued.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self._given: list[dict[str, float]] = []  # to the optimizers, before a schedule changed it
        self._restored: list[dict[str, float]] | None = None  # the same of the checkpoint

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the seed, unless a checkpoint has brought one, and the learning rates."""
        if self.seed is None:
            self.seed = int(trainer.strategy.broadcast(torch.initial_seed()))
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._given = [
            {"lr": float(g.get("initial_lr", g["lr"])), "weight_decay": float(g.get("weight_decay", 0.0))}
            for g in groups
        ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move to the step within the epoch, and replace the checkpoint's learning rates by those given."""
        # Lightning 2.6 does this when it makes the loader, which a schedule that counts the steps has made too early
        trainer.fit_loop._load_combined_loader_states()
        restored, self._restored = self._restored, None
        if restored is not None and len(restored) == len(self._given):
            self._replace_rates(trainer, restored)
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                _recompute(config.scheduler)

    def _replace_rates(self, trainer: pl.Trainer, restored: list[dict[str, float]]) -> None:
        groups = [(optimizer, i) for optimizer in trainer.optimizers for i in range(len(optimizer.param_groups))]
        changed = set()
        for (optimizer, i), given, before in zip(groups, self._given, restored, strict=True):
            group = optimizer.param_groups[i]
            if before["lr"] != given["lr"]:
                changed.add(f"learning rate {given['lr']:g} replaces {before['lr']:g}")
                group["lr"] *= given["lr"] / before["lr"] if before["lr"] else 0.0
                if "initial_lr" in group:
                    group["initial_lr"] = given["lr"]
                for config in trainer.lr_scheduler_configs:
                    schedule: Any = config.scheduler
                    if schedule.optimizer is optimizer and hasattr(schedule, "base_lrs"):
                        schedule.base_lrs[i] = given["lr"]
            if before["weight_decay"] != given["weight_decay"]:
                changed.add(f"weight decay {given['weight_decay']:g} replaces {before['weight_decay']:g}")
                group["weight_decay"] = given["weight_decay"]
        for line in sorted(changed):
            rank_zero_info(f"{line}, the checkpoint's")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the random generators for this step."""
        assert self.seed is not None
        seed_step(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)

    def state_dict(self) -> dict[str, Any]:
        """Return the seed, and the learning rates and weight decays that the training was given."""
        return {"seed": self.seed, "given": [dict(group) for group in self._given]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore seed and learning rates from a checkpoint."""
        self.seed, self._restored = state_dict["seed"], state_dict.get("given")


def _recompute(schedule: LambdaLR) -> None:
    """Recompute the learning rates for the next step; they differ if the training is longer now."""
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed the global generators of torch, on all devices, NumPy and Python for one step of one rank."""
    words = np.random.SeedSequence((seed, epoch, step, rank)).generate_state(4, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))  # int64
    random.seed(int(words[1]))
    np.random.seed(words[2:].view(np.uint32))  # noqa: NPY002  # the global one, for those who draw from it
