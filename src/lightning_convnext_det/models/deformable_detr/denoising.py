"""Contrastive denoising queries of DINO (arXiv:2203.03605, section 3.3).

In training the decoder also gets noisy copies of the objects: from slightly moved boxes it is to find the object, from
farther ones nothing. Their number depends only on the number of objects that the batch is padded to.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_convnext_det.models.deformable_detr.criterion import Matches, Objects, corners
from lightning_convnext_det.models.deformable_detr.transformer import inverse_sigmoid
from lightning_convnext_det.ops.host_numbers import send


class Noise(NamedTuple):
    """Random numbers for the copies of all objects of a batch; copies are positive and negative in turns."""

    relabel: Tensor
    """Uniform in 0..1: below half of the label noise the label is replaced, float32 [copies, B, N]."""
    labels: Tensor
    """Labels to replace others with, int64 [copies, B, N]."""
    signs: Tensor
    """Direction in which each side moves, -1 or 1, float32 [copies, B, N, 4]."""
    shifts: Tensor
    """How far it moves, uniform in 0..1, float32 [copies, B, N, 4]."""


def draw_noise(copies: int, objects: Objects, num_classes: int) -> Noise:
    """Draw the noise of a training step."""
    device, shape = objects.boxes.device, (copies, *objects.labels.shape)
    return Noise(
        relabel=torch.rand(shape, device=device),
        labels=torch.randint(num_classes, shape, device=device),
        signs=torch.randint(2, (*shape, 4), device=device) * 2.0 - 1.0,
        shifts=torch.rand((*shape, 4), device=device),
    )


class DenoisingQueries(NamedTuple):
    """Queries that the decoder gets in front of its own: of each group N positives, then N negatives."""

    contents: Tensor
    """Embeddings of the labels, zero where an image has no object, float [B, P, D]."""
    box_logits: Tensor
    """Boxes (centre, size) as logits, zero where an image has no object, float32 [B, P, 4]."""
    groups: int


class Denoising(nn.Module):
    """Makes denoising queries of the objects of a batch.

    Args:
        num_classes: foreground classes.
        hidden_dim: channels of the queries.
        num_queries: about as many positive ones per image, in groups of all objects, at least one group.
        label_noise: twice the share of labels that are replaced by random ones.
        box_noise: how far the sides of boxes move at most: positives by this share of half the box, negatives by one
            to two times as far.
    """

    def __init__(
        self, num_classes: int, hidden_dim: int, num_queries: int, label_noise: float, box_noise: float
    ) -> None:
        super().__init__()
        self.label_embedding = nn.Embedding(num_classes, hidden_dim)
        self.num_queries, self.label_noise, self.box_noise = num_queries, label_noise, box_noise

    def forward(self, objects: Objects) -> DenoisingQueries:
        """Draw noise and make the queries; without objects there are none, P is 0."""
        groups = max(1, self.num_queries // max(1, objects.labels.shape[1]))
        noise = draw_noise(2 * groups, objects, self.label_embedding.num_embeddings)
        labels = torch.where(noise.relabel < self.label_noise * 0.5, noise.labels, objects.labels)  # [copies, B, N]
        logits = inverse_sigmoid(self._move(objects.boxes, noise), 1e-3)  # [copies, B, N, 4]
        real = is_real(objects)[None, :, :, None]
        contents = self.label_embedding(labels) * real
        contents, logits = (x.transpose(0, 1).flatten(1, 2) for x in (contents, logits * real))
        return DenoisingQueries(contents, logits, groups)

    def _move(self, boxes: Tensor, noise: Noise) -> Tensor:
        """Move the sides of boxes [B, N, 4] (centre, size) in 0..1, per copy; the result may have negative sizes."""
        if not self.box_noise:
            return boxes.expand(noise.shifts.shape)
        negative = (torch.arange(noise.shifts.shape[0], device=boxes.device) % 2)[:, None, None, None]
        reach = boxes[..., 2:].repeat(1, 1, 2) * (0.5 * self.box_noise)  # [B, N, 4]
        moved = (corners(boxes) + noise.signs * (noise.shifts + negative) * reach).clamp(0, 1)
        low, high = moved[..., :2], moved[..., 2:]
        return torch.cat([(low + high) / 2, high - low], -1)


def is_real(objects: Objects) -> Tensor:
    """Tell the objects of images from their padding, bool [B, N]."""
    counts = send(objects.counts, objects.labels.device)
    return torch.arange(objects.labels.shape[1], device=counts.device) < counts[:, None]


def block_attention(queries: DenoisingQueries, num_queries: int) -> Tensor:
    """Say which queries do not attend to which others, bool [P + Q, P + Q], as `DecoderLayer` takes it.

    Denoising queries attend to their own group and to the decoder's own queries, which attend to each other alone.

    Args:
        queries: the P denoising queries, which come first.
        num_queries: number Q of the decoder's own queries.
    """
    number, device = queries.contents.shape[1], queries.contents.device
    group = torch.arange(number, device=device) // max(1, number // queries.groups)
    group = torch.cat([group, torch.full((num_queries,), -1, device=device)])  # [P + Q]
    return (group >= 0) & (group[:, None] != group)


def denoising_targets(objects: Objects, groups: int, layers: int) -> tuple[Objects, Matches]:
    """Repeat the objects of every image for each group, and match them with the group's positive queries."""
    batch, number = objects.labels.shape
    repeated = objects._replace(boxes=objects.boxes.repeat(1, groups, 1), labels=objects.labels.repeat(1, groups))
    index = torch.arange(groups * number, device=objects.labels.device)
    query = index + index // max(1, number) * number  # each group has as many negatives behind its positives
    real = is_real(objects).repeat(1, groups)
    return repeated, Matches(query.expand(layers, batch, -1), real.expand(layers, -1, -1))
