"""Continuing a training as if it had not been interrupted.

The images of a step are a function of seed and epoch (`data.sampler`), their random changes of seed, epoch and
image (`data.dataset`). Here, whatever else draws random numbers in a step (drop path, the sampling of proposals) is
made a function of seed, epoch, step and process, and no state of a generator has to be saved.
"""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info


class ExactResume(Callback):
    """Seeds the generators of torch, NumPy and Python anew at each step, and keeps the seed in checkpoints.

    The seed is that of torch's generator when the training begins: what ``seed_everything`` was given. Learning rate
    and weight decay are those that the module was built with, also where they differ from the checkpoint's.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self._given: list[dict[str, float]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the seed, unless a checkpoint has brought one, and the learning rates."""
        if self.seed is None:
            self.seed = int(trainer.strategy.broadcast(torch.initial_seed()))
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._given = [{"lr": g.get("initial_lr", g["lr"]), "weight_decay": g.get("weight_decay", 0.0)} for g in groups]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go to the place in the epoch, and put the learning rates given in the place of the checkpoint's."""
        # Lightning 2.6 does this when it makes the loader, which a schedule that counts the steps has made too early
        trainer.fit_loop._load_combined_loader_states()
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        bases: list[Any] = [c.scheduler for c in trainer.lr_scheduler_configs if hasattr(c.scheduler, "base_lrs")]
        changed = set()
        for i, (group, given) in enumerate(zip(groups, self._given, strict=True)):
            restored = group.get("initial_lr", group["lr"])
            if restored != given["lr"]:
                changed.add(f"learning rate {given['lr']:g} replaces {restored:g}")
                group["lr"] *= given["lr"] / restored if restored else 0.0
                group["initial_lr"] = given["lr"]
                for schedule in bases[:1]:
                    schedule.base_lrs[i] = given["lr"]
            if group.get("weight_decay", 0.0) != given["weight_decay"]:
                changed.add(f"weight decay {given['weight_decay']:g} replaces {group['weight_decay']:g}")
                group["weight_decay"] = given["weight_decay"]
        for line in sorted(changed):
            rank_zero_info(f"{line}, the checkpoint's")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators."""
        assert self.seed is not None
        seed_step(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)

    def state_dict(self) -> dict[str, int | None]:
        """The seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, int | None]) -> None:
        """Take the seed of a checkpoint."""
        self.seed = state_dict["seed"]


def seed_step(seed: int, epoch: int, step: int, process: int) -> None:
    """Seed the global generators of torch, on all devices, NumPy and Python for one step of one process."""
    words = np.random.SeedSequence((seed, epoch, step, process)).generate_state(4, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))  # int64
    random.seed(int(words[1]))
    np.random.seed(words[2:].view(np.uint32))  # noqa: NPY002  # the global one, for those who draw from it
