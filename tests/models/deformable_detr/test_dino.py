import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_convnext_det.errors import DivergenceError
from lightning_convnext_det.models.deformable_detr import denoising
from lightning_convnext_det.models.deformable_detr.criterion import Objects, Predictions
from lightning_convnext_det.models.deformable_detr.denoising import Denoising, block_attention, draw_noise
from lightning_convnext_det.models.deformable_detr.dino import DINO
from lightning_convnext_det.models.deformable_detr.dino_criterion import DINOCriterion
from tests.models.deformable_detr.test_model import create_images, perturb, target, targets

VARIANTS: dict[str, dict[str, Any]] = {
    "four_levels": {},
    "five_levels": {"strides": (4, 8, 16, 32)},
    "four_strides": {"strides": (4, 8, 16, 32), "extra_levels": 0},
    "without_denoising": {"denoising_queries": 0},
    "unpadded": {"size_divisible": 1},
    "without_norms": {"out_norm": False},
    "dense_proposals": {"dense_proposals": True},
}


def tiny(num_classes: int = 3, **options: object) -> DINO:
    defaults: dict[str, object] = {
        "backbone": "test_convnext", "num_queries": 12, "hidden_dim": 64, "num_heads": 4, "encoder_layers": 1,
        "decoder_layers": 2, "feedforward_dim": 64, "min_size": 96, "max_size": 160, "denoising_queries": 5,
    }  # fmt: skip
    return DINO(num_classes, **{**defaults, **options})


@pytest.mark.heavy
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_dino__losses_reach_every_parameter(options: dict[str, object]) -> None:
    detector = tiny(**options)
    perturb(detector)
    losses = detector(create_images(), targets())
    suffixes = ["", "_aux0", "_proposals"]
    suffixes += [] if options.get("denoising_queries") == 0 else ["_denoising", "_denoising_aux0"]
    assert set(losses) == {f"loss_{k}{s}" for k in ("classification", "box", "giou") for s in suffixes}
    assert {(x.dtype, x.dim()) for x in losses.values()} == {(torch.float32, 0)}
    sum(losses.values()).backward()
    without = [n for n, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_dino__maps_of_one_cell_with_one_channel_a_group_are_normed() -> None:
    detector = tiny(hidden_dim=32, min_size=64, max_size=64).eval()  # the extra level has one cell
    assert len(detector([torch.rand(3, 64, 64)])[0]["boxes"]) > 0


def test_dino__images_without_objects_train_the_background_alone() -> None:
    detector = tiny()
    losses = detector(create_images()[:2], [target([], []), target([], [])])
    # every parameter has a gradient, which is what ranks wait for that have objects
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.parameters())
    found = {name: float(x.detach()) for name, x in losses.items()}
    zero = {name for name, value in found.items() if value == 0}
    assert zero == {name for name in found if "classification" not in name or "denoising" in name}


@pytest.mark.parametrize("options", [{}, {"size_divisible": 1}], ids=["padded", "unpadded"])
def test_dino__batch_equals_single_images(options: dict[str, object]) -> None:
    detector = tiny(**options).eval()
    perturb(detector)
    images = create_images()
    with torch.no_grad():
        together = detector(images)
        for found, image in zip(together, images, strict=True):
            (alone,) = detector([image])
            torch.testing.assert_close(found["scores"], alone["scores"], atol=1e-5, rtol=0)
            torch.testing.assert_close(found["boxes"], alone["boxes"], atol=1e-3, rtol=0)
            assert torch.equal(found["labels"], alone["labels"])


def test_dino__an_image_narrower_than_a_cell_is_padded_to_one() -> None:
    detector = tiny(size_divisible=1, max_size=200).eval()
    (found,) = detector([torch.rand(3, 20, 400)])  # 10 x 200 pixels
    assert found["boxes"][:, 3].max() <= 20


def test_dino__fewer_tokens_than_queries() -> None:
    detector = tiny(strides=(32,), extra_levels=0, num_queries=50, min_size=64, max_size=64)
    losses = detector([torch.rand(3, 64, 64)], [target([[3, 3, 40, 40]], [1])])
    assert all(x.isfinite() for x in losses.values())
    assert detector.eval().predict(torch.randn(1, 3, 64, 64)).decoder.boxes.shape == (2, 1, 4, 4)


