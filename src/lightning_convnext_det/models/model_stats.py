"""Parameters, GFLOPs and ImageNet accuracy of the named models, measured on the meta device.

GFLOPs are multiply-adds in units of 10^9, as in the papers: half of what torch's counter counts in convolutions and
matrix products. Elementwise operations, pooling and sampling are not counted.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.models.backbone import TimmPyramid, pad_to_multiple
from lightning_convnext_det.models.backbone_weights import find_licence
from lightning_convnext_det.models.deformable_detr.detector import QueryDetector
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.rcnn.roi_heads import BoxHeads
from lightning_convnext_det.models.zoo import backbone_of, create_detector, list_detectors

CLASSES = 90  # of the detectors measured; with the background 91 logits, as torchvision's
IMAGE = (800, 1333)  # pixels, padded to multiples of 32
PROPOSALS = 1000  # boxes that reach the second stage

# ImageNet-1k top-1 at 224 x 224 and the tag of the weights
_TOP1 = {
    # Liu et al., arXiv:2201.03545, table 1; xlarge: pretrained on ImageNet-22k
    "convnext_tiny": (82.1, "fb_in1k"),
    "convnext_small": (83.1, "fb_in1k"),
    "convnext_base": (83.8, "fb_in1k"),
    "convnext_large": (84.3, "fb_in1k"),
    "convnext_xlarge": (87.0, "fb_in22k_ft_in1k"),
    # Woo et al., arXiv:2301.00808, table 4 of the authors' repository: FCMAE, fine-tuned on ImageNet-1k
    "convnextv2_atto": (76.7, "fcmae_ft_in1k"),
    "convnextv2_femto": (78.5, "fcmae_ft_in1k"),
    "convnextv2_pico": (80.3, "fcmae_ft_in1k"),
    "convnextv2_nano": (81.9, "fcmae_ft_in1k"),
    "convnextv2_tiny": (83.0, "fcmae_ft_in1k"),
    "convnextv2_base": (84.9, "fcmae_ft_in1k"),
    "convnextv2_large": (85.8, "fcmae_ft_in1k"),
    "convnextv2_huge": (86.3, "fcmae_ft_in1k"),
    # torchvision's table of weights, IMAGENET1K_V1
    "resnet50": (76.1, "tv_in1k"),
    "resnext50_32x4d": (77.6, "tv_in1k"),
}


@dataclass(frozen=True)
class ModelFacts:
    """Size, cost and accuracy of a model.

    Attributes:
        name: of the backbone or detector.
        parameters: number of parameters; of a backbone with its classifier, of a detector with 90 classes.
        gflops: multiply-adds / 10^9, of a backbone for 224 x 224 pixels, of a detector for 800 x 1333.
        channels: channels of the backbone's feature maps.
        strides: strides of these feature maps.
        top1: published ImageNet-1k accuracy of the backbone in per cent; None if not listed here.
        weights: timm's tag of the weights with that accuracy.
        licence: of the backbone's pretrained weights that are taken for its name; None where timm names none.
    """

    name: str
    parameters: int
    gflops: float
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    top1: float | None
    weights: str | None
    licence: str | None


def list_facts(pattern: str = "*") -> Iterator[ModelFacts]:
    """Measure the named backbones and detectors that match a shell pattern.

    Raises:
        ValueError: if nothing matches.
    """
    backbones = fnmatch.filter(_TOP1, pattern)
    detectors = [name for name in list_detectors(pattern) if backbone_of(name) is not None]
    if not backbones and not detectors:
        backbones = timm.list_models(pattern) or timm.list_pretrained(pattern)
    if not backbones and not detectors:
        raise ArgumentError(f"no backbone or detector matches '{pattern}'; try '*convnext*'")
    yield from map(measure_backbone, backbones)
    yield from map(measure_detector, detectors)


def measure_backbone(name: str) -> ModelFacts:
    """Measure a timm network at 224 x 224 pixels, or at the only size that it takes."""
    with torch.device("meta"):
        classifier = timm.create_model(name).eval()
        pyramid = TimmPyramid(name)
        config = classifier.pretrained_cfg
        size = config["input_size"] if config.get("fixed_input_size") else (3, 224, 224)
        gflops = _count(classifier, torch.zeros(1, *size))
    return _facts(name, name, classifier, gflops, pyramid)


# the overrides are the keywords of whichever detector is named
def measure_detector(name: str, **overrides: Any) -> ModelFacts:
    """Measure a named detector with a fixed backbone, given any arguments of its constructor."""
    backbone = backbone_of(name)
    assert backbone is not None
    with torch.device("meta"):
        detector = create_detector(name, CLASSES, **overrides).eval()
        batch = pad_to_multiple(torch.zeros(1, 3, *IMAGE), 32)
        if isinstance(detector, QueryDetector):
            gflops = _count(_Predict(detector), batch)
        else:
            assert isinstance(detector, FasterRCNN)
            gflops = _count(_Parts(detector), batch)
    pyramid = next(part for part in detector.modules() if isinstance(part, TimmPyramid))
    return _facts(name, backbone, detector, gflops, pyramid)


class _Predict(nn.Module):
    """Deformable DETR or DINO without the selection of detections, whose shapes depend on values."""

    def __init__(self, detector: QueryDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Tensor) -> object:
        return self.detector.predict(batch)


class _Parts(nn.Module):
    """Parts of a two-stage detector one after the other, for a fixed number of proposals."""

    def __init__(self, detector: FasterRCNN) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Tensor) -> None:
        maps = self.detector.backbone(batch)
        self.detector.rpn.head(list(maps.values()))
        heads: Sequence[BoxHeads] = getattr(self.detector.roi_heads, "stages", [self.detector.roi_heads])
        for head in heads:
            height, width = head.box_roi_pool.output_size
            pooled = batch.new_zeros(PROPOSALS, self.detector.backbone.out_channels, height, width)
            head.box_predictor(head.box_head(pooled))


def _count(net: nn.Module, batch: Tensor) -> float:
    net.requires_grad_(False)  # the counter would follow gradients, which the meta device does not have
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(batch)
    return int(counter.get_total_flops()) / 2e9  # a multiply-add is two operations


def _facts(name: str, backbone: str, net: nn.Module, gflops: float, pyramid: TimmPyramid) -> ModelFacts:
    architecture, _, tag = backbone.partition(".")
    top1, weights = _TOP1.get(architecture, (None, None))
    if tag and tag != weights:  # other weights have another accuracy
        top1, weights = None, None
    parameters = sum(p.numel() for p in net.parameters())
    channels, strides = tuple(pyramid.channels), tuple(pyramid.strides)
    return ModelFacts(name, parameters, gflops, channels, strides, top1, weights, find_licence(backbone))
