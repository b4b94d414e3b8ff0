"""Decoder of DINO (arXiv:2203.03605): queries positioned by their boxes, look forward twice."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import MLP

from lightning_convnext_det.models.deformable_detr.heads import apply_in_full_precision
from lightning_convnext_det.models.deformable_detr.levels import Levels, encode_sine
from lightning_convnext_det.models.deformable_detr.transformer import DecoderLayer, LayerArguments, inverse_sigmoid


class LookForwardTwiceDecoder(nn.Module):
    """Decoder of DINO: queries are positioned by their boxes, and each box trains the layer before it too.

    A layer's refined box, from its output before the norm, is what the next layer starts from, without gradient. The
    predicted boxes, from its output after the norm, refine the box of the layer before with gradient.

    Args:
        num_layers: number of layers.
        layer: arguments of each `DecoderLayer`.
        position_in_map: position queries by their boxes in the finest map with its padding, as detrex does, instead of
            in the image. Both are the same without padding.

    Reference:
        Zhang et al., "DINO", arXiv:2203.03605, section 3.5; Liu et al., "DAB-DETR", arXiv:2201.12329.
    """

    eps = 1e-3  # of the inverse sigmoid, as in the authors' implementation and detrex

    def __init__(self, num_layers: int, layer: LayerArguments, position_in_map: bool) -> None:
        super().__init__()
        hidden_dim, self.position_in_map = layer[0], position_in_map
        self.layers = nn.ModuleList(DecoderLayer(*layer) for _ in range(num_layers))
        self.position_head = MLP(2 * hidden_dim, [hidden_dim, hidden_dim], inplace=False)
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(
        self,
        queries: Tensor,
        reference_boxes: Tensor,
        memory: Tensor,
        levels: Levels,
        box_heads: Sequence[nn.Module],
        usable: Tensor | None = None,
        blocked: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decode queries into boxes.

        Args:
            queries: float [B, Q, D].
            reference_boxes: initial boxes (centre, size) in 0..1 of the image, float32 [B, Q, 4], without gradient.
            memory: encoded tokens, float [B, S, D].
            levels: shapes and padding of the feature maps.
            box_heads: one per layer.
            usable: False on queries that no other may attend to, bool [B, Q]; None: all are attended to.
            blocked: True where a query, the row, does not attend to another, bool [Q, Q]; None: nowhere.

        Returns:
            The normed queries [B, Q, D] after every layer, and the boxes (centre, size) in 0..1 of the image, float32
            [B, Q, 4].
        """
        hidden, boxes = [], []
        unusable = None if usable is None else ~usable
        previous = reference_boxes  # as the references of each layer, but with gradient
        for layer, box_head in zip(self.layers, box_heads, strict=True):
            placed = levels.to_maps(reference_boxes)[:, :, 0] if self.position_in_map else reference_boxes
            positions = self.encode_boxes(placed)
            queries = layer(queries, positions, reference_boxes, memory, levels, unusable, blocked)
            hidden.append(self.norm(queries))
            delta = apply_in_full_precision(box_head, hidden[-1])
            boxes.append((delta + inverse_sigmoid(previous, self.eps)).sigmoid())
            if len(hidden) < len(self.layers):
                delta = apply_in_full_precision(box_head, queries)
                previous = (delta + inverse_sigmoid(reference_boxes, self.eps)).sigmoid()
                reference_boxes = previous.detach()
        return hidden, boxes

    def encode_boxes(self, boxes: Tensor) -> Tensor:
        """Turn boxes [B, Q, 4] (centre, size) in 0..1 into position encodings [B, Q, D]."""
        x, y, width, height = boxes.unbind(-1)
        ordered = torch.stack([y, x, width, height], -1)
        encoded: Tensor = self.position_head(encode_sine(ordered, self.position_head[0].in_features // 4).flatten(2))
        return encoded
