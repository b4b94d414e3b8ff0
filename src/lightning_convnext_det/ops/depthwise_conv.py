"""Depthwise convolution whose weight gradient is fast on CPUs.

The gradient of a channel's K x K weights is the correlation of its input with the gradient of its output, which is
again a depthwise convolution, of one image with N x C channels and with kernels as large as the maps. oneDNN's forward
pass computes it in a third to a twentieth of the time that its own weight gradient takes from K = 5 on (torch 2.14,
Intel Xeon with AVX512-BF16; 2 x 160 x 16 x 20 and 7 x 7, one thread: 0.6 instead of 6.6 ms in bfloat16, 0.5 instead of
1.7 in float32). In ConvNeXt that gradient is a third of a training step.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_convnext_det.ops.tracing import is_recording

MIN_KERNEL = 5  # below, the usual gradient is the faster one
_HAS_FAST_KERNELS = platform.machine() in ("x86_64", "AMD64")  # not measured elsewhere


class DepthwiseConv2d(nn.Conv2d):
    """Drop-in ``nn.Conv2d`` for depthwise convolutions of stride 1 that keep the size; on CPUs it learns faster.

    Takes float [N, C, H, W] and gives the same shape. Only the way in which the weights' gradient is computed differs,
    and so its rounding. Accelerators, frozen weights, inference, compilers and exporters see ``nn.Conv2d``.

    >>> import torch
    >>> conv = DepthwiseConv2d(8, 8, 7, padding=3, groups=8)
    >>> conv(torch.zeros(2, 8, 5, 6)).shape
    torch.Size([2, 8, 5, 6])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve float [N, C, H, W]."""
        learns = self.weight.requires_grad and torch.is_grad_enabled() and input.dim() == 4
        if not (learns and _HAS_FAST_KERNELS and input.device.type == "cpu") or is_recording():
            return super().forward(input)
        if torch.compiler.is_compiling():
            return super().forward(input)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            input, weight = input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        convolved: Tensor = _DepthwiseConvolution.apply(input, weight, bias)
        return convolved


def use_fast_depthwise(network: nn.Module) -> None:
    """Turn the depthwise convolutions of a network that `DepthwiseConv2d` can replace into such."""
    for module in network.modules():
        if type(module) is nn.Conv2d and _fits(module):
            module.__class__ = DepthwiseConv2d  # as torch's lazy modules become ordinary ones: no weight is moved


def _fits(conv: nn.Conv2d) -> bool:
    same_size = isinstance(conv.padding, tuple) and all(
        size >= MIN_KERNEL and size == 2 * padding + 1
        for size, padding in zip(conv.kernel_size, conv.padding, strict=True)
    )
    plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return same_size and plain and conv.groups == conv.in_channels == conv.out_channels


class _DepthwiseConvolution(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func, e.g. the gradients of each image

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        height, width = weight.shape[-2:]
        return F.conv2d(x, weight, bias, padding=(height // 2, width // 2), groups=x.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        padding = [size // 2 for size in weight.shape[-2:]]
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], x.shape[1], [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(x, grad, padding).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias


def _weight_gradient(x: Tensor, grad: Tensor, padding: list[int]) -> Tensor:
    """Correlate input and gradient of the output, both [N, C, H, W], to [C, 1, K, K]."""
    images, channels, height, width = x.shape
    maps = x.contiguous().view(1, images * channels, height, width)
    kernels = grad.contiguous().view(images * channels, 1, height, width)
    found = F.conv2d(maps, kernels, padding=padding, groups=images * channels)
    summed = found.view(images, channels, 1, *found.shape[-2:])
    return summed.sum(0, dtype=torch.float32 if summed.dtype == torch.bfloat16 else None)
