"""Hungarian matching and losses of Deformable DETR (arXiv:2010.04159, arXiv:2005.12872).

All decoder layers and images are matched after one transfer from the device, and their losses are computed together, in
float32. Unlike in the authors' implementation, predictions that are not finite raise an error that names the layer, and
boxes without area have a defined generalised IoU.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert, sigmoid_focal_loss

from lightning_convnext_det.arguments import NonNegative
from lightning_convnext_det.errors import DivergenceError
from lightning_convnext_det.models.ignored_regions import find_ignored
from lightning_convnext_det.ops.host_numbers import send

PerLoss = tuple[NonNegative, NonNegative, NonNegative]
"""A factor for classification, box and generalised IoU each."""

_PAIRS = 2**22  # queries times objects compared at a time: about a gigabyte of intermediate results


class Predictions(NamedTuple):
    """Class logits and boxes of several layers."""

    logits: Tensor
    """Class logits, float32 [layers, B, Q, C]."""
    boxes: Tensor
    """Boxes (centre x, centre y, width, height) in 0..1 of the image, float32 [layers, B, Q, 4]."""


class Objects(NamedTuple):
    """Ground truth of a batch, padded to the same number of objects for every image."""

    boxes: Tensor
    """Boxes (centre x, centre y, width, height) in 0..1 of the image, float32 [B, N, 4]."""
    labels: Tensor
    """Class indices 0 ... C - 1, int64 [B, N]."""
    counts: list[int]
    """How many of the N are real, per image."""
    ignored: Tensor | None = None
    """Regions without background, corners in 0..1 of the image, zeros where an image has fewer, float32 [B, K, 4]."""

    @classmethod
    def from_lists(
        cls,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        multiple: int = 1,
        ignored: Sequence[Tensor] = (),
    ) -> "Objects":
        """Pad and stack the boxes [N, 4] (centre, size) and labels [N] of each image.

        Args:
            boxes: of each image.
            labels: of each image.
            multiple: pad to a multiple of this, and to at least this if above 1.
            ignored: regions [K, 4] (centre, size) of each image, if any has one.
        """
        padded = nn.utils.rnn.pad_sequence([b.to(torch.float32) for b in boxes], batch_first=True, padding_value=0.5)
        indices = nn.utils.rnn.pad_sequence([x.to(torch.int64) for x in labels], batch_first=True)
        counts = [len(b) for b in boxes]
        surplus = max(-max(counts) % multiple, multiple - max(counts) if multiple > 1 else 0)
        padded, indices = F.pad(padded, (0, 0, 0, surplus), value=0.5), F.pad(indices, (0, surplus))
        regions = None
        if any(len(of_image) for of_image in ignored):
            regions = nn.utils.rnn.pad_sequence([corners(r.to(padded)) for r in ignored], batch_first=True)
        return cls(padded, indices, counts, regions)

    def to(self, device: torch.device) -> "Objects":
        """Move the tensors."""
        ignored = None if self.ignored is None else self.ignored.to(device)
        return Objects(self.boxes.to(device), self.labels.to(device), self.counts, ignored)


class Matches(NamedTuple):
    """Index of the query that each object is matched with; its shape does not depend on the matching."""

    query: Tensor
    """Int64 [layers, B, N], 0 where there is none."""
    matched: Tensor
    """Whether the object has a query, bool [layers, B, N]."""


class SetCriterion(nn.Module):
    """Set prediction loss: match queries with objects one to one at the least cost, and compare the pairs.

    Args:
        loss_weights: factors of the losses: focal loss of the classes, L1 distance of boxes in 0..1, generalised IoU.
        matching_costs: factors of the same three in the cost of matching a query with an object.
        auxiliary_losses: train every decoder layer, not only the last.
        alpha: weight of positives in the focal loss and cost.
        gamma: exponent that turns easy examples down in the focal loss and cost.
        class_weights: factor of the focal loss of queries that are matched with an object of each class, float [C];
            None for 1 each.

    Raises:
        ValueError: if factors are not three numbers of at least 0, or all costs are 0.
    """

    giou_eps = 0.0  # see `generalized_iou`
    proposals_have_classes = False
    class_weights: Tensor | None

    def __init__(
        self,
        loss_weights: Sequence[float] = (2.0, 5.0, 2.0),
        matching_costs: Sequence[float] = (2.0, 5.0, 2.0),
        auxiliary_losses: bool = True,
        alpha: float = 0.25,
        gamma: float = 2.0,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.loss_weights = _per_loss("loss_weights", loss_weights)
        self.matching_costs = _per_loss("matching_costs", matching_costs)
        if not any(matching_costs):
            raise ValueError("matching_costs are all 0, so that any query would match any object; raise one")
        self.auxiliary_losses, self.alpha, self.gamma = auxiliary_losses, alpha, gamma
        self._warned = False

    def forward(
        self, decoder: Predictions, objects: Objects, proposals: Predictions | None = None
    ) -> dict[str, Tensor]:
        """Compute the weighted losses.

        Args:
            decoder: predictions of the decoder layers.
            objects: the ground truth.
            proposals: the encoder's proposals of the two-stage variant, as one layer; all objects are class 0 there.

        Returns:
            ``loss_classification``, ``loss_box`` and ``loss_giou`` of the last layer; of earlier ones with suffix
            ``_aux0``, ``_aux1`` ...; of the proposals with suffix ``_proposals``. Float32 scalars, divided by the mean
            number of objects per rank, at least 1.

        Raises:
            DivergenceError: if a logit or box is not finite.
        """
        return self.match_and_compare(decoder, objects, proposals)[0]

    def match_and_compare(
        self, decoder: Predictions, objects: Objects, proposals: Predictions | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the weighted losses and what they are divided by, float32 [1]; see `forward`."""
        with torch.autocast(decoder.logits.device.type, enabled=False):
            self._warn_of_surplus(objects, decoder.boxes.shape[2])
            sets = [(self.trained(decoder), objects)]
            if proposals is not None:
                sets.append((Predictions(*(x.float() for x in proposals)), self.proposal_objects(objects)))
            matches = self._match(sets)
            num_boxes = _mean_over_ranks(sum(objects.counts), decoder.logits.device)
            losses = {}
            for (predictions, found), pairs, suffix in zip(sets, matches, ("", "_proposals"), strict=False):
                losses.update(self.compare(predictions, found, pairs, num_boxes, suffix))
        return losses, num_boxes

    def trained(self, decoder: Predictions) -> Predictions:
        """Take the layers that are trained, in float32."""
        first = 0 if self.auxiliary_losses else -1
        return Predictions(*(x[first:].float() for x in decoder))

    def proposal_objects(self, objects: Objects) -> Objects:
        """The ground truth of the proposals: all objects are class 0 there."""
        return objects._replace(labels=torch.zeros_like(objects.labels))

    def compare(
        self, predictions: Predictions, objects: Objects, pairs: Matches, divisor: Tensor, suffix: str
    ) -> dict[str, Tensor]:
        """Compute the weighted losses of matched predictions; all layers but the last have ``_aux`` in their names."""
        last = len(predictions.logits) - 1
        losses = {}
        has_classes = suffix != "_proposals" or self.proposals_have_classes
        for key, values in self._compare(predictions, objects, pairs, has_classes).items():
            weighted = values * (self.loss_weights[key] / divisor)  # [layers]
            for layer, value in enumerate(weighted):
                losses[f"loss_{key}{suffix}" + (f"_aux{layer}" if layer < last else "")] = value
        return losses

    @torch.no_grad()
    def _match(self, sets: list[tuple[Predictions, Objects]]) -> list[Matches]:
        """Match all layers and images after one transfer to the host."""
        costs = [self.matching_cost(predictions, objects) for predictions, objects in sets]
        finite = [torch.stack([x.isfinite().flatten(1).all(1) for x in p], 1) for p, _ in sets]  # [layers, 2] each
        packed = torch.cat([x.flatten() for x in (*costs, *finite)]).cpu().numpy()
        cut = np.cumsum([c.numel() for c in costs])
        _check_finite(packed[cut[-1] :], len(sets) > 1)
        pairs = [
            _assign(part.reshape(cost.shape), objects.counts)
            for part, cost, (_, objects) in zip(np.split(packed, cut)[:-1], costs, sets, strict=True)
        ]
        joined = np.concatenate([found.ravel() for found in pairs])
        queries = torch.from_numpy(joined).to(sets[0][0].logits.device, non_blocking=True)
        parts = torch.split(queries, [found.size for found in pairs])
        shaped = [part.view(found.shape) for part, found in zip(parts, pairs, strict=True)]
        return [Matches(query.clamp(min=0), query >= 0) for query in shaped]

    def matching_cost(self, predictions: Predictions, objects: Objects) -> Tensor:
        """Compute the cost of matching every query with every object, float32 [layers, B, Q, N]."""
        layers, batch, _, _ = predictions.boxes.shape
        step = max(1, _PAIRS // max(1, layers * batch * objects.labels.shape[1]))
        logits, boxes = torch.split(predictions.logits, step, 2), torch.split(predictions.boxes, step, 2)
        parts = [self._cost(Predictions(*part), objects) for part in zip(logits, boxes, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _cost(self, predictions: Predictions, objects: Objects) -> Tensor:
        boxes, targets = predictions.boxes, objects.boxes
        layers, _, queries, _ = boxes.shape
        index = objects.labels[None, :, None].expand(layers, -1, queries, -1)
        logits = predictions.logits.gather(-1, index)  # [layers, B, Q, N]: of each object's class
        probabilities = logits.sigmoid()
        positive = -self.alpha * (1 - probabilities) ** self.gamma * F.logsigmoid(logits)
        negative = -(1 - self.alpha) * probabilities**self.gamma * F.logsigmoid(-logits)
        distance = torch.cdist(boxes, targets.expand(layers, -1, -1, -1), p=1)
        overlap = generalized_iou(corners(boxes)[:, :, :, None], corners(targets)[None, :, None], self.giou_eps)
        costs = self.matching_costs
        return costs["classification"] * (positive - negative) + costs["box"] * distance - costs["giou"] * overlap

    def _compare(
        self, predictions: Predictions, objects: Objects, pairs: Matches, has_classes: bool
    ) -> dict[str, Tensor]:
        """Sum the losses of each layer over images, queries and classes, float32 [layers] each."""
        wanted = _one_hot(predictions, objects, pairs)
        focal = sigmoid_focal_loss(predictions.logits, wanted, self.alpha, self.gamma)
        if self.class_weights is not None and has_classes:
            of_query = (wanted * self.class_weights).sum(-1) + (1 - wanted.amax(-1))  # [layers, B, Q]
            focal = focal * of_query[..., None]
        if objects.ignored is not None:  # a query without an object is background, but not in an ignored region
            left_out = find_ignored(corners(predictions.boxes.detach()), objects.ignored) & (wanted.amax(-1) == 0)
            focal = focal.masked_fill(left_out[..., None], 0.0)
        boxes = predictions.boxes.gather(2, pairs.query[..., None].expand(-1, -1, -1, 4))  # [layers, B, N, 4]
        distance = (boxes - objects.boxes).abs().sum(-1)
        missed = 1 - generalized_iou(corners(boxes), corners(objects.boxes), self.giou_eps)
        return {
            "classification": focal.flatten(1).sum(1),
            "box": (distance * pairs.matched).flatten(1).sum(1),
            "giou": (missed * pairs.matched).flatten(1).sum(1),
        }

    def _warn_of_surplus(self, objects: Objects, num_queries: int) -> None:
        surplus = [n for n in objects.counts if n > num_queries]
        if surplus and not self._warned:
            self._warned = True
            warnings.warn(
                f"[LCD-M201] {len(surplus)} of {len(objects.counts)} images of a batch hold up to {max(surplus)} "
                f"objects, more than the {num_queries} queries; the surplus is not learned; raise num_queries",
                stacklevel=3,
            )


def _per_loss(name: str, factors: Sequence[float]) -> dict[str, float]:
    if len(factors) != 3 or not all(0 <= factor < math.inf for factor in factors):
        raise ValueError(f"{name} is {list(factors)}; expected three numbers >= 0: classification, box, giou")
    return dict(zip(("classification", "box", "giou"), map(float, factors), strict=True))


def corners(boxes: Tensor) -> Tensor:
    """Convert boxes [..., 4] from (centre x, centre y, width, height) to (x1, y1, x2, y2)."""
    converted: Tensor = box_convert(boxes, "cxcywh", "xyxy")
    return converted


def generalized_iou(boxes: Tensor, others: Tensor, eps: float = 0.0) -> Tensor:
    """Compute the generalised IoU of boxes (x1, y1, x2, y2) in -1..1, elementwise after broadcasting.

    A box without area has IoU 0 with every box. ``eps`` is added to the areas of union and enclosing box, as some
    implementations do; in 0..1 of the image it lowers the overlap of tiny boxes.

    Reference:
        Rezatofighi et al., "Generalized Intersection over Union", arXiv:1902.09630.
    """
    least = torch.finfo(boxes.dtype).tiny ** 0.5
    low, high = boxes[..., :2], boxes[..., 2:]
    intersection = _area((torch.minimum(high, others[..., 2:]) - torch.maximum(low, others[..., :2])).clamp(min=0))
    enclosing = _area(torch.maximum(high, others[..., 2:]) - torch.minimum(low, others[..., :2]))
    union = _area(high - low) + _area(others[..., 2:] - others[..., :2]) - intersection
    return intersection / (union + eps).clamp(min=least) - (enclosing - union) / (enclosing + eps).clamp(min=least)


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]


def _one_hot(predictions: Predictions, objects: Objects, pairs: Matches) -> Tensor:
    """One-hot classification targets of the queries, all zero where unmatched; float32 [layers, B, Q, C]."""
    queries, classes = predictions.logits.shape[2:]
    nowhere = queries * classes  # one past the last, for objects without a query: shapes stay independent of them
    place = torch.where(pairs.matched, pairs.query * classes + objects.labels, nowhere)  # [layers, B, N]
    flat = predictions.logits.new_zeros(*predictions.logits.shape[:2], nowhere + 1)
    return flat.scatter(2, place, 1.0)[..., :-1].view(predictions.logits.shape)


def _assign(cost: NDArray[np.float32], counts: list[int]) -> NDArray[np.int64]:
    """Solve the assignment of every layer and image: the query of each object, or -1; int64 [layers, B, N]."""
    found = np.full((cost.shape[0], cost.shape[1], cost.shape[3]), -1, np.int64)
    for layer, per_image in enumerate(cost):
        for image, count in enumerate(counts):
            query, target = linear_sum_assignment(per_image[image, :, :count])
            found[layer, image, target] = query
    return found


def _check_finite(flags: NDArray[np.float32], proposals: bool) -> None:
    """Raise for the first layer that is not finite; flags of logits and boxes, layer by layer, proposals last."""
    names = [(what, f"decoder layer {i}") for i in range(len(flags) // 2 - proposals) for what in ("logits", "boxes")]
    names += [(what, "the proposals") for what in ("logits", "boxes")] if proposals else []
    bad = [name for name, flag in zip(names, flags, strict=True) if not flag]
    if not bad:
        return
    # the decoder builds on the proposals
    what, where = next((name for name in bad if name[1] == "the proposals"), bad[0])
    raise DivergenceError(
        f"[LCD-N001] the {what} of {where} are not finite; lower the learning rate, clip gradients, or train in bf16 "
        "or float32 instead of fp16"
    )


def _mean_over_ranks(count: int, device: torch.device) -> Tensor:
    """Average a number of objects over the ranks that train together; at least 1. Float32 [1]."""
    total = send([float(count)], device)  # XLA compiles again for scalars that equal others in the graph
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total.clamp(min=1.0)


def prior_bias(probability: float = 0.01) -> float:
    """Bias at which a sigmoid gives a probability (RetinaNet, arXiv:1708.02002, section 4.1)."""
    return -math.log((1 - probability) / probability)
