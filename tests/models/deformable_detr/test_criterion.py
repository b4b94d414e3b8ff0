import itertools
import math
import re
import warnings

import pytest
import torch
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import generalized_box_iou

from lightning_convnext_det.errors import DivergenceError
from lightning_convnext_det.models.deformable_detr.criterion import (
    Objects,
    Predictions,
    SetCriterion,
    corners,
    generalized_iou,
)


def predictions(layers: int = 3, images: int = 2, queries: int = 7, classes: int = 4) -> Predictions:
    logits = torch.randn(layers, images, queries, classes)
    boxes = torch.rand(layers, images, queries, 4) * 0.5 + 0.2
    return Predictions(logits.requires_grad_(), boxes.requires_grad_())


def objects(*counts: int, classes: int = 4) -> Objects:
    boxes = [torch.rand(n, 4) * 0.4 + 0.3 for n in counts]
    return Objects.from_lists(boxes, [torch.randint(classes, (n,)) for n in counts])


def cost_by_hand(logits: list[float], box: list[float], label: int, target: list[float]) -> float:
    """The matching cost of one query and one object, as the papers write it."""
    p = 1 / (1 + math.exp(-logits[label]))
    focal = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
    distance = sum(abs(a - b) for a, b in zip(box, target, strict=True))
    pair = [[b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2] for b in (box, target)]
    giou = generalized_box_iou(torch.tensor(pair[:1]).double(), torch.tensor(pair[1:]).double()).item()
    return 2 * focal + 5 * distance - 2 * giou


def losses_by_hand(logits: Tensor, boxes: Tensor, found: Objects) -> tuple[float, float, float]:
    """The three losses of one layer, trying every assignment."""
    classification = l1 = giou = 0.0
    for b, count in enumerate(found.counts):
        targets, labels = found.boxes[b, :count].double(), found.labels[b, :count].tolist()
        cost = [
            [cost_by_hand(q.tolist(), box.tolist(), n, t.tolist()) for n, t in zip(labels, targets, strict=True)]
            for q, box in zip(logits[b].double(), boxes[b].double(), strict=True)
        ]
        best = min(
            itertools.permutations(range(len(cost)), count), key=lambda p: sum(cost[q][i] for i, q in enumerate(p))
        )
        for q, row in enumerate(logits[b].double().tolist()):
            for c, x in enumerate(row):
                p = 1 / (1 + math.exp(-x))
                hit = q in best and labels[best.index(q)] == c
                classification += 0.25 * (1 - p) ** 2 * -math.log(p) if hit else 0.75 * p**2 * -math.log(1 - p)
        for i, q in enumerate(best):
            box = boxes[b, q].double()
            l1 += (box - targets[i]).abs().sum().item()
            giou += 1 - generalized_box_iou(corners(box)[None], corners(targets[i])[None]).item()
    total = max(1, sum(found.counts))
    return 2 * classification / total, 5 * l1 / total, 2 * giou / total


def test_set_criterion__equals_a_search_over_all_assignments() -> None:
    predicted, found = predictions(layers=2, queries=4), objects(3, 2)
    losses = SetCriterion()(predicted, found)
    for i, suffix in enumerate(["_aux0", ""]):
        expected = losses_by_hand(predicted.logits[i].detach(), predicted.boxes[i].detach(), found)
        actual = [losses[f"loss_{name}{suffix}"].item() for name in ("classification", "box", "giou")]
        assert actual == pytest.approx(expected, rel=1e-5)


def test_set_criterion__names_layers_and_proposals() -> None:
    names = SetCriterion()(predictions(), objects(1, 2), predictions(layers=1, queries=30))
    kinds = ("loss_classification", "loss_box", "loss_giou")
    assert set(names) == {k + s for k in kinds for s in ("", "_aux0", "_aux1", "_proposals")}


def test_set_criterion__proposals_have_one_class() -> None:
    found, proposals = objects(2, 1), predictions(layers=1)
    losses = SetCriterion()(predictions(), found, proposals)
    binary = found._replace(labels=torch.zeros_like(found.labels))
    expected = losses_by_hand(proposals.logits[0].detach(), proposals.boxes[0].detach(), binary)
    actual = [losses[f"loss_{name}_proposals"].item() for name in ("classification", "box", "giou")]
    assert actual == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("counts", [(0, 0), (0, 2)], ids=["empty_batch", "one_empty_image"])
def test_set_criterion__images_without_objects(counts: tuple[int, int]) -> None:
    predicted = predictions()
    losses = SetCriterion()(predicted, objects(*counts))
    sum(losses.values()).backward()
    assert predicted.logits.grad is not None
    assert predicted.boxes.grad is not None
    assert losses["loss_classification"] > 0
    assert (losses["loss_box"] == 0) == (sum(counts) == 0)
    assert (losses["loss_giou"] == 0) == (sum(counts) == 0)
    assert predicted.boxes.grad[:, 0].abs().sum() == 0  # the first image is empty in both


