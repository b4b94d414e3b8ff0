"""Deformable attention as an opaque operator: for ``torch.compile``, with autograd, from its forward and backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor, Sequence[int], Tensor, Tensor], Tensor]
Backward = Callable[[Tensor, Tensor, Sequence[int], Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def attention_operator(name: str, forward: Forward, backward: Backward, device_types: str | None = None) -> Forward:
    """Register an implementation of deformable attention with torch.

    Args:
        name: of the operator; ``<name>_backward`` is its gradient.
        forward: from value, heights and widths of the levels in one list, locations and attention weights to features;
            its annotations are the operator's schema.
        backward: from the gradient of the features and the same arguments to the gradients of the three tensors, each
            contiguous.
        device_types: where it works (default: anywhere).

    Returns:
        The operator, which is called as ``forward`` is.
    """
    name = f"lightning_convnext_det::{name}"
    operator = torch.library.custom_op(name, forward, mutates_args=(), device_types=device_types)
    gradient = torch.library.custom_op(f"{name}_backward", backward, mutates_args=(), device_types=device_types)

    def keep(ctx: Any, inputs: tuple[Tensor, list[int], Tensor, Tensor], output: Tensor) -> None:  # Any: torch's
        value, ctx.sizes, sampling_locations, attention_weights = inputs
        ctx.save_for_backward(value, sampling_locations, attention_weights)

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        value, sampling_locations, attention_weights = ctx.saved_tensors
        grads = gradient(grad.contiguous(), value, ctx.sizes, sampling_locations, attention_weights)
        return grads[0], None, grads[1], grads[2]

    operator.register_fake(_fake_forward)
    gradient.register_fake(_fake_backward)
    operator.register_autograd(differentiate, setup_context=keep)
    return operator


def _fake_forward(value: Tensor, sizes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(
    grad: Tensor, value: Tensor, sizes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return contiguous_like(value), contiguous_like(sampling_locations), contiguous_like(attention_weights)


def contiguous_like(tensor: Tensor) -> Tensor:
    """Allocate a contiguous tensor of the same shape, whatever the strides."""
    return tensor.new_empty(tensor.shape)
