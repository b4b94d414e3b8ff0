"""Safety of AdamW's fused step on CPUs: the layout of gradients and moments, and resuming on other devices."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_DEVICES = frozenset({"cpu", "cuda"})  # the fused step of torch 2.9 runs on these
_MOMENTS = ("exp_avg", "exp_avg_sq")


def secure_fused_step(optimizer: Optimizer) -> None:
    """Make an optimizer safe whose groups may be ``fused``, by themselves or by a checkpoint that is loaded.

    The fused step pairs the elements of parameters, gradients and moments by their position in memory, and on CPUs
    torch 2.14 does not check that: a run with channels last that goes on with channels first would move its weights by
    the moments of others, without an error.
    """
    optimizer.register_step_pre_hook(_align)
    optimizer.register_load_state_dict_pre_hook(_unfuse_elsewhere)


def _align(optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            if parameter.grad is None:
                continue
            parameter.grad = _laid_out(parameter.grad, parameter)
            state = optimizer.state.get(parameter, {})
            for name in _MOMENTS:
                if name in state:
                    state[name] = _laid_out(state[name], parameter)


def _laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Lay a tensor out in memory as its parameter."""
    sides = zip(tensor.stride(), parameter.stride(), parameter.shape, strict=True)
    if all(own == wanted or side == 1 for own, wanted, side in sides):
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _unfuse_elsewhere(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """Keep a checkpoint's choice, so that a resumed training equals the uninterrupted one, but where it cannot run."""
    if all(p.device.type in _DEVICES for group in optimizer.param_groups for p in group["params"]):
        return None
    return {**state, "param_groups": [{**group, "fused": None} for group in state["param_groups"]]}