def test_set_criterion__half_precision_is_computed_in_float32() -> None:
    predicted, found = predictions(), objects(2, 3)
    halves = Predictions(predicted.logits.bfloat16(), predicted.boxes.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        losses = SetCriterion()(halves, found)
    expected = SetCriterion()(Predictions(halves.logits.float(), halves.boxes.float()), found)
    assert {x.dtype for x in losses.values()} == {torch.float32}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_set_criterion__one_transfer_for_all_layers_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = []
    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__"):
        method = getattr(Tensor, name)
        count = name != "numpy"  # of what cpu() has fetched
        monkeypatch.setattr(
            Tensor,
            name,
            lambda self, *a, _m=method, _c=count, **k: (transfers.append(1) if _c else None, _m(self, *a, **k))[1],
        )
    SetCriterion()(predictions(layers=6, images=3), objects(1, 0, 4), predictions(1, 3, 50))
    assert len(transfers) == 1


def test_set_criterion__more_objects_than_queries_warns_once() -> None:
    criterion = SetCriterion()
    with pytest.warns(UserWarning, match=r"LCD-M201\] 1 of 2 images .* up to 9 objects, more than the 7 queries"):
        losses = criterion(predictions(), objects(9, 2))
    assert all(x.isfinite() for x in losses.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(predictions(), objects(9, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("where", "field", "message"),
    [
        ("decoder", 0, "the logits of decoder layer 1 are not finite"),
        ("decoder", 1, "the boxes of decoder layer 1 are not finite"),
        ("proposals", 0, "the logits of the proposals are not finite"),
        ("proposals", 1, "the boxes of the proposals are not finite"),
    ],
)
def test_set_criterion__not_finite(value: float, where: str, field: int, message: str) -> None:
    sets = {"decoder": predictions(), "proposals": predictions(layers=1)}
    with torch.no_grad():
        sets[where][field][-1 if where == "proposals" else 1, 1, 3, 2] = value
    with pytest.raises(DivergenceError, match=rf"LCD-N001\] {message}"):
        SetCriterion()(sets["decoder"], objects(0, 1), sets["proposals"])


def test_set_criterion__divides_by_the_mean_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, found = predictions(), objects(1, 2)
    alone = SetCriterion()(predicted, found)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(9))  # the other rank has 9 objects
    together = SetCriterion()(predicted, found)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name] * 3 / 6)


def test_set_criterion__divides_by_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, found = predictions(), objects(0, 1)
    alone = SetCriterion()(predicted, found)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x)  # the other rank has none: 0.5 on average
    for name, value in SetCriterion()(predicted, found).items():
        torch.testing.assert_close(value, alone[name])


def test_generalized_iou__equals_torchvision() -> None:
    boxes, others = corners(torch.rand(50, 4)), corners(torch.rand(60, 4))
    torch.testing.assert_close(generalized_iou(boxes[:, None], others[None]), generalized_box_iou(boxes, others))


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 1.0),
        ([0, 0, 1, 1], [1, 0, 2, 1], 0.0),
        ([0, 0, 1, 1], [3, 0, 4, 1], -0.5),
        ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], 0.0),
        ([0, 0, 0, 0], [0, 0, 1, 1], 0.0),
        ([0, 0, 0, 0], [1, 1, 1, 1], -1.0),
    ],
    ids=["same", "touching", "apart", "same_point", "point_in_box", "two_points"],
)
def test_generalized_iou__by_hand(box: list[float], other: list[float], expected: float) -> None:
    value = generalized_iou(torch.tensor(box, dtype=torch.float32), torch.tensor(other, dtype=torch.float32))
    assert value.item() == pytest.approx(expected)


unit = st.floats(0, 1, width=32)


@settings(max_examples=200)
@given(st.lists(unit, min_size=8, max_size=8))
def test_generalized_iou__stays_in_range_with_finite_gradient(numbers: list[float]) -> None:
    boxes = torch.tensor(numbers).view(2, 4).requires_grad_()
    value = generalized_iou(corners(boxes[0]), corners(boxes[1]))
    value.backward()
    assert -1 - 1e-5 <= value.item() <= 1 + 1e-5
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("place", [0, 1, 2], ids=["classification", "box", "giou"])
def test_set_criterion__loss_weights_scale_their_loss_alone(place: int) -> None:
    predicted, found = predictions(), objects(2, 1)
    weights = [2.0, 5.0, 2.0]
    weights[place] *= 3
    usual, other = SetCriterion()(predicted, found), SetCriterion(loss_weights=weights)(predicted, found)
    changed = ("loss_classification", "loss_box", "loss_giou")[place]
    for name, value in usual.items():
        torch.testing.assert_close(other[name], value * (3 if name.startswith(changed) else 1))


def test_set_criterion__matching_costs_choose_the_pairs() -> None:
    # query 0 has the class, query 1 the box
    predicted = Predictions(
        torch.tensor([[[[4.0], [-4.0]]]]), torch.tensor([[[[0.8, 0.8, 0.1, 0.1], [0.3, 0.3, 0.2, 0.2]]]])
    )
    found = Objects.from_lists([torch.tensor([[0.3, 0.3, 0.2, 0.2]])], [torch.tensor([0])])
    by_class = SetCriterion(matching_costs=(1, 0, 0))(predicted, found)
    by_box = SetCriterion(matching_costs=(0, 1, 0))(predicted, found)
    assert by_class["loss_box"].item() == pytest.approx(5 * (0.5 + 0.5 + 0.1 + 0.1))
    assert by_box["loss_box"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weights": (1, 2)}, "loss_weights is [1, 2]; expected three numbers >= 0"),
        ({"loss_weights": (1, 2, -1)}, "loss_weights is [1, 2, -1]; expected three"),
        ({"matching_costs": (1, math.nan, 1)}, "matching_costs is [1, nan, 1]; expected three"),
        ({"matching_costs": (0, 0, 0)}, "matching_costs are all 0"),
    ],
    ids=["two", "negative", "nan", "all_zero"],
)
def test_set_criterion__refuses_factors(options: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SetCriterion(**options)
