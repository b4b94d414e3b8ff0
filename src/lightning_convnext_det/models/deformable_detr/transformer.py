"""Encoder and decoder of Deformable DETR (arXiv:2010.04159).

Derived from the paper and checked against the authors' implementation (fundamentalvision/Deformable-DETR, Apache-2.0).
Unlike the original, the box heads are passed to the decoder, not attached to it, and each runs once per layer.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_convnext_det.models.deformable_detr.heads import apply_in_full_precision
from lightning_convnext_det.models.deformable_detr.levels import Levels
from lightning_convnext_det.ops.deform_attn import multi_scale_deformable_attention
from lightning_convnext_det.ops.dropout import Dropout, relu_dropout
from lightning_convnext_det.ops.token_blocks import block_size, is_worthwhile, map_tokens


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute the logit of numbers in 0..1 in at least float32, with both x and 1 - x kept above ``eps``."""
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    # once each and with limits of one type: torch.onnx (2.14) orders two clamps in a row wrongly, and drops mixed ones
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))


class DeformableAttention(nn.Module):
    """Attention of every query to a few points around its reference point, on every feature level.

    Args:
        hidden_dim: channels.
        num_heads: heads; must divide ``hidden_dim``.
        num_levels: levels of the pyramid.
        num_points: points per head and level.

    Reference:
        Zhu et al., "Deformable DETR", arXiv:2010.04159, equation 3.
    """

    def __init__(self, hidden_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(hidden_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(hidden_dim, num_heads * num_levels * num_points)
        self.value_projection = nn.Linear(hidden_dim, hidden_dim)
        self.output_projection = nn.Linear(hidden_dim, hidden_dim)

    def reset_parameters(self) -> None:
        """Point head h in direction 2 pi h / heads, its points 1, 2, ... cells away (appendix A.2 of the paper)."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)[:, None]
        offsets = (directions[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)  # [heads, levels, points, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_projection, self.output_projection):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, queries: Tensor, reference_points: Tensor, memory: Tensor, levels: Levels) -> Tensor:
        """Attend to the memory around the reference points.

        Args:
            queries: queries plus their position encodings, float [B, Q, D].
            reference_points: points or boxes (centre, size) in 0..1 of every map, float32 [B or 1, Q, L or 1, 2 or 4].
            memory: tokens of all feature maps, float [B, S, D].
            levels: shapes and padding of the feature maps.

        Returns:
            Float [B, Q, D].
        """
        return self.attend(queries, reference_points, self.project(memory, levels), levels)

    def project(self, memory: Tensor, levels: Levels) -> Tensor:
        """Project the memory [B, S, D] to values [B, S, heads, D / heads], zero in the padding."""
        value: Tensor = self.value_projection(memory)
        if levels.padding is not None:
            value = value.masked_fill(levels.padding[:, :, None], 0.0)
        return torch.unflatten(value, -1, (self.num_heads, -1))

    def attend(self, queries: Tensor, reference_points: Tensor, value: Tensor, levels: Levels) -> Tensor:
        """As `forward`, for a memory that has been projected: each query by itself."""
        locations = self._locate(self.sampling_offsets(queries), reference_points, levels.cells)
        weights = self.attention_weights(queries).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))  # [B, Q, heads, L, points]
        attended = multi_scale_deformable_attention(value, levels.spatial_shapes, locations, weights)
        projected: Tensor = self.output_projection(attended)
        return projected

    def _locate(self, offsets: Tensor, reference_points: Tensor, cells: Tensor) -> Tensor:
        """Convert offsets, in cells or parts of the reference box, to locations float32 [B, Q, heads, L, points, 2]."""
        offsets = offsets.to(reference_points.dtype)  # locations stay float32 under autocast
        shape = (*offsets.shape[:2], self.num_heads, self.num_levels, self.num_points, 2)
        reference_points = reference_points[:, :, None, :, None]  # [B, Q, 1, L, 1, 2 or 4]
        if reference_points.shape[-1] == 4:
            half = reference_points[..., 2:] * (0.5 / self.num_points)
            return reference_points[..., :2] + offsets.view(shape) * half
        cells = cells[:, None].expand(shape[2:]).flatten()  # one row for all queries: twice as fast as 6-D broadcasting
        return (offsets * cells).view(shape) + reference_points


class FeedForward(nn.Module):
    """Feed-forward block: two linear layers with a ReLU, residual connection and LayerNorm."""

    def __init__(self, hidden_dim: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden_dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        if not is_worthwhile(x, self, self.linear1):
            return self._map(x)
        return map_tokens(self._map, x, self.linear1.out_features)

    def _map(self, x: Tensor) -> Tensor:
        hidden = relu_dropout(self.linear1(x), self.dropout)
        normed: Tensor = self.norm(x + self.dropout(self.linear2(hidden)))
        return normed


# hidden_dim, num_heads, num_levels, feedforward_dim, dropout, num_points
LayerArguments = tuple[int, int, int, int, float, int]


class EncoderLayer(nn.Module):
    """Encoder layer: deformable self-attention of every token, then the feed-forward block."""

    def __init__(
        self, hidden_dim: int, num_heads: int, num_levels: int, feedforward_dim: int, dropout: float, num_points: int
    ) -> None:
        super().__init__()
        self.attention = DeformableAttention(hidden_dim, num_heads, num_levels, num_points)
        self.norm = nn.LayerNorm(hidden_dim)
        self.dropout = Dropout(dropout)
        self.feedforward = FeedForward(hidden_dim, feedforward_dim, dropout)

    def forward(self, tokens: Tensor, levels: Levels) -> Tensor:
        """Map tokens [B, S, D] to tokens [B, S, D]."""
        positions = levels.positions.to(tokens.dtype)
        if is_worthwhile(tokens, self, self.feedforward.linear1):
            return self._encode_in_blocks(tokens, positions, levels)
        attended = self.attention(tokens + positions, levels.reference_points, tokens, levels)
        return self._finish(tokens, attended)

    def _finish(self, tokens: Tensor, attended: Tensor) -> Tensor:
        encoded: Tensor = self.feedforward(self.norm(tokens + self.dropout(attended)))
        return encoded

    def _encode_in_blocks(self, tokens: Tensor, positions: Tensor, levels: Levels) -> Tensor:
        """Encode some tokens at a time: nothing but the values is needed of the others."""
        value, out = self.attention.project(tokens, levels), torch.empty_like(tokens)
        size = block_size(tokens, self.feedforward.linear1.out_features)
        every = [part.expand(len(tokens), *part.shape[1:]) for part in (positions, levels.reference_points)]
        for image in range(len(tokens)):
            here = slice(image, image + 1)
            parts = (torch.split(part[here], size, 1) for part in (tokens, *every, out))
            for block, place, reference_points, rows in zip(*parts, strict=True):
                attended = self.attention.attend(block + place, reference_points, value[here], levels)
                rows.copy_(self._finish(block, attended))
        return out


class Encoder(nn.Module):
    """Encoder: a stack of layers with deformable self-attention.

    Args:
        num_layers: number of layers.
        layer: arguments of each `EncoderLayer`.
        gradient_checkpointing: recompute each layer in the backward pass to save memory.
    """

    def __init__(self, num_layers: int, layer: LayerArguments, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(*layer) for _ in range(num_layers))
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, levels: Levels) -> Tensor:
        """Encode the tokens of the feature maps into the memory, float [B, S, D]."""
        memory = levels.tokens
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                memory = checkpoint(layer, memory, levels, use_reentrant=False)
            else:
                memory = layer(memory, levels)
        return memory


class DecoderLayer(nn.Module):
    """Decoder layer: self-attention of the queries, deformable attention to the memory, then the feed-forward block."""

    def __init__(
        self, hidden_dim: int, num_heads: int, num_levels: int, feedforward_dim: int, dropout: float, num_points: int
    ) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(hidden_dim, num_heads, dropout, batch_first=True)
        self.self_norm = nn.LayerNorm(hidden_dim)
        self.cross_attention = DeformableAttention(hidden_dim, num_heads, num_levels, num_points)
        self.cross_norm = nn.LayerNorm(hidden_dim)
        self.dropout = Dropout(dropout)
        self.feedforward = FeedForward(hidden_dim, feedforward_dim, dropout)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        levels: Levels,
        unusable: Tensor | None,
        blocked: Tensor | None = None,
    ) -> Tensor:
        """Map queries [B, Q, D] to queries [B, Q, D].

        None attends to the ``unusable``, bool [B, Q]; a query q does not attend to k where ``blocked`` [Q, Q] is True
        at (q, k).
        """
        placed = queries + positions
        attended = self.self_attention(
            placed, placed, queries, key_padding_mask=unusable, attn_mask=blocked, need_weights=False
        )[0]
        queries = self.self_norm(queries + self.dropout(attended))
        attended = self.cross_attention(queries + positions, levels.to_maps(reference_points), memory, levels)
        queries = self.cross_norm(queries + self.dropout(attended))
        decoded: Tensor = self.feedforward(queries)
        return decoded


class Decoder(nn.Module):
    """Decoder: a stack of layers, each followed by its box head.

    Args:
        num_layers: number of layers.
        layer: arguments of each `DecoderLayer`.
        box_refinement: each layer refines the boxes of the previous one, detached (section 4.1 of the paper).
    """

    def __init__(self, num_layers: int, layer: LayerArguments, box_refinement: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(*layer) for _ in range(num_layers))
        self.box_refinement = box_refinement

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        levels: Levels,
        box_heads: Sequence[nn.Module],
        usable: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decode queries into boxes.

        Args:
            queries: float [B, Q, D].
            positions: position encodings of the queries, float [B, Q, D].
            reference_points: initial points or boxes (centre, size) in 0..1 of the image, float32 [B, Q, 2 or 4].
            memory: encoded tokens, float [B, S, D].
            levels: shapes and padding of the feature maps.
            box_heads: one per layer, or the same for all.
            usable: False on queries that no other may attend to, bool [B, Q]; None: all are attended to.

        Returns:
            The queries [B, Q, D] after every layer, and the boxes (centre, size) in 0..1 of the image, float32
            [B, Q, 4].
        """
        hidden, boxes = [], []
        unusable = None if usable is None else ~usable
        for layer, box_head in zip(self.layers, box_heads, strict=True):
            queries = layer(queries, positions, reference_points, memory, levels, unusable)
            delta = apply_in_full_precision(box_head, queries)
            guess = inverse_sigmoid(reference_points)
            # a point has no size to refine: the head predicts the size itself
            box = (delta + F.pad(guess, (0, 4 - guess.shape[-1]))).sigmoid()
            hidden.append(queries)
            boxes.append(box)
            if self.box_refinement:
                reference_points = box.detach()
        return hidden, boxes


def check_width(hidden_dim: int, num_heads: int) -> None:
    """Refuse a width that heads or norms cannot divide."""
    if hidden_dim % num_heads:
        raise ValueError(f"hidden_dim {hidden_dim} cannot be divided among {num_heads} heads; choose a multiple of it")
    if hidden_dim % 32:
        raise ValueError(f"hidden_dim is {hidden_dim}; GroupNorm needs a multiple of 32")


def reset_transformer(*parts: nn.Module | None) -> None:
    """Draw all matrices by Xavier's rule, and let deformable attention start as the paper says."""
    present = [part for part in parts if part is not None]
    for part in present:
        for parameter in part.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
    for part in present:
        for module in part.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
