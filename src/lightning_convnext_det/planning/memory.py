"""Memory of a training step: weights with gradients and moments, and the tensors that a backward pass needs.

These are counted on the meta device, where the network has shapes but no values.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_convnext_det.data.fingerprint import Fingerprint
from lightning_convnext_det.models.backbone import pad_to_multiple
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.rcnn.roi_heads import BoxHeads
from lightning_convnext_det.planning.draft import Draft
from lightning_convnext_det.planning.machine import Machine

USABLE = 0.8  # of the memory: the rest is for the context, fragments and the data
PER_PARAMETER = 16  # bytes: float32 weight and gradient, two moments of AdamW
HALF = 0.65  # of the bytes that are kept where bfloat16 is used: products and convolutions, but not norms and losses
ALIVE = 1.1  # times what is kept: gradients of feature maps on their way back
MOST = 64  # images, beyond which nothing is asked


class Step(NamedTuple):
    """What a training step of a detector holds."""

    parameters: int
    """Number of those that learn."""
    kept: int
    """Bytes that a backward pass needs of one image, in float32."""

    def bytes(self, batch: int, half: bool = False) -> float:
        """Bytes at the peak of a step, of so many images on a device, with bfloat16 autocast or without."""
        return PER_PARAMETER * self.parameters + ALIVE * batch * self.kept * (HALF if half else 1.0)


def images_that_fit(draft: Draft, fingerprint: Fingerprint, machine: Machine, kind: str) -> int:
    """How many of the largest images fit into the memory of one device; of DETR what its backbone takes is asked.

    0 if not even one does.
    """
    sizes = draft.get("model.min_size"), draft.get("model.max_size")
    shorter, longer = (int(size[-1] if isinstance(size, list | tuple) else size) for size in sizes)
    names = ("fpn_channels", "box_head_features", "box_batch_size_per_image")
    options = {name: value for name in names if (value := draft.get(f"model.{name}")) is not None}
    classes, backbone = max(1, len(fingerprint.objects_per_class)), str(draft.get("model.backbone"))
    try:
        step = measure_step(classes, backbone, (shorter, longer), **options)
    except ValueError:  # a backbone that there is not, of which the module tells
        return MOST
    half = machine.bfloat16 and not machine.is_cpu
    free = USABLE * machine.memory - step.bytes(0, half)
    return int(min(MOST, max(0, free // (step.bytes(1, half) - step.bytes(0, half)))))


@cache
def measure_step(
    num_classes: int,
    backbone: str,
    size: tuple[int, int],
    fpn_channels: int = 256,
    box_head_features: int = 1024,
    box_batch_size_per_image: int = 512,
) -> Step:
    """Count parameters and kept bytes of a Faster R-CNN whose resized images have this height and width."""
    with torch.device("meta"):
        detector = FasterRCNN(
            num_classes, backbone, fpn_channels=fpn_channels, box_head_features=box_head_features, channels_last=False
        ).train()
    parameters = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    return Step(parameters, _kept_per_image(detector, size, box_batch_size_per_image))


def _kept_per_image(detector: FasterRCNN, size: tuple[int, int], samples: int) -> int:
    """Bytes that autograd keeps of one image, in float32."""
    storages: dict[int, int] = {p.untyped_storage()._cdata: 0 for p in detector.parameters()}
    alive: list[Tensor] = []  # so that no storage takes the place of another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, storage.nbytes())
        alive.append(tensor)
        return tensor

    image = pad_to_multiple(torch.zeros(1, len(detector.transform.image_mean), *size, device="meta"), 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        maps = detector.backbone(image)
        outputs = detector.rpn.head(list(maps.values()))
        head = detector.roi_heads
        assert isinstance(head, BoxHeads)
        height, width = head.box_roi_pool.output_size
        pooled = image.new_zeros(samples, detector.backbone.out_channels, height, width).requires_grad_()
        outputs = [*outputs, head.box_predictor(head.box_head(pooled))]
    return sum(storages.values())
