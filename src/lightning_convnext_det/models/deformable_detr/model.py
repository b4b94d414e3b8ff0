"""Deformable DETR (arXiv:2010.04159) on any timm pyramid: plain, with iterative box refinement, or in two stages.

Checked against the authors' implementation (fundamentalvision/Deformable-DETR), Hugging Face's port and birder's
variant; `lightning_convnext_det.convert` imports the weights of all three. By default an image's result does not
depend on the other images of its batch: the backbone and the projections, whose norms look at whole maps, see every
image without the padding that its neighbours need. `independent_images=False` pads first, as all three do.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import MLP, box_convert, clip_boxes_to_image

from lightning_convnext_det.errors import DivergenceError
from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.deformable_detr.criterion import (
    Objects,
    Predictions,
    SetCriterion,
    corners,
    prior_bias,
)
from lightning_convnext_det.models.deformable_detr.levels import PyramidLevels
from lightning_convnext_det.models.deformable_detr.transformer import (
    Decoder,
    DecoderLayer,
    DeformableAttention,
    Encoder,
    EncoderLayer,
    Proposer,
    apply_in_full_precision,
)
from lightning_convnext_det.models.image_transform import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from lightning_convnext_det.models.target_check import check_targets
from lightning_convnext_det.ops.nms import NMSMethod, apply_nms, check_nms_method
from lightning_convnext_det.types import Detection, Target


class Outputs(NamedTuple):
    """What the network says before detections are chosen from it."""

    decoder: Predictions
    """Of every decoder layer."""
    proposals: Predictions | None
    """Of the encoder, one per token, in the two-stage variant."""
    usable: Tensor | None = None
    """False on queries of the two-stage variant that a small image has no token for, bool [B, Q]; None: all are."""


class DeformableDETR(nn.Module):
    """Deformable DETR.

    Args:
        num_classes: foreground classes; labels run from 0 to ``num_classes - 1``.
        backbone: timm name of the backbone, e.g. ``convnextv2_tiny``, ``resnet50``.
        pretrained_backbone: start from timm's pretrained weights of the backbone.
        backbone_weights: start from a local weight file of the backbone instead.
        drop_path_rate: stochastic depth of the backbone; 0 leaves its default.
        stem_eps: added to the variance in the backbone's first LayerNorm; 0 leaves timm's value, 1e-6 for ConvNeXt;
            birder's ConvNeXt has 1e-5, which shows where an image is flat.
        frozen_stages: freeze the backbone up to this stage.
        batch_norm: ``frozen`` or ``train``, for the BatchNorms of the backbone.
        gradient_checkpointing: trade time for memory in the backbone and the encoder.
        channels_last: memory format of the convolutions.
        strides: strides of the backbone's maps that the encoder sees; the paper uses 8, 16, 32.
        extra_levels: further levels, each half as large as the one before; the paper uses one, at stride 64.
        num_queries: how many objects can be found in an image.
        hidden_dim: channels of the transformer; a multiple of 32 and of ``num_heads``.
        num_heads: attention heads.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        encoder_points: points per head and level that a token of the encoder looks at.
        decoder_points: points per head and level that a query looks at.
        feedforward_dim: width of the feed-forward blocks.
        dropout: dropout in the transformer.
        box_refinement: let every decoder layer correct the boxes of the one before; else all correct the same points.
        two_stage: let the encoder propose the boxes that the decoder starts from; needs ``box_refinement``.
        auxiliary_losses: train every decoder layer, not only the last.
        loss_weights: factors of the losses: classification (focal), box (L1 in 0..1) and generalised IoU.
        matching_costs: factors of the same three in the cost by which queries are matched with objects.
        position_offset: 0.5 encodes the centre of every cell, as the paper's authors do; 0.0 its far edge, as birder.
        independent_images: keep an image's result independent of its batch; else pad before the backbone, which is
            faster on GPUs where sizes differ.
        fixed_size: (height, width) in pixels that every batch is padded to, after images are resized to fit into it:
            for devices that compile anew for each shape, such as TPUs. Multiples of the largest stride.
        objects_multiple: fill the objects of an image up to a multiple of this, for the same devices.
        min_size: shorter side of the resized image in pixels; of several, one is drawn per image in training and
            the last is used in evaluation.
        max_size: limit of the longer side in pixels.
        image_mean: mean per channel, for images in 0..1.
        image_std: standard deviation per channel.
        score_threshold: detections with a lower score are dropped.
        nms: what happens to overlapping detections of a class: ``none``, ``hard`` drops the weaker, ``soft`` lowers its
            score.
        nms_threshold: IoU above which ``hard`` drops.
        soft_nms_sigma: width of the Gaussian by which ``soft`` lowers scores, in squared IoU; smaller suppresses more.
        detections_per_image: how many detections are kept per image.
        in_chans: channels of the images.

    Raises:
        ValueError: if an argument does not fit the others or the backbone.

    Reference:
        Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", arXiv:2010.04159.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "convnextv2_tiny",
        pretrained_backbone: bool = False,
        backbone_weights: str | None = None,
        drop_path_rate: float = 0.0,
        stem_eps: float = 0.0,
        frozen_stages: int = 0,
        batch_norm: Literal["frozen", "train"] = "frozen",
        gradient_checkpointing: bool = False,
        channels_last: bool = True,
        strides: Sequence[int] = (4, 8, 16, 32),
        extra_levels: int = 0,
        num_queries: int = 300,
        hidden_dim: int = 256,
        num_heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        encoder_points: int = 4,
        decoder_points: int = 4,
        feedforward_dim: int = 1024,
        dropout: float = 0.1,
        box_refinement: bool = True,
        two_stage: bool = False,
        auxiliary_losses: bool = True,
        loss_weights: Sequence[float] = (2.0, 5.0, 2.0),
        matching_costs: Sequence[float] = (2.0, 5.0, 2.0),
        position_offset: float = 0.5,
        independent_images: bool = True,
        fixed_size: list[int] | None = None,
        objects_multiple: int = 1,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        score_threshold: float = 0.0,
        nms: NMSMethod = "none",
        nms_threshold: float = 0.7,
        soft_nms_sigma: float = 0.5,
        detections_per_image: int = 100,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        _check_sizes(num_classes, hidden_dim, num_heads)
        if two_stage and not box_refinement:
            raise ValueError("two_stage=True needs box_refinement=True: the decoder refines the proposed boxes")
        check_nms_method(nms)
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.auxiliary_losses = auxiliary_losses
        self.nms, self.nms_threshold, self.soft_nms_sigma = nms, nms_threshold, soft_nms_sigma
        self.score_threshold = score_threshold
        self.detections_per_image = detections_per_image
        self.objects_multiple = objects_multiple
        self.transform = ImageTransform(
            min_size, max_size, image_mean, image_std, size_divisible=max(strides), fixed_size=fixed_size
        )
        self.backbone = TimmPyramid(
            backbone,
            pretrained=pretrained_backbone,
            weights=backbone_weights,
            in_chans=in_chans,
            strides=strides,
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            batch_norm=batch_norm,
            gradient_checkpointing=gradient_checkpointing,
            channels_last=channels_last,
        )
        if stem_eps:
            _set_stem_eps(self.backbone, stem_eps)
        levels = len(self.backbone.channels) + extra_levels
        self.levels = PyramidLevels(
            self.backbone.channels,
            extra_levels,
            hidden_dim,
            position_offset,
            independent_images=independent_images and not fixed_size,
            always_masked=bool(fixed_size),
        ).to(memory_format=self.backbone.memory_format)
        encoder = (hidden_dim, num_heads, levels, encoder_points, feedforward_dim, dropout)
        decoder = (hidden_dim, num_heads, levels, decoder_points, feedforward_dim, dropout)
        self.encoder = Encoder([EncoderLayer(*encoder) for _ in range(encoder_layers)], gradient_checkpointing)
        self.decoder = Decoder([DecoderLayer(*decoder) for _ in range(decoder_layers)], box_refinement)
        self.proposer = Proposer(hidden_dim) if two_stage else None
        if not two_stage:
            self.query_embedding = nn.Embedding(num_queries, hidden_dim * 2)
            self.reference_points = nn.Linear(hidden_dim, 2)
        # without refinement all layers share their heads; with two stages the last pair belongs to the encoder
        heads = decoder_layers + two_stage if box_refinement else 1
        self.class_heads = nn.ModuleList(nn.Linear(hidden_dim, num_classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(
            MLP(hidden_dim, [hidden_dim, hidden_dim, 4], inplace=False) for _ in range(heads)
        )
        self.criterion = SetCriterion(loss_weights, matching_costs)
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

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> dict[str, Tensor] | list[Detection]:
        """Compute the losses in training mode, the detections in evaluation mode.

        Args:
            images: uint8 or float in 0..1, each [C, H, W] of its own size; resized where they are, then moved to the
                device of the network. An XLA device would compile anew for each size: leave them on the CPU there.
            targets: the objects of each image, in training.

        Returns:
            In training the weighted losses of `SetCriterion`, float32 scalars whose sum is the objective; else one
            `Detection` per image.

        Raises:
            DataError: if a target has a box that is not finite or has no area, or a label out of range.
            DivergenceError: if logits or boxes are not finite.
        """
        device = self.levels.embedding.device
        if not self.training:
            batch, sizes, _ = self.transform(images)
            found = self.select(self.predict(batch.to(device), sizes), sizes)
            return self._restore(found, sizes, images)
        if targets is None:
            raise ValueError("a detector in training mode needs targets; call eval() to predict")
        check_targets(images, targets, self.num_classes)
        batch, sizes, moved = self.transform(images, targets)
        outputs = self.predict(batch.to(device), sizes)
        boxes = [_normalize(t["boxes"], size) for t, size in zip(moved, sizes, strict=True)]
        objects = Objects.from_lists(boxes, [t["labels"] for t in moved], self.objects_multiple).to(device)
        decoder = outputs.decoder
        if not self.auxiliary_losses:
            decoder = Predictions(decoder.logits[-1:], decoder.boxes[-1:])
        losses: dict[str, Tensor] = self.criterion(decoder, objects, outputs.proposals)
        return losses

    def predict(self, batch: Tensor, sizes: list[tuple[int, int]] | None = None) -> Outputs:
        """Run the network.

        Args:
            batch: normalised images, float [B, C, H, W], H and W multiples of the largest stride, zeros where padded.
            sizes: (height, width) of every image without its padding; None if all fill the batch.
        """
        levels = self.levels(self.backbone, batch, sizes)
        memory = self.encoder(levels)
        proposals = usable = None
        if self.proposer is not None:
            heads = self.class_heads[-1], self.box_heads[-1]
            proposed = self.proposer(memory, levels, *heads, self.num_queries)
            proposals, reference_points, queries, positions, usable = proposed
        else:
            positions, queries = self.query_embedding.weight.expand(len(batch), -1, -1).chunk(2, -1)
            reference_points = apply_in_full_precision(self.reference_points, positions).sigmoid()
        depth = len(self.decoder.layers)
        box_heads = [self.box_heads[i % len(self.box_heads)] for i in range(depth)]
        hidden, boxes = self.decoder(queries, positions, reference_points, memory, levels, box_heads, usable)
        class_heads = [self.class_heads[i % len(self.class_heads)] for i in range(depth)]
        logits = [apply_in_full_precision(head, x) for head, x in zip(class_heads, hidden, strict=True)]
        return Outputs(Predictions(torch.stack(logits), torch.stack(boxes)), proposals, usable)

    def select(self, outputs: Outputs, sizes: list[tuple[int, int]]) -> list[Detection]:
        """Choose the best classes and boxes of the last layer, in pixels of images of ``sizes`` (height, width).

        They are on the CPU where the network is on an XLA device.

        Raises:
            DivergenceError: if a score or box is not finite.
        """
        logits, boxes = outputs.decoder.logits[-1], outputs.decoder.boxes[-1]
        best = min(self.detections_per_image, logits[0].numel())
        scores = logits.sigmoid()  # [B, Q, C]
        if outputs.usable is not None:
            scores = scores.masked_fill(~outputs.usable[:, :, None], -1.0)
        scores, index = scores.flatten(1).topk(best)  # [B, best]
        boxes = corners(boxes).gather(1, (index // self.num_classes)[:, :, None].expand(-1, -1, 4))
        if boxes.device.type == "xla":  # what follows has as many boxes as are found: not for a device of fixed shapes
            packed = torch.cat([boxes, scores[..., None], index[..., None].to(boxes.dtype)], -1).cpu()
            boxes, scores, index = packed[..., :4], packed[..., 4], packed[..., 5].to(torch.int64)
        boxes = boxes * boxes.new_tensor([[w, h, w, h] for h, w in sizes])[:, None]
        for name, values in (("scores", scores), ("boxes", boxes)):
            if not bool(values.isfinite().all()):
                raise DivergenceError(f"[LCD-N001] the {name} are not finite: the weights have diverged or are damaged")
        labels = index % self.num_classes
        return [self._suppress(*each) for each in zip(boxes, scores, labels, strict=True)]

    def _suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Detection:
        """Apply the chosen suppression and threshold to the detections of one image; negative scores are none."""
        found = scores >= 0
        boxes, scores, labels = boxes[found], scores[found], labels[found]
        boxes, scores, labels = apply_nms(boxes, scores, labels, self.nms, self.nms_threshold, self.soft_nms_sigma)
        keep = scores >= self.score_threshold
        return Detection(boxes=boxes[keep], labels=labels[keep], scores=scores[keep])

    def _restore(
        self, detections: list[Detection], sizes: list[tuple[int, int]], images: list[Tensor]
    ) -> list[Detection]:
        originals = [(x.shape[-2], x.shape[-1]) for x in images]
        restored = self.transform.restore(detections, sizes, originals)
        for detection, size in zip(restored, originals, strict=True):
            detection["boxes"] = clip_boxes_to_image(detection["boxes"], size)
        return restored


def _check_sizes(num_classes: int, hidden_dim: int, num_heads: int) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it counts foreground classes and must be at least 1")
    if num_heads < 1 or hidden_dim % num_heads:
        raise ValueError(f"hidden_dim {hidden_dim} cannot be divided among {num_heads} heads; choose a multiple of it")
    if hidden_dim % 32:
        raise ValueError(f"hidden_dim is {hidden_dim}; GroupNorm needs a multiple of 32")


def _set_stem_eps(backbone: TimmPyramid, eps: float) -> None:
    norm = next((m for m in backbone.modules() if isinstance(m, nn.LayerNorm)), None)
    if norm is None:
        raise ValueError(f"stem_eps is {eps}, but backbone '{backbone.name}' has no LayerNorm; leave it at 0")
    norm.eps = eps


def _normalize(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn corners in pixels of an image of (height, width) into centre and size in 0..1."""
    height, width = size
    relative: Tensor = box_convert(boxes / boxes.new_tensor([width, height, width, height]), "xyxy", "cxcywh")
    return relative
