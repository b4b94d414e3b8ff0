"""ConvNeXt V2's global response normalisation in fewer passes over the maps, on CPUs in float32."""

import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from lightning_convnext_det.ops.tracing import is_recording


class ResponseNorm(GlobalResponseNorm):
    """Drop-in ``GlobalResponseNorm`` of timm.

    Takes float [B, H, W, C], or [B, C, H, W] without ``channels_last``, and gives the same shape. timm's norm goes over
    strided rows, and its end over three maps more. Accelerators, other dtypes, autocast, compilers and exporters see
    timm's layer.

    >>> import torch
    >>> norm = ResponseNorm(8)
    >>> norm(torch.ones(2, 5, 6, 8)).shape
    torch.Size([2, 5, 6, 8])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise maps."""
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not on_cpu or torch.compiler.is_compiling() or is_recording():
            normed: Tensor = super().forward(x)
            return normed
        energy = x.square().sum(self.spatial_dim, keepdim=True)
        response = energy.clamp(min=torch.finfo(energy.dtype).tiny).sqrt()  # with gradient 0 at 0, as timm's norm has
        relative = response / (response.mean(self.channel_dim, keepdim=True) + self.eps)
        factor = 1 + self.weight.view(self.wb_shape) * relative
        return torch.addcmul(self.bias.view(self.wb_shape), x, factor)


def use_fast_response_norm(network: nn.Module) -> None:
    """Turn the response norms of a network into `ResponseNorm`."""
    for module in network.modules():
        if type(module) is GlobalResponseNorm:
            module.__class__ = ResponseNorm  # as torch's lazy modules become ordinary ones: no weight is moved
