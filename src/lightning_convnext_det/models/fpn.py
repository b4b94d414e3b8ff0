"""Feature pyramid network (FPN) on the feature maps of a timm backbone."""

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from lightning_convnext_det.models.backbone import TimmPyramid


class PyramidFPN(nn.Module):
    """Feature pyramid network (FPN) on the feature maps of a timm backbone, with a pooled level on top.

    >>> import torch
    >>> fpn = PyramidFPN(TimmPyramid("test_convnext"), out_channels=8)
    >>> {name: tuple(features.shape) for name, features in fpn(torch.rand(1, 3, 64, 64)).items()}
    {'0': (1, 8, 16, 16), '1': (1, 8, 8, 8), '2': (1, 8, 4, 4), '3': (1, 8, 2, 2), 'pool': (1, 8, 1, 1)}

    Args:
        body: computes the feature maps of the backbone.
        out_channels: channels of every feature map of the pyramid.

    Reference:
        Lin et al., "Feature Pyramid Networks for Object Detection", arXiv:1612.03144; the operator is torchvision's.
    """

    def __init__(self, body: TimmPyramid, out_channels: int = 256) -> None:
        super().__init__()
        self.body, self.strides = body, body.strides
        self.fpn = FeaturePyramidNetwork(body.channels, out_channels, extra_blocks=LastLevelMaxPool())
        self.fpn.to(memory_format=body.memory_format)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [B, C, H, W] to ``{"0": map, ..., "pool": map}``, each [B, out_channels, H / s, W / s]."""
        maps = self.body(images)
        pyramid: dict[str, Tensor] = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))
        return pyramid
