"""Layers of each token by itself, computed a block of tokens at a time, which keeps wide hidden maps in the cache.

A hidden map of more than some 30 MB is memory that the C library fetches from the system, page by page, and gives back
after each layer. One thread of an Intel Xeon (AMX), torch 2.14, ``Linear``, GELU, ``Linear`` from 96 to 384 channels:
208 ms for 200 x 334 tokens in float32 and 92 in bfloat16, in blocks 102 and 34.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_convnext_det.ops.tracing import is_recording

_MIN_HIDDEN = 24 << 20  # bytes of a hidden map, below which one product is as fast as several
_BLOCK = 4 << 20  # bytes of a block's hidden map
_MIN_TOKENS = 2048  # in a block: fewer read the weights too often


def map_tokens(layer: Callable[[Tensor], Tensor], x: Tensor, hidden_dim: int) -> Tensor:
    """Compute ``layer(x)`` in blocks of tokens.

    >>> x = torch.ones(2, 3, 4)
    >>> torch.equal(map_tokens(torch.relu, x, 16), torch.relu(x))
    True

    Args:
        layer: maps float [N, C] to [N, D], each row by itself.
        x: float [..., C].
        hidden_dim: width of the widest map inside the layer.

    Returns:
        [..., D], as ``layer`` gives it.
    """
    size = block_size(x, hidden_dim)
    tokens = x.reshape(-1, x.shape[-1])
    first = layer(tokens[:size])
    out = first.new_empty(len(tokens), first.shape[-1])
    out[:size] = first
    for block, rows in zip(torch.split(tokens[size:], size), torch.split(out[size:], size), strict=True):
        rows.copy_(layer(block))
    return out.view(*x.shape[:-1], -1)


def block_size(x: Tensor, hidden_dim: int) -> int:
    """Number of tokens of a block, for float [..., C] mapped by way of ``hidden_dim`` channels."""
    return max(_MIN_TOKENS, _BLOCK // (hidden_dim * _itemsize(x)))


def is_worthwhile(x: Tensor, module: nn.Module, widening: nn.Module) -> bool:
    """Tell whether ``module``, which maps each token by way of its layer ``widening``, is to run in blocks.

    Only in predictions on CPUs, and not where compilers and exporters look on, or hooks of the layers inside, which are
    to see whole maps.
    """
    if module.training or torch.is_grad_enabled() or x.device.type != "cpu" or not isinstance(widening, nn.Linear):
        return False
    if torch.compiler.is_compiling() or is_recording() or torch._C._are_functorch_transforms_active():
        return False  # before sizes are compared, which may be symbols
    if x.numel() // x.shape[-1] * widening.out_features * _itemsize(x) < _MIN_HIDDEN:
        return False
    inside = (layer for layer in module.modules() if layer is not module)
    return not any(layer._forward_hooks or layer._forward_pre_hooks for layer in inside)


def _itemsize(x: Tensor) -> int:
    return torch.get_autocast_dtype("cpu").itemsize if torch.is_autocast_enabled("cpu") else x.element_size()
