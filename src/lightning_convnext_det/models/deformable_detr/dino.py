"""DINO (arXiv:2203.03605) on any timm backbone: two-stage Deformable DETR with denoising queries.

Levels, encoder, attention, decoder layers and matching are those of Deformable DETR. Checked against detrex's
implementation, whose weights `lightning_convnext_det.convert` imports. Unlike there, the detections of an image do not
depend on the other images of its batch by default, as for `DeformableDETR`.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from lightning_convnext_det.arguments import Count, Fraction, NonNegative, NonNegativeInt, Positive, check_arguments
from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.class_weights import weight_classes
from lightning_convnext_det.models.deformable_detr.criterion import Objects, PerLoss, Predictions
from lightning_convnext_det.models.deformable_detr.denoising import Denoising, DenoisingQueries, block_attention
from lightning_convnext_det.models.deformable_detr.detector import Outputs, QueryDetector
from lightning_convnext_det.models.deformable_detr.dino_criterion import DINOCriterion
from lightning_convnext_det.models.deformable_detr.dino_decoder import LookForwardTwiceDecoder
from lightning_convnext_det.models.deformable_detr.heads import apply_in_full_precision, create_heads, reset_heads
from lightning_convnext_det.models.deformable_detr.levels import Levels, PyramidLevels
from lightning_convnext_det.models.deformable_detr.proposals import QuerySelection
from lightning_convnext_det.models.deformable_detr.transformer import Encoder, check_width, reset_transformer
from lightning_convnext_det.models.image_transform import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageTransform,
    Resize,
    scale_boxes,
)
from lightning_convnext_det.models.selection import Selection
from lightning_convnext_det.ops.nms import NMSMethod
from lightning_convnext_det.types import Detection, TensorDetections


class DINO(QueryDetector):
    """DINO: Deformable DETR whose queries start from the encoder's best boxes and learn from noisy objects.

    Takes a list of images, uint8 or float in 0..1, each [C, H, W] of its own size, and resizes and normalises them
    itself. In training mode it also takes a list of `Target`s and returns the weighted losses, float32 scalars whose
    sum is the objective. In evaluation mode it returns one `Detection` per image: ``boxes`` float32 [N, 4] as
    (x1, y1, x2, y2) in pixels of the image given, ``labels`` int64 [N] from 0 to ``num_classes - 1`` and ``scores``
    float32 [N] in 0..1, by descending score. A query may be detected as several classes.

    >>> import torch
    >>> detector = DINO(2, "test_convnext", num_queries=8, hidden_dim=32, encoder_layers=1, decoder_layers=2,
    ...                 min_size=64, max_size=96)
    >>> images = [torch.rand(3, 60, 80), torch.zeros(3, 64, 48, dtype=torch.uint8)]
    >>> target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    >>> sorted(detector(images, [target, target]))[:5]
    ['loss_box', 'loss_box_aux0', 'loss_box_denoising', 'loss_box_denoising_aux0', 'loss_box_proposals']
    >>> detections = detector.eval()(images)
    >>> len(detections), tuple(detections[0]["boxes"].shape), detections[0]["labels"].dtype
    (2, (16, 4), torch.int64)

    Args:
        num_classes: foreground classes; labels run from 0 to ``num_classes - 1``.
        backbone: timm name of the backbone, e.g. ``convnext_tiny``, ``resnet50``.
        pretrained_backbone: start from timm's pretrained weights of the backbone.
        backbone_weights: start from a local weight file of the backbone instead.
        drop_path_rate: stochastic depth of the backbone; 0 keeps the default of the backbone.
        out_norm: LayerNorm on every feature map of the backbone, as detrex's ConvNeXt has.
        frozen_stages: how many stages of the backbone to freeze, from the finest; frozen BatchNorms keep their
            statistics.
        batch_norm: ``frozen`` or ``train``, for the BatchNorms of the backbone.
        gradient_checkpointing: trade time for memory in the backbone and the encoder.
        channels_last: memory format of the convolutions.
        strides: strides of the feature maps that the encoder reads; the 5-scale variant has 4, 8, 16, 32.
        extra_levels: coarser levels to add, each half the size of the previous.
        num_queries: number of proposals that the decoder starts from, the most objects that can be found in an image.
        hidden_dim: channels of the transformer; a multiple of 32 and of ``num_heads``.
        num_heads: attention heads.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers.
        encoder_points: sampling points per head and level in the encoder.
        decoder_points: sampling points per head and level in the decoder.
        feedforward_dim: width of the feed-forward blocks.
        dropout: dropout in the transformer.
        denoising_queries: about how many noisy copies of objects the decoder also learns from, per image and kind; 0
            for none.
        label_noise: twice the share of copies whose label is replaced by a random one.
        box_noise: how far the sides of copies move at most, in halves of the box; copies that move up to twice as far
            are to detect nothing.
        dense_proposals: train the proposals of all tokens, as two-stage Deformable DETR does, and not only those that
            are chosen, as detrex: from random weights the choice says little at first, and learns faster this way.
        auxiliary_losses: train every decoder layer, not only the last.
        loss_weights: factors of the losses: classification (focal), box (L1 in 0..1) and generalised IoU.
        matching_costs: factors of the same three in the cost by which queries are matched with objects.
        position_offset: position encoding of a cell by its centre (0.5, as detrex) or its far edge (0.0, as the
            authors and MMDetection).
        position_temperature: base of the position encoding of cells; 20 for the authors and MMDetection.
        independent_images: detections of an image do not depend on its batch; else images are padded before the
            backbone, which is faster on GPUs where sizes differ, and queries know of the padding, as in detrex.
        fixed_size: (height, width) in pixels that every batch is padded to, after images are resized to fit into it:
            for devices that compile again for each shape, such as TPUs. Multiples of the largest stride.
        objects_multiple: pad the objects of an image to a multiple of this, for the same devices.
        size_divisible: pad batches to a multiple of this; the largest stride if not given, 1 as detrex does.
        min_size: shorter side of the resized image in pixels; of several, one is drawn per image in training and
            the last is used in evaluation.
        max_size: limit of the longer side in pixels.
        image_mean: mean per channel, for images in 0..1.
        image_std: standard deviation per channel.
        resize: ``torchvision`` interpolates normalised images, ``pillow`` 8-bit ones with antialiasing as detrex,
            ``opencv`` 8-bit ones as MMDetection.
        score_threshold: detections with a score that is not higher are dropped.
        nms: treatment of overlapping detections of a class: ``none`` keeps them, ``hard`` drops the one with the lower
            score, ``soft`` lowers its score.
        nms_threshold: IoU above which ``hard`` drops.
        soft_nms_sigma: width of the Gaussian by which ``soft`` lowers scores, in squared IoU; smaller lowers more.
        detections_per_image: the most detections per image; those without area in the image are dropped of these.
        in_chans: channels of the images.
        class_weights: factor of the focal loss of queries that are matched with an object of each class, in order of
            label; None for 1 each.

    Raises:
        ValueError: if an argument does not fit the others or the backbone.

    Reference:
        Zhang et al., "DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection",
        arXiv:2203.03605. Defaults are those of detrex's 4-scale models.
    """

    def __init__(
        self,
        num_classes: Count,
        backbone: str = "convnext_tiny",
        pretrained_backbone: bool = False,
        backbone_weights: str | None = None,
        drop_path_rate: Fraction = 0.0,
        out_norm: bool = True,
        frozen_stages: NonNegativeInt = 0,
        batch_norm: Literal["frozen", "train"] = "frozen",
        gradient_checkpointing: bool = False,
        channels_last: bool = True,
        strides: Sequence[Count] = (8, 16, 32),
        extra_levels: NonNegativeInt = 1,
        num_queries: Count = 900,
        hidden_dim: Count = 256,
        num_heads: Count = 8,
        encoder_layers: Count = 6,
        decoder_layers: Count = 6,
        encoder_points: Count = 4,
        decoder_points: Count = 4,
        feedforward_dim: Count = 2048,
        dropout: Fraction = 0.0,
        denoising_queries: NonNegativeInt = 100,
        label_noise: Fraction = 0.5,
        box_noise: NonNegative = 1.0,
        dense_proposals: bool = False,
        auxiliary_losses: bool = True,
        loss_weights: PerLoss = (1.0, 5.0, 2.0),
        matching_costs: PerLoss = (2.0, 5.0, 2.0),
        position_offset: float = 0.5,
        position_temperature: Positive = 10000.0,
        independent_images: bool = True,
        fixed_size: list[int] | None = None,
        objects_multiple: Count = 1,
        size_divisible: Count | None = None,
        min_size: Count | list[Count] = 800,
        max_size: Count = 1333,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        resize: Resize = "torchvision",
        score_threshold: Fraction = 0.0,
        nms: NMSMethod = "none",
        nms_threshold: Fraction = 0.7,
        soft_nms_sigma: Positive = 0.5,
        detections_per_image: Count = 300,
        in_chans: Count = 3,
        class_weights: Sequence[NonNegative] | None = None,
    ) -> None:
        super().__init__()
        check_arguments(DINO.__init__, locals())
        check_width(hidden_dim, num_heads)
        self.num_classes, self.num_queries, self.objects_multiple = num_classes, num_queries, objects_multiple
        self.selection = Selection(score_threshold, nms, nms_threshold, soft_nms_sigma, detections_per_image)
        self.transform = ImageTransform(
            min_size, max_size, image_mean, image_std, in_chans, size_divisible or max(strides), fixed_size, resize,
            smallest_side=max(strides))  # fmt: skip
        self.backbone = TimmPyramid(
            backbone, pretrained=pretrained_backbone, weights=backbone_weights, in_chans=in_chans, strides=strides,
            drop_path_rate=drop_path_rate, out_norm=out_norm, frozen_stages=frozen_stages, batch_norm=batch_norm,
            gradient_checkpointing=gradient_checkpointing, channels_last=channels_last,
            size_divisible=size_divisible)  # fmt: skip
        self.levels = PyramidLevels(
            self.backbone, extra_levels, hidden_dim, position_offset, independent_images, bool(fixed_size),
            position_temperature)  # fmt: skip
        layer = (hidden_dim, num_heads, len(self.levels.projections), feedforward_dim, dropout)
        self.encoder = Encoder(encoder_layers, (*layer, encoder_points), gradient_checkpointing)
        self.proposer = QuerySelection(hidden_dim, dense_proposals)
        self.query_embedding = nn.Embedding(num_queries, hidden_dim)
        self.decoder = LookForwardTwiceDecoder(
            decoder_layers, (*layer, decoder_points), position_in_map=not independent_images)  # fmt: skip
        self.class_heads, self.box_heads = self._create_heads(hidden_dim, decoder_layers + 1)  # the last of proposals
        self.denoising = (
            Denoising(num_classes, hidden_dim, denoising_queries, label_noise, box_noise) if denoising_queries else None
        )
        reset_transformer(self.encoder, self.proposer, self.query_embedding, self.decoder)
        weights = weight_classes(class_weights, num_classes)
        self.criterion = DINOCriterion(loss_weights, matching_costs, auxiliary_losses, class_weights=weights)

    def _create_heads(self, hidden_dim: int, count: int) -> tuple[nn.ModuleList, nn.ModuleList]:
        """Create the heads of all layers, which start as copies of one, as detrex's do."""
        first = create_heads(hidden_dim, self.num_classes, 1)
        reset_heads(*first)
        class_heads, box_heads = (nn.ModuleList(deepcopy(heads[0]) for _ in range(count)) for heads in first)
        return class_heads, box_heads

    def decode(self, levels: Levels) -> Outputs:
        """Predict classes and boxes from the tokens of a batch."""
        return self._decode(levels, None)[0]

    def compute_losses(self, levels: Levels, objects: Objects) -> dict[str, Tensor]:
        """Compute the losses of `DINOCriterion` from the tokens of a batch and its ground truth."""
        queries = None if self.denoising is None else self.denoising(objects)
        outputs, denoised = self._decode(levels, queries)
        groups = 1 if queries is None else queries.groups
        losses: dict[str, Tensor] = self.criterion(outputs.decoder, objects, outputs.proposals, denoised, groups)
        return losses

    def _decode(self, levels: Levels, noisy: DenoisingQueries | None) -> tuple[Outputs, Predictions | None]:
        """Predict for the queries and for denoising queries, which run through the decoder in front of them."""
        memory = self.encoder(levels)
        class_heads, box_heads = list(self.class_heads), list(self.box_heads)
        proposals, boxes, usable = self.proposer(memory, levels, class_heads.pop(), box_heads.pop(), self.num_queries)
        count = boxes.shape[1]
        contents, blocked, attended = self.query_embedding.weight[:count].expand(boxes.shape[0], -1, -1), None, usable
        if noisy is not None:
            contents = torch.cat([noisy.contents, contents], 1)
            boxes = torch.cat([noisy.box_logits.sigmoid(), boxes], 1)
            blocked = block_attention(noisy, count)
            attended = torch.cat([torch.ones_like(noisy.box_logits[..., 0], dtype=torch.bool), usable], 1)
        hidden, decoded = self.decoder(contents, boxes, memory, levels, box_heads, attended, blocked)
        logits = [apply_in_full_precision(head, x) for head, x in zip(class_heads, hidden, strict=True)]
        predictions = Predictions(torch.stack(logits), torch.stack(decoded))
        own = Predictions(*(x[:, :, -count:] for x in predictions))
        denoised = None if noisy is None else Predictions(*(x[:, :, :-count] for x in predictions))
        return Outputs(own, proposals, usable), denoised

    def restore(
        self, found: TensorDetections, sizes: list[tuple[int, int]], images: Sequence[Tensor] | Tensor
    ) -> list[Detection]:
        """Turn detections in a batch of resized images into those of the images given, those with area only."""
        originals = [(x.shape[-2], x.shape[-1]) for x in images]
        frames = zip(found.boxes, sizes, originals, strict=True)
        boxes = torch.stack([clip_boxes_to_image(scale_boxes(own, size, to), to) for own, size, to in frames])
        has_area = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        has_area &= torch.arange(boxes.shape[1], device=boxes.device) < found.count[:, None]  # [B, K]
        order = (~has_area).to(torch.uint8).argsort(dim=1, stable=True)  # those with area first
        first = TensorDetections(
            _take(found.boxes, order), found.scores.gather(1, order), found.labels.gather(1, order), has_area.sum(1)
        )
        return super().restore(first, sizes, images)


def _take(boxes: Tensor, order: Tensor) -> Tensor:
    return boxes.gather(1, order[..., None].expand(-1, -1, 4))
