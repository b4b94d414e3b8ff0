"""What the detectors with object queries share: from images to tokens, and from predictions to detections."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image

from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.deformable_detr.criterion import Objects, Predictions, corners
from lightning_convnext_det.models.deformable_detr.levels import Frames, Levels, PyramidLevels, number_tensor
from lightning_convnext_det.models.image_transform import ImageTransform, check_tensors
from lightning_convnext_det.models.selection import SelectsDetections
from lightning_convnext_det.models.target_check import prepare_targets
from lightning_convnext_det.models.tensor_detections import keep_first, split_detections
from lightning_convnext_det.ops.host_numbers import send
from lightning_convnext_det.ops.precision import weight_precision
from lightning_convnext_det.types import Detection, Target, TensorDetections


class Outputs(NamedTuple):
    """Raw predictions of the network, from which `QueryDetector.select` takes the detections."""

    decoder: Predictions
    """Predictions of every decoder layer."""
    proposals: Predictions | None
    """Predictions of the encoder, one per token, in the two-stage variant."""
    usable: Tensor | None = None
    """False on queries of the two-stage variant that a small image has no token for, bool [B, Q]; None: all are."""


class QueryDetector(SelectsDetections, nn.Module):
    """Base of the detectors with object queries: a subclass decodes the tokens and computes the losses.

    Attributes:
        transform: resizes, normalises and pads the images.
        backbone: computes the feature maps.
        levels: turns them into tokens.
        num_classes: foreground classes.
        objects_multiple: the objects of an image are padded to a multiple of this in training.
    """

    transform: ImageTransform
    backbone: TimmPyramid
    levels: PyramidLevels
    num_classes: int
    objects_multiple: int

    def decode(self, levels: Levels) -> Outputs:
        """Predict classes and boxes from the tokens of a batch."""
        raise NotImplementedError

    def compute_losses(self, levels: Levels, objects: Objects) -> dict[str, Tensor]:
        """Compute the weighted losses, float32 scalars, from the tokens of a batch and its ground truth."""
        raise NotImplementedError

    @property
    def compiled_parts(self) -> list[str]:
        """Names of the parts that ``torch.compile`` takes as one graph each."""
        return ["backbone", "encoder", "decoder"]

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detection]:
        """Compute the losses in training mode, the detections in evaluation mode.

        Args:
            images: uint8 or float in 0..1, each [C, H, W] of its own size, or stacked [B, C, H, W], on any device: they
                are resized where they are and moved to the device of the network. Leave them on the CPU for an XLA
                device, which would compile again for each size.
            targets: the objects of each image, in training, on any device; those that are ``iscrowd`` are ignored
                regions: not learned, and no background where the box of a query lies in one for at least half.

        Returns:
            In training the weighted losses of `SetCriterion`, float32 scalars whose sum is the objective; else one
            `Detection` per image.

        Raises:
            DataError: if a target has a box that is not finite or has no area, or a label out of range.
            DivergenceError: if logits or boxes are not finite.
        """
        check_tensors(images)
        device = self.levels.embedding.device
        if not self.training:
            batch, sizes, _ = self.transform(images)
            batch = batch.to(device)
            return self.restore(self.forward_tensors(batch, *self.levels.place(batch, sizes)), sizes, images)
        if targets is None:
            raise ValueError("a detector in training mode needs targets; call eval() to predict")
        # where the images are: an XLA device would compile again for each number of objects
        prepared = prepare_targets(images, targets, self.num_classes, images[0].device if len(images) else device)
        batch, sizes, moved = self.transform(images, prepared)
        boxes = [_normalize(t["boxes"], size) for t, size in zip(moved, sizes, strict=True)]
        regions = [_normalize(t.get("ignored", t["boxes"][:0]), size) for t, size in zip(moved, sizes, strict=True)]
        objects = Objects.from_lists(boxes, [t["labels"] for t in moved], self.objects_multiple, regions).to(device)
        batch = batch.to(device)
        with weight_precision(self.levels.embedding):
            levels = self.levels(self.backbone, batch, *self.levels.place(batch, sizes))
            return self.compute_losses(levels, objects)

    def forward_tensors(
        self, images: Tensor, sizes: Tensor | None = None, frames: Frames | None = None
    ) -> TensorDetections:
        """Find the objects of a batch, in tensors of fixed shapes and without a look at their values.

        `forward` in evaluation mode is this between the transform of images and that of boxes; exporters record it.

        Args:
            images: normalised images, float32 [B, C, H, W], H and W multiples of the largest stride, zero on padding.
            sizes: (height, width) of every image without its padding, int64 [B, 2]; None if no image is padded.
            frames: groups of images that do not share their padding, see `PyramidLevels.place` (default: the batch is
                one group, so that the padding of an image has a little influence on its detections).
        """
        with weight_precision(self.levels.embedding):
            outputs = self.decode(self.levels(self.backbone, images, sizes, frames))
        return self.select(outputs, images, sizes)

    def predict(self, batch: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Outputs:
        """Run backbone, encoder and decoder on a batch.

        Args:
            batch: normalised images, float [B, C, H, W], H and W multiples of the largest stride, zero on padding.
            sizes: (height, width) of every image without its padding; None if no image is padded.
        """
        return self.decode(self.levels(self.backbone, batch, *self.levels.place(batch, sizes)))

    def select(self, outputs: Outputs, batch: Tensor, sizes: Tensor | None = None) -> TensorDetections:
        """Take the detections from the last decoder layer, in pixels of the batch's images.

        They are on the CPU where the network is on an XLA device.

        Args:
            outputs: of `predict`.
            batch: the images, of which only the shape counts.
            sizes: (height, width) of every image without its padding, int64 [B, 2]; None if no image is padded.
        """
        logits, boxes = outputs.decoder.logits[-1].float(), outputs.decoder.boxes[-1].float()
        best = min(self.detections_per_image, logits.shape[1] * logits.shape[2])
        lowest = torch.finfo(logits.dtype).min
        if outputs.usable is not None:
            logits = logits.masked_fill(~outputs.usable[:, :, None], lowest)
        # by logits: runtimes that approximate the sigmoid put low scores into another order
        logits, index = logits.flatten(1).topk(best)  # [B, best]
        scores = torch.where(logits == lowest, -1.0, logits.sigmoid())
        boxes = corners(boxes).gather(1, (index // self.num_classes)[:, :, None].expand(-1, -1, 4))
        sides = (number_tensor([batch.shape[-2:]], boxes) if sizes is None else sizes).flip(-1)  # [B or 1, 2] as (x, y)
        boxes = boxes * sides.to(boxes).repeat(1, 2)[:, None]
        if boxes.device.type == "xla":  # NMS has as many boxes as it finds: not for a device of fixed shapes
            packed = torch.cat([boxes, scores[..., None], index[..., None].to(boxes.dtype)], -1).cpu()
            boxes, scores, index = packed[..., :4], packed[..., 4], packed[..., 5].to(torch.int64)
        labels, rows = index % self.num_classes, self.detections_per_image
        if self.nms == "none":  # by descending score, those above the threshold come first
            unwanted = (scores <= self.score_threshold) | (scores < 0)
            return keep_first(boxes, scores, labels, (~unwanted).sum(1), rows)
        count = boxes.shape[0]
        images = torch.arange(count, device=boxes.device)[:, None].expand_as(labels)
        found = self.selection.select(
            boxes.nan_to_num().flatten(0, 1), scores.nan_to_num().flatten(), labels.flatten(), images.flatten(), count,
            self.num_classes, used=(scores >= 0).flatten(),
        )  # fmt: skip
        # what is not finite reaches the result, where `forward` checks it, also if it was not selected
        broken_scores, broken_boxes = 0 * scores.sum(1, keepdim=True), 0 * boxes.sum((1, 2), keepdim=True)
        return found._replace(boxes=found.boxes + broken_boxes, scores=found.scores + broken_scores)

    def restore(
        self, found: TensorDetections, sizes: list[tuple[int, int]], images: Sequence[Tensor] | Tensor
    ) -> list[Detection]:
        """Turn detections in a batch of resized images of ``sizes`` (height, width) into those of the images given."""
        originals = [(x.shape[-2], x.shape[-1]) for x in images]
        restored = self.transform.restore(split_detections(found), sizes, originals)
        for detection, size in zip(restored, originals, strict=True):
            detection["boxes"] = clip_boxes_to_image(detection["boxes"], size)
        return restored


def _normalize(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn corners in pixels of an image of (height, width) into centre and size in 0..1."""
    height, width = size
    sides = send([width, height, width, height], boxes.device, boxes.dtype)
    relative: Tensor = box_convert(boxes / sides, "xyxy", "cxcywh")
    return relative
