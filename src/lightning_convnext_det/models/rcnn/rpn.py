"""Region proposal network (Faster R-CNN, arXiv:1506.01497, section 3), derived from torchvision's."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from lightning_convnext_det.models.rcnn.anchors import create_anchors
from lightning_convnext_det.models.rcnn.box_coder import clip_boxes, create_box_coder
from lightning_convnext_det.models.rcnn.box_losses import create_delta_loss
from lightning_convnext_det.models.rcnn.conventions import Convention
from lightning_convnext_det.models.rcnn.matcher import (
    BoxPairs,
    Sampling,
    count_samples,
    create_anchor_matcher,
    draw_samples,
    leave_out_ignored,
    take_objects,
)
from lightning_convnext_det.ops.batch_nms import batch_nms, fill_rows, group_images, has_kernel, nms_of_levels
from lightning_convnext_det.types import Target

_DIVISOR = 32  # images are padded to a multiple of this


class Proposals(NamedTuple):
    """Boxes that may hold an object, by descending objectness; zeros beyond ``count``."""

    boxes: Tensor
    """Corners in pixels of the batch, float32 [B, P, 4]; P is the most that an image can have."""
    scores: Tensor
    """Objectness in [0, 1], float32 [B, P]."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    """How many each image has, int64 [B]."""


class ProposalLimits(NamedTuple):
    """Which proposals are kept."""

    pre_nms_top_n: tuple[int, int]
    """How many per level before NMS, in training and in evaluation."""
    post_nms_top_n: tuple[int, int]
    """How many per image after NMS, in training and in evaluation."""
    nms_threshold: float
    """IoU above which the weaker of two is dropped."""
    score_threshold: float
    """Proposals below this objectness are dropped."""


class ProposalNetwork(RegionProposalNetwork):
    """Region proposal network: feature maps in, boxes that may hold an object out.

    Args:
        strides: strides of the feature maps but for the pooled one on top.
        channels: channels of the feature maps.
        anchor_sizes: side lengths of the anchors in pixels, one group for each feature map.
        aspect_ratios: height over width of the anchors.
        convention: torchvision's or MMDetection's details.
        sampling: which anchors train.
        limits: which proposals are kept.
    """

    def __init__(
        self,
        strides: Sequence[int],
        channels: int,
        anchor_sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float],
        convention: Convention,
        sampling: Sampling,
        limits: ProposalLimits,
    ) -> None:
        anchors = create_anchors(strides, anchor_sizes, aspect_ratios, convention)
        super().__init__(
            anchors,
            FloatRPNHead(channels, anchors.num_anchors_per_location()[0]),
            *sampling,
            dict(zip(("training", "testing"), limits.pre_nms_top_n, strict=True)),
            dict(zip(("training", "testing"), limits.post_nms_top_n, strict=True)),
            limits.nms_threshold,
            limits.score_threshold,
        )
        self.box_coder = create_box_coder((1.0, 1.0, 1.0, 1.0), convention.box_coding)
        self.box_loss = create_delta_loss(convention.rpn_box_loss)
        self.proposal_matcher, self.sampling = create_anchor_matcher(sampling, convention), sampling
        self.usable_anchors = _choose_usable_anchors(convention)
        self.least_samples = 1 if convention.matching == "mmdetection" else 0
        self.min_side, self.separation = convention.min_proposal_side, convention.nms_separation

    def forward(
        self,
        features: dict[str, Tensor],
        padded_size: tuple[int, int],
        sizes: Tensor,
        targets: list[Target] | None = None,
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Propose boxes; in training also compute the two losses.

        Args:
            features: maps of the pyramid by name, fine to coarse, [B, C, H, W].
            padded_size: height and width of the batch.
            sizes: height and width of each image without padding, int64 [B, 2].
            targets: the objects of each image, in training.
        """
        maps = list(features.values())
        objectness, deltas = self.head(maps)
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in objectness]  # [B, H * W * A]
        deltas = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas]  # [B, H * W * A, 4]
        anchors = self.anchor_generator(padded_size, maps)
        losses: dict[str, Tensor] = {}
        if self.training:  # before the proposals, for which the host waits: a GPU is still busy with the backbone
            assert targets is not None  # the detector has checked them
            losses = self.compute_losses(
                torch.cat(logits, dim=1), torch.cat(deltas, dim=1), torch.cat(anchors), sizes, targets
            )
        proposals = self.propose([x.detach() for x in logits], [x.detach() for x in deltas], anchors, sizes)
        return proposals, losses

    def propose(
        self, logits: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Sequence[Tensor], sizes: Tensor
    ) -> Proposals:
        """Choose the best proposals of each level, then of each image.

        Args:
            logits: objectness of the anchors of each level, [B, A].
            deltas: of the same anchors, [B, A, 4].
            anchors: corners in pixels, [A, 4].
            sizes: height and width of each image without padding, int64 [B, 2].
        """
        count, limit = sizes.shape[0], self.post_nms_top_n()
        # NMS goes by logits: runtimes that approximate the sigmoid put boxes of low scores into another order
        ranks, boxes, levels = [], [], []
        for level, (of_anchors, own_deltas, own_anchors) in enumerate(zip(logits, deltas, anchors, strict=True)):
            top = of_anchors.topk(torch.sym_min(self.pre_nms_top_n(), of_anchors.shape[1]), dim=1)
            chosen = own_deltas.gather(1, top.indices[..., None].expand(-1, -1, 4))
            moved = self.box_coder.decode_single(chosen.flatten(0, 1), own_anchors[top.indices.flatten()])
            ranks.append(top.values)
            boxes.append(moved.unflatten(0, (count, -1)))
            levels.append(torch.full_like(top.indices, level))
        rank, box, level_of = torch.cat(ranks, 1), torch.cat(boxes, 1), torch.cat(levels, 1)  # [B, K]
        box = clip_boxes(box, sizes[:, None])
        sides = box[..., 2:] - box[..., :2]
        large = ((sides >= self.min_side) & (sides > 0)).all(dim=-1)
        wanted = large & (rank.sigmoid() >= self.score_thresh)
        lengths = [x.shape[1] for x in ranks]
        if has_kernel(box, self.separation, max(lengths)):
            kept_by_kernel = nms_of_levels(box, wanted, lengths, self.nms_thresh)
            return _choose_best(box, rank, kept_by_kernel, limit)
        images = torch.arange(count, device=sizes.device)[:, None].expand_as(wanted)
        kept: list[tuple[Tensor, ...]] = []
        for part in group_images(count, rank, self.separation):
            own, score, group, image, used = (x[part].flatten(0, 1) for x in (box, rank, level_of, images, wanted))
            keep = batch_nms(own, score, group, image, count, self.nms_thresh, self.separation, len(anchors), used)
            kept.append(tuple(x[keep] for x in (own, score, image, used)))
        box, rank, images, wanted = (torch.cat(parts) for parts in zip(*kept, strict=True))
        (boxes_of, scores_of), number = fill_rows((box, rank.sigmoid()), images, wanted, count, limit)
        return Proposals(boxes_of, scores_of, number)

    @torch.no_grad()
    def label_anchors(self, anchors: Tensor, sizes: Tensor, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
        """Label every anchor of every image 1 (object), 0 (background) or -1 (left out), and say which object it has.

        Args:
            anchors: corners in pixels of the batch, [A, 4].
            sizes: height and width of each image without padding, int64 [B, 2].
            targets: the objects of each image.

        Returns:
            Labels int64 [B, A], and the index of the object or a negative number, int64 [B, A].
        """
        labels, matches = [], []
        for size, target in zip(sizes, targets, strict=True):
            usable = None if self.usable_anchors is None else self.usable_anchors(anchors, size)
            own = torch.full((len(anchors),), self.proposal_matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
            if len(target["boxes"]):
                own = self.proposal_matcher(BoxPairs(target["boxes"], anchors), usable)
            label = torch.where(own >= 0, 1, torch.where(own == self.proposal_matcher.BELOW_LOW_THRESHOLD, 0, -1))
            label = leave_out_ignored(label, anchors, target)
            labels.append(label if usable is None else label.masked_fill(~usable, -1))
            matches.append(own)
        return torch.stack(labels), torch.stack(matches)

    def compute_losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, sizes: Tensor, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Compute the losses of objectness and boxes over sampled anchors, float32 scalars.

        Args:
            logits: objectness, [B, A].
            deltas: of the anchors, [B, A, 4].
            anchors: corners in pixels of the batch, [A, 4].
            sizes: height and width of each image without padding, int64 [B, 2].
            targets: the objects of each image.
        """
        labels, matches = self.label_anchors(anchors, sizes, targets)
        drawn = draw_samples(labels, self.sampling)
        count = count_samples(drawn, self.least_samples)
        wanted = torch.cat((torch.ones_like(drawn.objects), torch.zeros_like(drawn.background)), dim=1).to(logits)
        objectness = F.binary_cross_entropy_with_logits(
            logits.gather(1, drawn.rows), wanted, drawn.used.to(logits), reduction="sum"
        )
        chosen = anchors[drawn.objects.flatten()]  # [B * P, 4]
        ground_truth = take_objects(targets, matches.gather(1, drawn.objects), drawn.has_object).flatten(0, 1)
        has_object = drawn.has_object.flatten()
        target_deltas = self.box_coder.encode_single(torch.where(has_object[:, None], ground_truth, chosen), chosen)
        own = deltas.gather(1, drawn.objects[..., None].expand(-1, -1, 4)).flatten(0, 1)
        box = torch.where(has_object[:, None], self.box_loss(own, target_deltas), 0.0).sum()
        return {"loss_objectness": objectness / count, "loss_rpn_box": box / count}


def _choose_best(boxes: Tensor, ranks: Tensor, kept: Tensor, limit: int) -> Proposals:
    """Choose the best of the kept boxes [B, K, 4] of each image by their logits [B, K], in fixed shapes."""
    best = ranks.masked_fill(~kept, -torch.inf).topk(min(limit, ranks.shape[1]), dim=1)
    used = best.values > -torch.inf
    chosen = boxes.gather(1, best.indices[..., None].expand(-1, -1, 4)) * used[..., None]
    beyond = limit - used.shape[1]
    return Proposals(
        F.pad(chosen, (0, 0, 0, beyond)), F.pad(best.values.sigmoid() * used, (0, beyond)), used.sum(dim=1)
    )


def _choose_usable_anchors(convention: Convention) -> Callable[[Tensor, Tensor], Tensor] | None:
    if convention.matching == "torchvision":
        return None  # every anchor
    return _anchors_inside if convention.rpn_skip_crossing else _anchors_on_image


def _anchors_inside(anchors: Tensor, size: Tensor) -> Tensor:
    """Which anchors [A, 4] do not cross the border of an image of (height, width), bool [A]."""
    inside = (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2] < size[1]) & (anchors[:, 3] < size[0])
    # none fits into a very small image
    return torch.where(inside.any(), inside, _anchors_on_image(anchors, size))


def _anchors_on_image(anchors: Tensor, size: Tensor) -> Tensor:
    """Which anchors [A, 4] are not on cells of the batch beyond the padding of this image, bool [A]."""
    x, y = ((anchors[:, axis] + anchors[:, axis + 2]) / 2 for axis in (0, 1))
    height, width = (-(-side // _DIVISOR) * _DIVISOR for side in size)
    on_image: Tensor = (x < width - 0.5) & (y < height - 0.5)
    return on_image


class FloatRPNHead(RPNHead):
    """torchvision's head; boxes decoded from bfloat16 deltas would be off by pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute objectness [B, A, H, W] and deltas [B, 4 * A, H, W] of every map, float32."""
        objectness, deltas = super().forward(x)
        return [o.float() for o in objectness], [d.float() for d in deltas]
