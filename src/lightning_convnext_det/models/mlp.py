"""timm's MLPs in blocks of tokens, where that is faster: in predictions from large maps on CPUs."""

import torch
from timm.layers.mlp import GlobalResponseNormMlp, Mlp
from torch import Tensor, nn

from lightning_convnext_det.models.response_norm import ResponseNorm
from lightning_convnext_det.ops.token_blocks import block_size, is_worthwhile, map_tokens


class BlockMlp(Mlp):
    """Drop-in ``Mlp`` of timm; the same numbers.

    Takes float [..., C] and gives the same shape.

    >>> import torch
    >>> BlockMlp(8, 32)(torch.ones(2, 5, 6, 8)).shape
    torch.Size([2, 5, 6, 8])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens."""
        if not is_worthwhile(x, self, self.fc1):
            mapped: Tensor = super().forward(x)
            return mapped
        return map_tokens(super().forward, x, self.fc1.out_features)


class BlockResponseNormMlp(GlobalResponseNormMlp):
    """Drop-in ``GlobalResponseNormMlp`` of timm, with `ResponseNorm` between its layers.

    Takes float [B, H, W, C] and gives the same shape.

    >>> import torch
    >>> BlockResponseNormMlp(8, 32)(torch.ones(2, 5, 6, 8)).shape
    torch.Size([2, 5, 6, 8])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map images."""
        is_fast = isinstance(self.grn, ResponseNorm) and self.grn.is_fast(x) and x.dim() == 4
        if not is_fast or not is_worthwhile(x, self, self.fc1):
            mapped: Tensor = super().forward(x)
            return mapped
        return torch.stack([self._map_image(image) for image in x])

    def _map_image(self, image: Tensor) -> Tensor:
        """Map [H, W, C]: a norm over the whole image stands between the two layers."""
        width, tokens = self.fc1.out_features, image.flatten(0, 1)
        size = block_size(tokens, width)
        hidden, energy = tokens.new_empty(len(tokens), width), tokens.new_zeros(width)
        for block, rows in zip(torch.split(tokens, size), torch.split(hidden, size), strict=True):
            rows.copy_(self.act(self.fc1(block)))
            energy += rows.square().sum(0)
        factor = self.grn.factor(energy)
        mapped = map_tokens(lambda block: self.fc2(torch.addcmul(self.grn.bias, block, factor)), hidden, width)
        return mapped.view(*image.shape[:2], -1)


def use_fast_mlps(network: nn.Module) -> None:
    """Turn the MLPs of a network into such that run in blocks, unless a norm of theirs mixes the tokens."""
    for module in network.modules():
        if type(module) is Mlp and isinstance(module.norm, nn.Identity | nn.LayerNorm):
            module.__class__ = BlockMlp  # as torch's lazy modules become ordinary ones: no weight is moved
        elif type(module) is GlobalResponseNormMlp:
            module.__class__ = BlockResponseNormMlp