@pytest.mark.heavy
def test_dino__half_precision_keeps_boxes_and_losses_in_float32() -> None:
    detector = tiny()
    perturb(detector)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        losses = detector(create_images(), targets())
        found = detector.eval()(create_images())
    assert {x.dtype for x in losses.values()} == {torch.float32}
    assert all(d["boxes"].dtype == d["scores"].dtype == torch.float32 for d in found)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def test_dino__gradient_checkpointing_changes_no_gradient() -> None:
    plain, frugal = tiny(), tiny(gradient_checkpointing=True)
    perturb(plain)
    frugal.load_state_dict(plain.state_dict())
    images = create_images()
    for detector in (plain, frugal):
        torch.manual_seed(3)  # the noise
        sum(detector(images, targets()).values()).backward()
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_dino__boxes_train_the_layer_before_and_proposals_only_by_their_own_loss() -> None:
    detector = tiny()
    perturb(detector)
    outputs = detector.predict(torch.randn(1, 3, 96, 96))
    heads = [head[6].weight for head in detector.box_heads]
    last, first, proposals = (outputs.decoder.boxes[1], outputs.decoder.boxes[0], outputs.proposals.boxes)
    reached = [
        [
            g is not None and bool(g.any())
            for g in torch.autograd.grad(x.sum(), heads, retain_graph=True, allow_unused=True)
        ]
        for x in (last, first, proposals)
    ]
    assert reached == [[True, True, False], [True, False, False], [False, False, True]]


def test_dino__dense_proposals_train_all_tokens_and_change_no_detection() -> None:
    chosen, dense = tiny(), tiny(dense_proposals=True)
    perturb(chosen)
    dense.load_state_dict(chosen.state_dict())
    images = torch.randn(2, 3, 96, 96)
    expected, found = chosen.predict(images), dense.predict(images)
    torch.testing.assert_close(found.decoder.boxes, expected.decoder.boxes)
    assert found.proposals.boxes.shape == (1, 2, 12**2 + 6**2 + 3**2 + 2**2, 4)
    order = found.proposals.logits[0].amax(-1)
    inside = ((found.proposals.boxes[0] < 1).any(-1)).double()  # boxes of tokens at the border fill up with ones
    best = order.masked_fill(inside == 0, -math.inf).topk(12).indices[:, :, None]
    torch.testing.assert_close(found.proposals.boxes[0].gather(1, best.expand(-1, -1, 4)), expected.proposals.boxes[0])


def test_dino__dense_proposals_change_the_losses_of_proposals_alone() -> None:
    chosen, dense = tiny(), tiny(dense_proposals=True)
    perturb(chosen)
    dense.load_state_dict(chosen.state_dict())
    losses = []
    for detector in (chosen, dense):
        torch.manual_seed(3)  # the noise
        losses.append(detector(create_images(), targets()))
    differ = {name for name in losses[0] if not torch.allclose(losses[0][name], losses[1][name])}
    assert differ == {name for name in losses[0] if name.endswith("_proposals")}
    # the focal loss is a sum over the tokens, of which there are more
    assert losses[1]["loss_classification_proposals"] > losses[0]["loss_classification_proposals"]


def test_dino__heads_start_alike_and_at_the_prior() -> None:
    detector = tiny()
    biases = torch.cat([head.bias for head in detector.class_heads])
    torch.testing.assert_close(biases.sigmoid(), torch.full((9,), 0.01))
    for heads in (detector.class_heads, detector.box_heads):
        states = [head.state_dict() for head in heads]
        assert all(torch.equal(states[0][k], other[k]) for other in states for k in other)
        assert len({id(p) for p in heads.parameters()}) == len(list(heads.parameters()))  # and yet are their own


def test_dino__fixed_size_has_shapes_that_depend_on_nothing() -> None:
    detector = tiny(fixed_size=[160, 192], objects_multiple=4)
    shapes = []
    for wanted in (targets(), [target([], [])] * 3, [target([[1, 2, 30, 31]] * 4, [0] * 4)] * 3):
        queries = detector.denoising(objects_of(wanted, 4))
        shapes.append((queries.contents.shape, queries.groups))
        assert all(x.isfinite() for x in detector(create_images(), wanted).values())
    assert shapes == [((3, 8, 64), 1)] * 3


def test_dino__losses_do_not_depend_on_filling_up(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tiny(), tiny(objects_multiple=4)  # one group each
    perturb(one)
    other.load_state_dict(one.state_dict())
    noise = draw_noise(2, objects_of(targets(), 4), 3)
    monkeypatch.setattr(
        denoising, "draw_noise",
        lambda _, objects, __: denoising.Noise(*(x[:, :, : objects.labels.shape[1]] for x in noise)),
    )  # fmt: skip
    monkeypatch.setattr(one.denoising, "num_queries", 2)
    images = create_images()
    found, expected = (d(images, targets()) for d in (other, one))
    # empty slots take part as background, as in detrex; the others are the same
    for name in found:
        if "denoising" not in name:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)


def objects_of(wanted: list[Any], multiple: int = 1) -> Objects:
    boxes = [t["boxes"] / 200 for t in wanted]
    boxes = [torch.cat([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], 1) for b in boxes]
    return Objects.from_lists(boxes, [t["labels"] for t in wanted], multiple)


