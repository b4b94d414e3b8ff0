"""Optimizer, parameter groups and learning-rate schedule of detectors and classifiers."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.modules.fused_step import secure_fused_step
from lightning_convnext_det.modules.layer_decay import Layers, find_layers
from lightning_convnext_det.modules.reliable import ReliableModule

# beside all that has one dimension: norms, most layer scales, GRN
_EXEMPT = re.compile(r"(\.bias|pos_embed|relative_position_bias_table|\.gamma|layer_scale\w*)$")


class Backbone(NamedTuple):
    """The timm network inside a detector or classifier."""

    architecture: str
    """Its timm name."""
    net: nn.Module
    prefix: str
    """How the names of its parameters begin in the whole network, with a dot at the end or empty."""


class TrainableModule(ReliableModule):
    """A LightningModule that builds optimizer and schedule from its hyper-parameters; a subclass gives the network."""

    default_backbone_lr_factor = 1.0
    default_gradient_clip: float | None = None
    monitor = "val/map"  # the metric by which the best checkpoint is chosen
    total_steps: float | None = None  # of the training, where it is decided while it runs (TimeBudget)
    _layers: Layers | None = None

    @property
    def network(self) -> nn.Module:
        """The network that learns."""
        raise NotImplementedError

    def find_backbone(self) -> Backbone:
        """Find the timm network in the network."""
        raise NotImplementedError

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer with its parameter groups, and the schedule, which moves with every step."""
        options, scale = self.hparams, self._batch_scale()
        groups = [{**group, "lr": group["lr"] * scale} for group in self.parameter_groups()]
        if options["layer_decay"] is not None:
            rank_zero_info(format_groups(groups))
        optimizer: torch.optim.Optimizer
        if options["optimizer"] == "adamw":
            # the fused step takes a quarter of the time on CPUs. It is set per group: Lightning does not clip gradients
            # in mixed precision if the constructor is asked for it, as if a scaler of gradients were at work
            fused = all(p.device.type == "cpu" for group in groups for p in group["params"]) or None
            groups = [{**group, "fused": fused} for group in groups]
            optimizer = torch.optim.AdamW(groups, lr=options["lr"], weight_decay=options["weight_decay"])
            secure_fused_step(optimizer)
        else:
            optimizer = torch.optim.SGD(groups, lr=options["lr"], momentum=0.9, weight_decay=options["weight_decay"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Group the trainable parameters by learning rate and weight decay.

        Returns:
            Groups for the optimizer, each with a ``name``, ``params``, ``lr`` and ``weight_decay``, and with
            ``layer_decay`` the ``layer``.
        """
        groups: dict[tuple[int | None, float, bool], dict[str, Any]] = {}
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                continue
            decays = parameter.dim() > 1 and not _EXEMPT.search(name)
            key = layer, factor, _ = self._layer_of(name), self.learning_rate_factor(name), decays
            if key not in groups:
                where = "" if layer is None else f"layer {layer}, "
                groups[key] = {
                    "name": f"{where}lr x{factor:.4g}, {'decay' if decays else 'no decay'}",
                    "params": [],
                    "lr": self.hparams["lr"] * factor,
                    "weight_decay": self.hparams["weight_decay"] if decays else 0.0,
                    **({} if layer is None else {"layer": layer}),
                }
            groups[key]["params"].append(parameter)
        return [groups[key] for key in sorted(groups, key=lambda key: -1 if key[0] is None else key[0])]

    def learning_rate_factor(self, name: str) -> float:
        """Say how much slower a parameter of the network learns: by its layer, and by ``backbone_lr_factor``."""
        given, decay = self.hparams["backbone_lr_factor"], self.hparams["layer_decay"]
        factor = 1.0 if decay is None else self.layers.scale(self._inner_name(name), decay)
        if not self.is_in_backbone(name):
            return factor
        default = self.default_backbone_lr_factor if decay is None else 1.0  # the decay takes the default's place
        return factor * float(default if given is None else given)

    def is_in_backbone(self, name: str) -> bool:
        """Say whether a parameter of the network learns with ``backbone_lr_factor``."""
        return self._inner_name(name) is not None

    @property
    def layers(self) -> Layers:
        """The layers of the backbone."""
        if self._layers is None:
            backbone = self.find_backbone()
            self._layers = find_layers(backbone.architecture, backbone.net)
        return self._layers

    def _layer_of(self, name: str) -> int | None:
        if self.hparams["layer_decay"] is None:
            return None
        inner = self._inner_name(name)
        return self.layers.heads if inner is None else self.layers.of_parameter.get(inner, self.layers.heads)

    def _inner_name(self, name: str) -> str | None:
        """The name that a parameter of the network has in its backbone; None if it is not there."""
        prefix = self.find_backbone().prefix
        return name.removeprefix(prefix) if name.startswith(prefix) else None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says; where it says nothing, as the network's paper does."""
        if gradient_clip_val is None:
            gradient_clip_val, gradient_clip_algorithm = self.default_gradient_clip, "norm"
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _batch_scale(self) -> float:
        """The factor of the learning rate for the total batch; it is printed."""
        reference = self.hparams["base_batch_size"]
        if reference is None:
            return 1.0
        size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if size is None:
            raise ArgumentError("base_batch_size needs a data module with a batch_size; give the learning rate itself")
        ranks, accumulated = self.trainer.world_size, self.trainer.accumulate_grad_batches
        total = size * ranks * accumulated
        lr = self.hparams["lr"]
        rank_zero_info(
            f"learning rate {lr:g} x {total} / {reference} = {lr * total / reference:g}: total batch {total} = "
            f"{size} images x {ranks} ranks x {accumulated} accumulated batches"
        )
        return float(total / reference)

    def _steps_per_epoch(self) -> float:
        """Count the optimizer steps of a whole epoch, however early the trainer is to stop."""
        if self.trainer.train_dataloader is None:
            self.trainer.fit_loop.setup_data()  # the trainer's own estimate does so, but not for endless training
        batches = self.trainer.num_training_batches
        return batches if batches == float("inf") else math.ceil(batches / self.trainer.accumulate_grad_batches)

    def _learning_rate_factor(self) -> Callable[[int], float]:
        options: dict[str, Any] = dict(self.hparams)
        estimated = self.trainer.estimated_stepping_batches
        milestones = options["milestones"] or []
        steps_per_epoch = self._steps_per_epoch() if milestones else 0
        drops = [epoch * steps_per_epoch for epoch in milestones]

        def factor(step: int) -> float:
            total = self.total_steps or estimated
            warmup = min(options["warmup_steps"], total / 10)
            if step < warmup:
                return float((step + 1) / (warmup + 1))
            if options["schedule"] == "step":
                return float(options["step_factor"] ** sum(step >= drop for drop in drops))
            if options["schedule"] == "cosine" and total != float("inf"):
                progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
                return 0.5 * (1 + math.cos(math.pi * progress))
            return 1.0

        return factor


def check_rates(options: Mapping[str, Any]) -> None:
    """Refuse hyper-parameters of the optimization that make no sense.

    Raises:
        ValueError: naming the argument.
    """
    if options["schedule"] == "step" and not options["milestones"]:
        raise ArgumentError("schedule 'step' needs milestones, the epochs at which the learning rate drops")


def format_groups(groups: list[dict[str, Any]]) -> str:
    """Write parameter groups as a table: name, learning rate, weight decay, tensors and parameters."""
    rows = [("group", "learning rate", "weight decay", "tensors", "parameters")]
    for group in groups:
        parameters = sum(p.numel() for p in group["params"])
        rows.append((
            group["name"], f"{group['lr']:.3g}", f"{group['weight_decay']:g}", f"{len(group['params'])}",
            f"{parameters:,}",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(lines)
