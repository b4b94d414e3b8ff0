"""Weights of the classes: against torch's and a loop, in the losses of detectors, and wrong ones refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.models.class_weights import weight_classes
from lightning_convnext_det.models.deformable_detr.criterion import Objects, Predictions, SetCriterion
from lightning_convnext_det.models.deformable_detr.dino import DINO
from lightning_convnext_det.models.deformable_detr.dino_criterion import DINOCriterion
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.types import Target

BASE = {"backbone": "test_convnext", "min_size": 64, "max_size": 96}
TINY = {**BASE, "box_head": "two_fc", "box_head_features": 32, "fpn_channels": 32, "box_batch_size_per_image": 32}
SMALL = {**BASE, "num_queries": 10, "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 1, "feedforward_dim": 32}
CASES = [(FasterRCNN, TINY), (CascadeRCNN, TINY), (DeformableDETR, SMALL), (DINO, {**SMALL, "denoising_queries": 4})]
IDS = [case[0].__name__ for case in CASES]


def losses(kind: type[nn.Module], options: dict[str, object], weights: list[float] | None) -> dict[str, torch.Tensor]:
    """Of an image with objects of the classes 0 and 1."""
    torch.manual_seed(0)
    detector = kind(3, **options, class_weights=weights).train()
    boxes = torch.tensor([[4.0, 8.0, 30.0, 40.0], [30.0, 10.0, 60.0, 44.0]])
    target: Target = {"boxes": boxes, "labels": torch.tensor([0, 1])}
    torch.manual_seed(1)
    found: dict[str, torch.Tensor] = detector([torch.rand(3, 48, 64)], [target])
    return found


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_class_weights__change_the_classification_loss_alone(kind: type[nn.Module], options: dict[str, object]) -> None:
    plain, ones = losses(kind, options, None), losses(kind, options, [1.0, 1.0, 1.0])
    heavy, absent = losses(kind, options, [1.0, 5.0, 1.0]), losses(kind, options, [1.0, 1.0, 9.0])
    assert plain.keys() == heavy.keys()
    for name, value in plain.items():
        torch.testing.assert_close(ones[name], value)
        torch.testing.assert_close(absent[name], value)  # no object of class 2
        is_weighted = "classification" in name and (kind is not DeformableDETR or "proposals" not in name)
        assert (heavy[name] > value + 1e-4) if is_weighted else torch.allclose(heavy[name], value), name


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_class_weights__are_not_in_checkpoints_and_are_checked(
    kind: type[nn.Module], options: dict[str, object]
) -> None:
    plain, weighted = kind(2, **options), kind(2, **options, class_weights=[1.0, 2.0])
    assert plain.state_dict().keys() == weighted.state_dict().keys()
    with pytest.raises(ArgumentError, match="class_weights has 3 entries, but num_classes is 2"):
        kind(2, **options, class_weights=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="class_weights"):
        kind(2, **options, class_weights=[1.0, -2.0])


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, float("inf")], [float("nan"), 1.0]])
def test_weight_classes__refuses(weights: list[float]) -> None:
    with pytest.raises(ArgumentError, match="class_weights is"):
        weight_classes(weights, 2)


def test_box_heads__weighted_mean_is_over_all_samples() -> None:
    heads = FasterRCNN(2, **TINY, class_weights=[3.0, 0.5]).roi_heads
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 0, 1])
    each = F.cross_entropy(logits, labels, reduction="none")
    expected = sum(each[i] * (1.0, 3.0, 0.5)[label] for i, label in enumerate(labels.tolist())) / 6
    torch.testing.assert_close(heads._classification_loss(logits, labels), expected)


@pytest.mark.parametrize("kind", [SetCriterion, DINOCriterion])
def test_set_criterion__weights_matched_queries(kind: type[SetCriterion]) -> None:
    torch.manual_seed(0)
    predictions = Predictions(torch.randn(1, 1, 4, 3), torch.rand(1, 1, 4, 4) * 0.5 + 0.2)
    boxes, labels = torch.rand(2, 4) * 0.5 + 0.2, torch.tensor([2, 0])
    objects = Objects.from_lists([boxes], [labels])
    weights = torch.tensor([4.0, 1.0, 7.0])
    found = kind(class_weights=weights)(predictions, objects)["loss_classification"]
    pairs = kind()._match([(predictions, objects)])[0]
    expected = 0.0
    for query in range(4):
        wanted, weight = torch.zeros(3, dtype=torch.float64), 1.0
        for place, label in enumerate(labels.tolist()):
            if int(pairs.query[0, 0, place]) == query:
                wanted[label], weight = 1.0, float(weights[label])
        p = predictions.logits[0, 0, query].double().sigmoid()
        right = torch.where(wanted > 0, p, 1 - p)
        alpha = torch.where(wanted > 0, 0.25, 0.75)
        expected += weight * float((-alpha * (1 - right) ** 2 * right.log()).sum())
    assert float(found) == pytest.approx(2.0 * expected / 2, rel=1e-5)