def logit(p: float) -> float:
    p = min(max(p, 0.0), 1.0)
    return math.log(max(p, 1e-3) / max(1 - p, 1e-3))


def test_denoising__equals_a_loop_over_groups_and_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = objects_of(targets())
    part = Denoising(3, 8, num_queries=7, label_noise=0.6, box_noise=0.7)
    noise = draw_noise(6, objects, 3)
    monkeypatch.setattr(denoising, "draw_noise", lambda *_: noise)
    queries = part(objects)
    assert (queries.groups, queries.contents.shape) == (3, (3, 12, 8))  # 7 // 2 groups of 2 positives and 2 negatives
    contents, logits = np.zeros((3, 12, 8)), np.zeros((3, 12, 4))
    for copy in range(6):
        for image, count in enumerate(objects.counts):
            for j in range(count):
                at = (copy, image, j)
                label = noise.labels[at] if noise.relabel[at] < 0.3 else objects.labels[image, j]
                contents[image, copy * 2 + j] = part.label_embedding.weight[label].detach().numpy()
                x, y, w, h = objects.boxes[image, j].double().tolist()
                sides = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                for k in range(4):
                    reach = 0.7 * (w, h)[k % 2] / 2
                    sides[k] += float(noise.signs[at][k]) * (float(noise.shifts[at][k]) + copy % 2) * reach
                left, top, right, bottom = (min(max(s, 0.0), 1.0) for s in sides)
                moved = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
                logits[image, copy * 2 + j] = [logit(v) for v in moved]
    np.testing.assert_allclose(queries.contents.detach().numpy(), contents, atol=1e-7)
    np.testing.assert_allclose(queries.box_logits.numpy(), logits, atol=2e-4)  # float32 near 0.001
    mask = block_attention(queries, 5)
    for q in range(17):
        for k in range(17):
            sees = k >= 12 or (q < 12 and q // 4 == k // 4)
            assert bool(mask[q, k]) == (not sees)


def test_draw_noise__has_the_ranges_of_the_paper() -> None:
    noise = draw_noise(40, objects_of(targets()), 3)
    assert noise.relabel.shape == noise.labels.shape == (40, 3, 2)
    assert set(noise.labels.unique().tolist()) == {0, 1, 2}
    assert set(noise.signs.unique().tolist()) == {-1.0, 1.0}
    assert noise.shifts.min() >= 0
    assert noise.shifts.max() < 1


def test_denoising__sides_of_positives_move_by_half_the_box_at_most() -> None:
    objects = Objects.from_lists([torch.tensor([[0.5, 0.5, 0.2, 0.2]])], [torch.tensor([0])])
    boxes = Denoising(3, 8, num_queries=50, label_noise=0.0, box_noise=1.0)(objects).box_logits.sigmoid()[0]
    reach = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    reach = (reach - torch.tensor([0.4, 0.4, 0.6, 0.6])).abs()
    positive = (torch.arange(100) % 2 == 0)[:, None]
    assert reach[positive.expand(-1, 4)].max() <= 0.1 + 1e-5


def focal(value: float, positive: bool) -> float:
    p = 1 / (1 + math.exp(-value))
    return -0.25 * (1 - p) ** 2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)


def giou(a: list[float], b: list[float]) -> float:
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    left, right = max(ax - aw / 2, bx - bw / 2), min(ax + aw / 2, bx + bw / 2)
    top, bottom = max(ay - ah / 2, by - bh / 2), min(ay + ah / 2, by + bh / 2)
    both = max(0.0, right - left) * max(0.0, bottom - top)
    union = aw * ah + bw * bh - both
    hull = (max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)) * (
        max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    )
    return both / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def loop_losses(
    logits: list[list[float]], boxes: list[list[float]], pairs: list[tuple[int, list[float], int]]
) -> tuple[float, float, float]:
    """Losses of one image from pairs (query, box, label), not divided."""
    wanted = {query: label for query, _, label in pairs}
    classification = sum(
        focal(value, wanted.get(q) == c) for q, row in enumerate(logits) for c, value in enumerate(row)
    )
    l1 = sum(abs(x - y) for q, box, _ in pairs for x, y in zip(boxes[q], box, strict=True))
    return classification, l1, sum(1 - giou(boxes[q], box) for q, box, _ in pairs)


