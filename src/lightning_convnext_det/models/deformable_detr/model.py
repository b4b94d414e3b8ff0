"""Deformable DETR (arXiv:2010.04159) on any timm backbone: plain, with iterative box refinement, or in two stages.

Checked against the authors' implementation (fundamentalvision/Deformable-DETR), Hugging Face's port and birder's
variant; `lightning_convnext_det.convert` imports the weights of all three. By default the detections of an image do not
depend on the other images of its batch: the backbone and the projections, whose norms average over whole feature maps,
run on every image without the padding that its neighbours need. `independent_images=False` pads first, as all three do.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import MLP, box_convert, clip_boxes_to_image

from lightning_convnext_det.arguments import Count, Fraction, NonNegative, NonNegativeInt, Positive, check_arguments
from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.deformable_detr.criterion import (
    Objects,
    PerLoss,
    Predictions,
    SetCriterion,
    corners,
    prior_bias,
)
from lightning_convnext_det.models.deformable_detr.levels import Frames, Levels, PyramidLevels, number_tensor
from lightning_convnext_det.models.deformable_detr.transformer import (
    Decoder,
    DeformableAttention,
    Encoder,
    Proposer,
    apply_in_full_precision,
)
from lightning_convnext_det.models.image_transform import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageTransform,
    check_tensors,
)
from lightning_convnext_det.models.selection import Selection, SelectsDetections
from lightning_convnext_det.models.target_check import prepare_targets
from lightning_convnext_det.models.tensor_detections import join_detections, keep_first, split_detections
from lightning_convnext_det.ops.nms import NMSMethod
from lightning_convnext_det.ops.precision import weight_precision
from lightning_convnext_det.types import Detection, Target, TensorDetections


class Outputs(NamedTuple):
    """Raw predictions of the network, from which `DeformableDETR.select` takes the detections."""

    decoder: Predictions
    """Predictions of every decoder layer."""
    proposals: Predictions | None
    """Predictions of the encoder, one per token, in the two-stage variant."""
    usable: Tensor | None = None
    """False on queries of the two-stage variant that a small image has no token for, bool [B, Q]; None: all are."""


class DeformableDETR(SelectsDetections, nn.Module):
    """Deformable DETR: detection by object queries that attend to a few points of multi-scale feature maps.

    Takes a list of images, uint8 or float in 0..1, each [C, H, W] of its own size, and resizes and normalises them
    itself. In training mode it also takes a list of `Target`s and returns the weighted losses, float32 scalars whose
    sum is the objective. In evaluation mode it returns one `Detection` per image: ``boxes`` float32 [N, 4] as
    (x1, y1, x2, y2) in pixels of the image given, ``labels`` int64 [N] from 0 to ``num_classes - 1`` and ``scores``
    float32 [N] in 0..1, by descending score.

    >>> import torch
    >>> detector = DeformableDETR(2, "test_convnext", num_queries=8, hidden_dim=32, encoder_layers=1, decoder_layers=2,
    ...                           min_size=64, max_size=96)
    >>> images = [torch.rand(3, 60, 80), torch.zeros(3, 64, 48, dtype=torch.uint8)]
    >>> target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    >>> sorted(detector(images, [target, target]))[:4]
    ['loss_box', 'loss_box_aux0', 'loss_classification', 'loss_classification_aux0']
    >>> detections = detector.eval()(images)
    >>> len(detections), tuple(detections[0]["boxes"].shape), detections[0]["labels"].dtype
    (2, (16, 4), torch.int64)

    Args:
        num_classes: foreground classes; labels run from 0 to ``num_classes - 1``.
        backbone: timm name of the backbone, e.g. ``convnextv2_tiny``, ``resnet50``.
        pretrained_backbone: start from timm's pretrained weights of the backbone.
        backbone_weights: start from a local weight file of the backbone instead.
        drop_path_rate: stochastic depth of the backbone; 0 keeps the default of the backbone.
        stem_eps: epsilon of the backbone's first LayerNorm; 0 keeps timm's, 1e-6 for ConvNeXt. Birder's ConvNeXt has
            1e-5, which matters in flat regions of an image.
        frozen_stages: how many stages of the backbone to freeze, from the finest; frozen BatchNorms keep their
            statistics.
        batch_norm: ``frozen`` or ``train``, for the BatchNorms of the backbone.
        gradient_checkpointing: trade time for memory in the backbone and the encoder.
        channels_last: memory format of the convolutions.
        strides: strides of the feature maps that the encoder reads; the paper uses 8, 16, 32.
        extra_levels: coarser levels to add, each half the size of the previous; the paper adds one, at stride 64.
        num_queries: number of object queries, the most objects that can be found in an image.
        hidden_dim: channels of the transformer; a multiple of 32 and of ``num_heads``.
        num_heads: attention heads.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers.
        encoder_points: sampling points per head and level in the encoder.
        decoder_points: sampling points per head and level in the decoder.
        feedforward_dim: width of the feed-forward blocks.
        dropout: dropout in the transformer.
        box_refinement: every decoder layer refines the boxes of the previous one; else all refine the same points.
        two_stage: the encoder proposes the boxes that the decoder starts from; needs ``box_refinement``.
        auxiliary_losses: train every decoder layer, not only the last.
        loss_weights: factors of the losses: classification (focal), box (L1 in 0..1) and generalised IoU.
        matching_costs: factors of the same three in the cost by which queries are matched with objects.
        position_offset: position encoding of a cell by its centre (0.5, as the authors) or its far edge (0.0, as
            birder).
        independent_images: detections of an image do not depend on its batch; else images are padded before the
            backbone, which is faster on GPUs where sizes differ.
        fixed_size: (height, width) in pixels that every batch is padded to, after images are resized to fit into it:
            for devices that compile again for each shape, such as TPUs. Multiples of the largest stride.
        objects_multiple: pad the objects of an image to a multiple of this, for the same devices.
        min_size: shorter side of the resized image in pixels; of several, one is drawn per image in training and
            the last is used in evaluation.
        max_size: limit of the longer side in pixels.
        image_mean: mean per channel, for images in 0..1.
        image_std: standard deviation per channel.
        score_threshold: detections with a score that is not higher are dropped.
        nms: treatment of overlapping detections of a class: ``none`` keeps them, ``hard`` drops the one with the lower
            score, ``soft`` lowers its score.
        nms_threshold: IoU above which ``hard`` drops.
        soft_nms_sigma: width of the Gaussian by which ``soft`` lowers scores, in squared IoU; smaller lowers more.
        detections_per_image: the most detections per image.
        in_chans: channels of the images.

    Raises:
        ValueError: if an argument does not fit the others or the backbone.

    Reference:
        Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", arXiv:2010.04159.
    """

    def __init__(
        self,
        num_classes: Count,
        backbone: str = "convnextv2_tiny",
        pretrained_backbone: bool = False,
        backbone_weights: str | None = None,
        drop_path_rate: Fraction = 0.0,
        stem_eps: NonNegative = 0.0,
        frozen_stages: NonNegativeInt = 0,
        batch_norm: Literal["frozen", "train"] = "frozen",
        gradient_checkpointing: bool = False,
        channels_last: bool = True,
        strides: Sequence[Count] = (4, 8, 16, 32),
        extra_levels: NonNegativeInt = 0,
        num_queries: Count = 300,
        hidden_dim: Count = 256,
        num_heads: Count = 8,
        encoder_layers: Count = 6,
        decoder_layers: Count = 6,
        encoder_points: Count = 4,
        decoder_points: Count = 4,
        feedforward_dim: Count = 1024,
        dropout: Fraction = 0.1,
        box_refinement: bool = True,
        two_stage: bool = False,
        auxiliary_losses: bool = True,
        loss_weights: PerLoss = (2.0, 5.0, 2.0),
        matching_costs: PerLoss = (2.0, 5.0, 2.0),
        position_offset: float = 0.5,
        independent_images: bool = True,
        fixed_size: list[int] | None = None,
        objects_multiple: Count = 1,
        min_size: Count | list[Count] = 800,
        max_size: Count = 1333,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        score_threshold: Fraction = 0.0,
        nms: NMSMethod = "none",
        nms_threshold: Fraction = 0.7,
        soft_nms_sigma: Positive = 0.5,
        detections_per_image: Count = 100,
        in_chans: Count = 3,
    ) -> None:
        super().__init__()
        check_arguments(DeformableDETR.__init__, locals())
        _check_variant(hidden_dim, num_heads, two_stage, box_refinement)
        self.num_classes, self.num_queries, self.objects_multiple = num_classes, num_queries, objects_multiple
        self.selection = Selection(score_threshold, nms, nms_threshold, soft_nms_sigma, detections_per_image)
        self.transform = ImageTransform(min_size, max_size, image_mean, image_std, in_chans, max(strides), fixed_size)
        self.backbone = TimmPyramid(
            backbone, pretrained=pretrained_backbone, weights=backbone_weights, in_chans=in_chans, strides=strides,
            drop_path_rate=drop_path_rate, stem_eps=stem_eps, frozen_stages=frozen_stages, batch_norm=batch_norm,
            gradient_checkpointing=gradient_checkpointing, channels_last=channels_last)  # fmt: skip
        self.levels = PyramidLevels(
            self.backbone, extra_levels, hidden_dim, position_offset, independent_images, bool(fixed_size))  # fmt: skip
        layer = (hidden_dim, num_heads, len(self.levels.projections), feedforward_dim, dropout)
        self.encoder = Encoder(encoder_layers, (*layer, encoder_points), gradient_checkpointing)
        self.decoder = Decoder(decoder_layers, (*layer, decoder_points), box_refinement)
        self._add_heads(hidden_dim, two_stage)
        self.criterion = SetCriterion(loss_weights, matching_costs, auxiliary_losses=auxiliary_losses)

    def _add_heads(self, hidden_dim: int, two_stage: bool) -> None:
        self.proposer = Proposer(hidden_dim) if two_stage else None
        if not two_stage:
            self.query_embedding = nn.Embedding(self.num_queries, hidden_dim * 2)
            self.reference_points = nn.Linear(hidden_dim, 2)
        # without refinement all layers share their heads; with two stages the last pair belongs to the encoder
        heads = len(self.decoder.layers) + two_stage if self.decoder.box_refinement else 1
        self.class_heads = nn.ModuleList(nn.Linear(hidden_dim, self.num_classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(
            MLP(hidden_dim, [hidden_dim, hidden_dim, 4], inplace=False) for _ in range(heads)
        )
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for part in (self.encoder, self.decoder, self.proposer):
            for parameter in part.parameters() if part is not None else ():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        if self.proposer is None:
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)
        for name, parameter in [*self.class_heads.named_parameters(), *self.box_heads.named_parameters()]:
            _, _, layer = name.partition(".")
            if layer == "bias":
                nn.init.constant_(parameter, prior_bias())
            elif layer in ("6.weight", "6.bias"):  # the last of the three layers of a box head
                nn.init.zeros_(parameter)
            if name == "0.6.bias" and self.proposer is None:  # first boxes are 12 % of the image wide and high
                nn.init.constant_(parameter[2:], -2.0)

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
            return self._restore(self.forward_tensors(batch, *self.levels.place(batch, sizes)), sizes, images)
        if targets is None:
            raise ValueError("a detector in training mode needs targets; call eval() to predict")
        # where the images are: an XLA device would compile again for each number of objects
        prepared = prepare_targets(images, targets, self.num_classes, images[0].device if len(images) else device)
        batch, sizes, moved = self.transform(images, prepared)
        with weight_precision(self.levels.embedding):
            outputs = self.predict(batch.to(device), sizes)
        boxes = [_normalize(t["boxes"], size) for t, size in zip(moved, sizes, strict=True)]
        regions = [_normalize(t.get("ignored"), size) for t, size in zip(moved, sizes, strict=True)]
        objects = Objects.from_lists(boxes, [t["labels"] for t in moved], self.objects_multiple, regions).to(device)
        losses: dict[str, Tensor] = self.criterion(outputs.decoder, objects, outputs.proposals)
        return losses

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
            outputs = self._run(self.levels(self.backbone, images, sizes, frames))
        return self.select(outputs, images, sizes)

    def predict(self, batch: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Outputs:
        """Run backbone, encoder and decoder on a batch.

        Args:
            batch: normalised images, float [B, C, H, W], H and W multiples of the largest stride, zero on padding.
            sizes: (height, width) of every image without its padding; None if no image is padded.
        """
        return self._run(self.levels(self.backbone, batch, *self.levels.place(batch, sizes)))

    def _run(self, levels: Levels) -> Outputs:
        memory = self.encoder(levels)
        proposals = usable = None
        if self.proposer is not None:
            heads = self.class_heads[-1], self.box_heads[-1]
            proposed = self.proposer(memory, levels, *heads, self.num_queries)
            proposals, reference_points, queries, positions, usable = proposed
        else:
            positions, queries = self.query_embedding.weight.expand(memory.shape[0], -1, -1).chunk(2, -1)
            reference_points = apply_in_full_precision(self.reference_points, positions).sigmoid()
        depth = len(self.decoder.layers)
        box_heads = [self.box_heads[i % len(self.box_heads)] for i in range(depth)]
        hidden, boxes = self.decoder(queries, positions, reference_points, memory, levels, box_heads, usable)
        class_heads = [self.class_heads[i % len(self.class_heads)] for i in range(depth)]
        logits = [apply_in_full_precision(head, x) for head, x in zip(class_heads, hidden, strict=True)]
        return Outputs(Predictions(torch.stack(logits), torch.stack(boxes)), proposals, usable)

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
        each = zip(boxes.nan_to_num(), scores.nan_to_num(), labels, scores >= 0, strict=True)
        found = join_detections([self.selection(b[u], s[u], x[u]) for b, s, x, u in each], rows)
        # what is not finite reaches the result, where `forward` checks it, also if it was not selected
        broken_scores, broken_boxes = 0 * scores.sum(1, keepdim=True), 0 * boxes.sum((1, 2), keepdim=True)
        return found._replace(boxes=found.boxes + broken_boxes, scores=found.scores + broken_scores)

    def _restore(
        self, found: TensorDetections, sizes: list[tuple[int, int]], images: Sequence[Tensor] | Tensor
    ) -> list[Detection]:
        originals = [(x.shape[-2], x.shape[-1]) for x in images]
        restored = self.transform.restore(split_detections(found), sizes, originals)
        for detection, size in zip(restored, originals, strict=True):
            detection["boxes"] = clip_boxes_to_image(detection["boxes"], size)
        return restored


def _check_variant(hidden_dim: int, num_heads: int, two_stage: bool, box_refinement: bool) -> None:
    if hidden_dim % num_heads:
        raise ValueError(f"hidden_dim {hidden_dim} cannot be divided among {num_heads} heads; choose a multiple of it")
    if hidden_dim % 32:
        raise ValueError(f"hidden_dim is {hidden_dim}; GroupNorm needs a multiple of 32")
    if two_stage and not box_refinement:
        raise ValueError("two_stage=True needs box_refinement=True: the decoder refines the proposed boxes")


def _normalize(boxes: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Turn corners in pixels of an image of (height, width) into centre and size in 0..1; None means no boxes."""
    height, width = size
    boxes = torch.zeros(0, 4) if boxes is None else boxes
    relative: Tensor = box_convert(boxes / boxes.new_tensor([width, height, width, height]), "xyxy", "cxcywh")
    return relative
