"""Feature pyramid network (FPN) on the feature maps of a timm backbone."""

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from lightning_convnext_det.models.backbone import TimmPyramid


class PyramidFPN(nn.Module):
    """A feature pyramid network over a `TimmPyramid`, with a pooled level on top.

    Args:
        body: the network that computes the maps.
        out_channels: channels of every output map.

    Reference:
        Lin et al., "Feature Pyramid Networks for Object Detection", arXiv:1612.03144; the operator is torchvision's.
    """

    def __init__(self, body: TimmPyramid, out_channels: int = 256) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.channels, out_channels, extra_blocks=LastLevelMaxPool())
        self.fpn.to(memory_format=body.memory_format)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [B, C, H, W] to ``{"0": map, ..., "pool": map}``, each [B, out_channels, H / s, W / s]."""
        maps = self.body(images)
        pyramid: dict[str, Tensor] = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))
        return pyramid
