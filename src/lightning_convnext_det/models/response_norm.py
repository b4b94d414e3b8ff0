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
        if not self.is_fast(x):
            normed: Tensor = super().forward(x)
            return normed
        energy = x.square().sum(self.spatial_dim, keepdim=True)
        factor = self.factor(energy.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)
        return torch.addcmul(self.bias.view(self.wb_shape), x, factor)

    def is_fast(self, x: Tensor) -> bool:
        """Tell whether maps are normalised in this way and not in timm's."""
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return on_cpu and not torch.compiler.is_compiling() and not is_recording()

    def factor(self, energy: Tensor) -> Tensor:
        """Compute what each channel is multiplied by, [..., C], from its sum of squares over an image."""
        response = energy.clamp(min=torch.finfo(energy.dtype).tiny).sqrt()  # with gradient 0 at 0, as timm's norm has
        factor: Tensor = 1 + self.weight * (response / (response.mean(-1, keepdim=True) + self.eps))
        return factor


def use_fast_response_norm(network: nn.Module) -> None:
    """Turn the response norms of a network into `ResponseNorm`."""
    for module in network.modules():
        if type(module) is GlobalResponseNorm:
            module.__class__ = ResponseNorm  # as torch's lazy modules become ordinary ones: no weight is moved
