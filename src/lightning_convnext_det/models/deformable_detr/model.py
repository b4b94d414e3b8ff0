"""Deformable DETR (arXiv:2010.04159) on any timm backbone: plain, with iterative box refinement, or in two stages.

Checked against the authors' implementation (fundamentalvision/Deformable-DETR), Hugging Face's port and birder's
variant; `lightning_convnext_det.convert` imports the weights of all three. By default the detections of an image do not
depend on the other images of its batch: the backbone and the projections, whose norms average over whole feature maps,
run on every image without the padding that its neighbours need. `independent_images=False` pads first, as all three do.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_convnext_det.arguments import Count, Fraction, NonNegative, NonNegativeInt, Positive, check_arguments
from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.class_weights import weight_classes
from lightning_convnext_det.models.deformable_detr.criterion import Objects, PerLoss, Predictions, SetCriterion
from lightning_convnext_det.models.deformable_detr.detector import Outputs, QueryDetector
from lightning_convnext_det.models.deformable_detr.heads import (
    apply_in_full_precision,
    create_heads,
    last_layer,
    reset_heads,
)
from lightning_convnext_det.models.deformable_detr.levels import Levels, PyramidLevels
from lightning_convnext_det.models.deformable_detr.proposals import Proposer
from lightning_convnext_det.models.deformable_detr.transformer import (
    Decoder,
    Encoder,
    check_width,
    reset_transformer,
)
from lightning_convnext_det.models.image_transform import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from lightning_convnext_det.models.selection import Selection
from lightning_convnext_det.ops.nms import NMSMethod


class DeformableDETR(QueryDetector):
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
        class_weights: factor of the focal loss of queries that are matched with an object of each class, in order of
            label; None for 1 each.

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
        class_weights: Sequence[NonNegative] | None = None,
    ) -> None:
        super().__init__()
        check_arguments(DeformableDETR.__init__, locals())
        check_width(hidden_dim, num_heads)
        if two_stage and not box_refinement:
            raise ValueError("two_stage=True needs box_refinement=True: the decoder refines the proposed boxes")
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
        weights = weight_classes(class_weights, num_classes)
        self.criterion = SetCriterion(loss_weights, matching_costs, auxiliary_losses, class_weights=weights)

    def _add_heads(self, hidden_dim: int, two_stage: bool) -> None:
        self.proposer = Proposer(hidden_dim) if two_stage else None
        if not two_stage:
            self.query_embedding = nn.Embedding(self.num_queries, hidden_dim * 2)
            self.reference_points = nn.Linear(hidden_dim, 2)
        # without refinement all layers share their heads; with two stages the last pair belongs to the encoder
        heads = len(self.decoder.layers) + two_stage if self.decoder.box_refinement else 1
        self.class_heads, self.box_heads = create_heads(hidden_dim, self.num_classes, heads)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        reset_transformer(self.encoder, self.decoder, self.proposer)
        reset_heads(self.class_heads, self.box_heads)
        if self.proposer is None:
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)
            nn.init.constant_(last_layer(self.box_heads[0]).bias[2:], -2.0)  # boxes 12 % of the image wide and high

    def compute_losses(self, levels: Levels, objects: Objects) -> dict[str, Tensor]:
        """Compute the losses of `SetCriterion` from the tokens of a batch and its ground truth."""
        outputs = self.decode(levels)
        losses: dict[str, Tensor] = self.criterion(outputs.decoder, objects, outputs.proposals)
        return losses

    def decode(self, levels: Levels) -> Outputs:
        """Predict classes and boxes from the tokens of a batch."""
        memory = self.encoder(levels)
        proposals = usable = None
        if self.proposer is not None:
            heads = self.class_heads[-1], self.box_heads[-1]
            proposed = self.proposer(memory, levels, *heads, self.num_queries)
            proposals, reference_points, usable = proposed
            queries, positions = self.proposer.encode(reference_points)
        else:
            positions, queries = self.query_embedding.weight.expand(memory.shape[0], -1, -1).chunk(2, -1)
            reference_points = apply_in_full_precision(self.reference_points, positions).sigmoid()
        depth = len(self.decoder.layers)
        box_heads = [self.box_heads[i % len(self.box_heads)] for i in range(depth)]
        hidden, boxes = self.decoder(queries, positions, reference_points, memory, levels, box_heads, usable)
        class_heads = [self.class_heads[i % len(self.class_heads)] for i in range(depth)]
        logits = [apply_in_full_precision(head, x) for head, x in zip(class_heads, hidden, strict=True)]
        return Outputs(Predictions(torch.stack(logits), torch.stack(boxes)), proposals, usable)
