"""First stage of the detectors with object queries: every token proposes a box, and the decoder starts from the best.

Unlike in the implementations of the papers' authors, tokens on padding or at the very border are chosen only where an
image has fewer others than queries. Such queries are masked and detect nothing, so that padding does not change the
detections of a small image.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_convnext_det.models.deformable_detr.criterion import Predictions
from lightning_convnext_det.models.deformable_detr.heads import apply_in_full_precision
from lightning_convnext_det.models.deformable_detr.levels import Levels, encode_sine
from lightning_convnext_det.ops.tracing import is_recording


class Proposals(NamedTuple):
    """Output of the first stage, for the decoder and the losses."""

    predictions: Predictions
    """Predictions of all tokens, or of those chosen, as one layer [1, B, S or Q, ...]."""
    reference_points: Tensor
    """Boxes of the chosen tokens (centre, size) in 0..1, float32 [B, Q, 4], without gradient."""
    usable: Tensor
    """False on the queries that an image has no token for, bool [B, Q]."""


class TokenProposals(nn.Module):
    """Base of the first stages: features and initial boxes of the tokens, and the choice of the best.

    Args:
        hidden_dim: channels.
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.memory_projection = nn.Linear(hidden_dim, hidden_dim)
        self.memory_norm = nn.LayerNorm(hidden_dim)

    def project(self, memory: Tensor, valid: Tensor) -> Tensor:
        """Compute the features [B, S, D] that the heads of the first stage read; all alike on invalid tokens."""
        features: Tensor = self.memory_norm(self.memory_projection(memory * valid[:, :, None].to(memory.dtype)))
        return features

    def choose(self, scores: Tensor, valid: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
        """Choose the tokens of highest scores [B, S]: their indices [B, Q], descending, and which are valid [B, Q]."""
        scores, count = scores.masked_fill(~valid, -float("inf")), num_queries
        valid = valid.expand(scores.shape)
        if not is_recording():
            chosen = scores.topk(min(count, scores.shape[1]), 1).indices
            return chosen, valid.gather(1, chosen)
        # an exporter cannot record the smaller of both: as many invalid tokens follow, which stand for the first
        scores = torch.cat([scores, scores.new_full((scores.shape[0], count), -float("inf"))], 1)
        chosen = scores.topk(count, 1).indices
        token = torch.arange(valid.shape[1], device=scores.device)
        token = torch.cat([token, token.new_zeros(count)])
        valid = torch.cat([valid, valid.new_zeros(valid.shape[0], count)], 1)
        return token[chosen], valid.gather(1, chosen)


class Proposer(TokenProposals):
    """First stage of two-stage Deformable DETR: the chosen boxes become contents and positions of the queries.

    Args:
        hidden_dim: channels.

    Reference:
        Zhu et al., arXiv:2010.04159, section 4.2 and appendix A.4.
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__(hidden_dim)
        self.query_projection = nn.Linear(hidden_dim * 2, hidden_dim * 2)
        self.query_norm = nn.LayerNorm(hidden_dim * 2)

    def forward(
        self, memory: Tensor, levels: Levels, class_head: nn.Module, box_head: nn.Module, num_queries: int
    ) -> Proposals:
        """Score all tokens and keep the best.

        Args:
            memory: encoded tokens, float [B, S, D].
            levels: shapes and padding of the feature maps.
            class_head: its first logit is the objectness.
            box_head: refines the initial box of a token.
            num_queries: number of proposals to keep; fewer where the batch has fewer tokens.
        """
        boxes, valid = token_boxes(levels)
        features = self.project(memory, valid)
        logits = apply_in_full_precision(class_head, features)  # [B, S, C]
        box_logits = apply_in_full_precision(box_head, features) + boxes.logit()
        box_logits = box_logits.masked_fill(~valid[:, :, None], float("inf"))
        chosen, usable = self.choose(logits[..., 0], valid, num_queries)
        reference = box_logits.detach().gather(1, chosen[:, :, None].expand(-1, -1, 4)).sigmoid()
        return Proposals(Predictions(logits[None], box_logits.sigmoid()[None]), reference, usable)

    def encode(self, reference_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the chosen boxes [B, Q, 4] into contents and positions of the queries, float [B, Q, D] each."""
        width = self.memory_norm.normalized_shape[0]
        encoded = encode_sine(reference_boxes, width // 2).flatten(2)  # [B, Q, 2 D]
        positions, queries = self.query_norm(self.query_projection(encoded)).chunk(2, -1)
        return queries, positions


class QuerySelection(TokenProposals):
    """First stage of DINO: the chosen boxes position the queries, whose contents are learned.

    Args:
        hidden_dim: channels.
        dense: all tokens have a box and are trained, as in `Proposer`; else only the chosen ones, as in detrex.

    Reference:
        Zhang et al., "DINO", arXiv:2203.03605, section 3.4, "mixed query selection".
    """

    def __init__(self, hidden_dim: int, dense: bool = False) -> None:
        super().__init__(hidden_dim)
        self.dense = dense

    def forward(
        self, memory: Tensor, levels: Levels, class_head: nn.Module, box_head: nn.Module, num_queries: int
    ) -> Proposals:
        """Score all tokens by their likeliest class and keep the best.

        Args:
            memory: encoded tokens, float [B, S, D].
            levels: shapes and padding of the feature maps.
            class_head: logits of all classes.
            box_head: refines the initial box of a token.
            num_queries: number of proposals to keep; fewer where the batch has fewer tokens.
        """
        boxes, valid = token_boxes(levels)
        features = self.project(memory, valid)
        logits = apply_in_full_precision(class_head, features)  # [B, S, C]
        chosen, usable = self.choose(logits.amax(-1), valid, num_queries)
        boxes = boxes.expand(memory.shape[0], -1, -1)
        if self.dense:
            proposed = _refine(box_head, features, boxes, valid)  # [B, S, 4]
            return Proposals(Predictions(logits[None], proposed[None]), _take(proposed.detach(), chosen), usable)
        box = _refine(box_head, _take(features, chosen), _take(boxes, chosen), usable)  # [B, Q, 4]
        return Proposals(Predictions(_take(logits, chosen)[None], box[None]), box.detach(), usable)


def _refine(box_head: nn.Module, features: Tensor, boxes: Tensor, usable: Tensor) -> Tensor:
    box_logits = apply_in_full_precision(box_head, features) + boxes.logit()
    return box_logits.masked_fill(~usable[:, :, None], float("inf")).sigmoid()


def _take(rows: Tensor, chosen: Tensor) -> Tensor:
    return rows.gather(1, chosen[:, :, None].expand(-1, -1, rows.shape[-1]))


def token_boxes(levels: Levels) -> tuple[Tensor, Tensor]:
    """Give every token a box around it, 5 % of the image wide at the finest level, and say which are valid.

    Returns:
        The boxes (centre, size) in 0..1 of the image, float32 [B or 1, S, 4], and bool [B or 1, S].
    """
    centers = levels.centers
    sides = [
        centers.new_full((centers.shape[0], h * w, 2), 0.05 * 2**i) for i, (h, w) in enumerate(levels.spatial_shapes)
    ]
    boxes = torch.cat([centers, torch.cat(sides, 1)], -1)  # [B or 1, S, 4]
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    return boxes, valid