def test_dino_criterion__equals_a_loop_in_float64() -> None:
    generator = torch.Generator().manual_seed(4)

    def draw(layers: int, queries: int) -> Predictions:
        boxes = torch.rand(layers, 3, queries, 4, generator=generator) * 0.5 + 0.2
        return Predictions(torch.randn(layers, 3, queries, 3, generator=generator), boxes)

    objects, groups = objects_of(targets()), 3
    decoder, proposals, noisy = draw(2, 6), draw(1, 6), draw(2, groups * 4)
    losses = DINOCriterion((1.0, 5.0, 2.0))(decoder, objects, proposals, noisy, groups)
    expected = dict.fromkeys(losses, 0.0)
    total = sum(objects.counts)
    for suffix, predictions, layer in (
        ("_aux0", decoder, 0), ("", decoder, 1), ("_proposals", proposals, 0), ("_denoising_aux0", noisy, 0),
        ("_denoising", noisy, 1),
    ):  # fmt: skip
        for image, count in enumerate(objects.counts):
            logits, boxes = (x[layer, image].double().tolist() for x in predictions)
            own = [(objects.boxes[image, j].double().tolist(), int(objects.labels[image, j])) for j in range(count)]
            if "denoising" in suffix:
                pairs = [(g * 4 + j, *own[j]) for g in range(groups) for j in range(count)]
            else:
                cost = [
                    [
                        2 * (focal(row[label], True) - focal(row[label], False))
                        + 5 * sum(abs(x - y) for x, y in zip(box, wanted, strict=True))
                        - 2 * giou(box, wanted)
                        for wanted, label in own
                    ]
                    for row, box in zip(logits, boxes, strict=True)
                ]
                rows, columns = linear_sum_assignment(np.array(cost).reshape(6, count))
                pairs = [(int(q), *own[int(j)]) for q, j in zip(rows, columns, strict=True)]
            divisor = total * (groups if "denoising" in suffix else 1)
            found = loop_losses(logits, boxes, pairs)
            for key, weight, value in zip(("classification", "box", "giou"), (1, 5, 2), found, strict=True):
                expected[f"loss_{key}{suffix}"] += weight * value / divisor
    assert {k: float(v) for k, v in losses.items()} == pytest.approx(expected, rel=1e-5)


def test_dino__forward_tensors_has_fixed_shapes_and_what_forward_finds() -> None:
    detector = tiny(detections_per_image=40, independent_images=False).eval()
    perturb(detector)
    images = create_images()
    with torch.no_grad():
        batch, sizes, _ = detector.transform(images)
        found = detector.forward_tensors(batch, torch.tensor(sizes))
        expected = detector(images)
    assert found.boxes.shape == (3, 40, 4)
    for i, detection in enumerate(expected):
        assert torch.equal(found.scores[i, : found.count[i]], detection["scores"])
        assert torch.equal(found.labels[i, : found.count[i]], detection["labels"])


def test_dino__boxes_without_area_in_the_image_are_dropped() -> None:
    detector = tiny(score_threshold=0.0).eval()
    found = detector.select(outputs_of([[0.5, 0.5, 0.2, 0.2], [1.5, 0.5, 0.2, 0.2]]), torch.zeros(1, 3, 96, 96))
    (kept,) = detector.restore(found, [(96, 96)], [torch.zeros(3, 96, 96)])
    assert len(kept["boxes"]) == 3  # three classes of the first
    assert torch.unique(kept["boxes"], dim=0).shape[0] == 1


def outputs_of(boxes: list[list[float]]) -> Any:
    from lightning_convnext_det.models.deformable_detr.detector import Outputs

    return Outputs(Predictions(torch.zeros(1, 1, len(boxes), 3), torch.tensor([[boxes]])), None)


def test_dino__diverged_weights_are_refused_in_training() -> None:
    detector = tiny()
    with torch.no_grad():
        detector.class_heads[-1].bias.fill_(math.nan)
    with pytest.raises(DivergenceError, match=r"LCD-N001"):
        detector(create_images(), targets())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 60}, "hidden_dim is 60; GroupNorm needs a multiple of 32"),
        ({"num_heads": 5}, "hidden_dim 64 cannot be divided among 5 heads"),
        ({"label_noise": 1.5}, "label_noise is 1.5"),
        ({"denoising_queries": -1}, "denoising_queries is -1"),
    ],
)
def test_dino__arguments_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_dino__resizes_as_pillow_where_asked() -> None:
    from PIL import Image

    detector = tiny(resize="pillow").eval()
    pixels = torch.randint(256, (3, 61, 80), dtype=torch.uint8)
    batch, ((height, width),), _ = detector.transform([pixels])
    assert (height, width) == (96, 126)
    resized = np.array(Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((126, 96), Image.Resampling.BILINEAR))
    expected = Tensor(resized / 255.0).permute(2, 0, 1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (detector.transform.image_mean, detector.transform.image_std))
    torch.testing.assert_close(batch[0, :, :96, :126] * std + mean, expected, atol=1e-5, rtol=0)
