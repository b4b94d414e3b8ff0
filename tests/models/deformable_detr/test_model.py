import math

import pytest
import torch
from torch import Tensor

from lightning_convnext_det.errors import DataError, DivergenceError
from lightning_convnext_det.models.deformable_detr.levels import flatten_levels
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR, Outputs
from lightning_convnext_det.models.deformable_detr.transformer import DeformableAttention, inverse_sigmoid
from lightning_convnext_det.models.tensor_detections import split_detections
from lightning_convnext_det.types import Detection, Target

VARIANTS = {
    "refined": {},
    "plain": {"box_refinement": False},
    "two_stage": {"two_stage": True},
    "paper_levels": {"strides": (8, 16, 32), "extra_levels": 1},
    "one_level": {"strides": (32,)},
    "two_extra_levels": {"strides": (16, 32), "extra_levels": 2, "two_stage": True},
}


def tiny(num_classes: int = 3, **options: object) -> DeformableDETR:
    defaults: dict[str, object] = {
        "backbone": "test_convnext",
        "num_queries": 12,
        "hidden_dim": 64,
        "num_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "feedforward_dim": 64,
        "min_size": 96,
        "max_size": 160,
        "dropout": 0.0,
    }
    return DeformableDETR(num_classes, **{**defaults, **options})


def perturb(module: torch.nn.Module, scale: float = 0.3) -> None:
    """Make outputs depend on everything: heads, offsets and attention weights start at zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "backbone" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale * parameter.shape[-1] ** -0.5)


def target(boxes: list[list[float]], labels: list[int]) -> Target:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def create_images() -> list[Tensor]:
    return [torch.rand(3, 97, 131), torch.randint(256, (3, 140, 96), dtype=torch.uint8), torch.rand(3, 96, 96)]


def targets() -> list[Target]:
    return [target([[5, 5, 60, 70], [20, 30, 120, 90]], [0, 2]), target([], []), target([[1, 2, 30, 31]], [1])]


def test_deformable_detr__has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        detector = DeformableDETR(91, "convnextv2_tiny")
    assert sum(p.numel() for p in detector.parameters()) == 39_992_252


@pytest.mark.heavy
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_deformable_detr__losses_reach_every_parameter(options: dict[str, object]) -> None:
    detector = tiny(**options)
    perturb(detector)
    losses = detector(create_images(), targets())
    suffixes = ["", "_aux0", "_aux1", *(["_proposals"] if options.get("two_stage") else [])]
    assert set(losses) == {f"loss_{k}{s}" for k in ("classification", "box", "giou") for s in suffixes}
    assert {(x.dtype, x.dim()) for x in losses.values()} == {(torch.float32, 0)}
    sum(losses.values()).backward()
    without = [n for n, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@pytest.mark.heavy
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_deformable_detr__detections_keep_the_contract(options: dict[str, object]) -> None:
    detector = tiny(detections_per_image=20, **options).eval()
    perturb(detector)
    images = create_images()
    detections = detector(images)
    assert len(detections) == 3
    for image, found in zip(images, detections, strict=True):
        height, width = image.shape[-2:]
        assert found["boxes"].shape == (20, 4)
        assert (found["boxes"].dtype, found["scores"].dtype, found["labels"].dtype) == (
            *[torch.float32] * 2,
            torch.int64,
        )
        assert found["boxes"].min() >= 0
        assert (found["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert (found["boxes"][:, 2:] >= found["boxes"][:, :2]).all()
        assert torch.equal(found["scores"], found["scores"].sort(descending=True).values)
        assert set(found["labels"].tolist()) <= {0, 1, 2}


@pytest.mark.heavy
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_deformable_detr__batch_equals_single_images(options: dict[str, object]) -> None:
    detector = tiny(**options).eval()
    perturb(detector)
    batch, sizes, _ = detector.transform(create_images())
    with torch.no_grad():
        together = detector.predict(batch, sizes).decoder
        for i, image in enumerate(images_of(batch, sizes)):
            single, size, _ = image[None], [sizes[i]], None
            alone = detector.predict(pad(single), size).decoder
            torch.testing.assert_close(together.logits[:, i], alone.logits[:, 0], atol=1e-4, rtol=0)
            torch.testing.assert_close(together.boxes[:, i], alone.boxes[:, 0], atol=1e-4, rtol=0)
    assert together.boxes.std() > 0.05


def images_of(batch: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    return [x[:, :h, :w] for x, (h, w) in zip(batch, sizes, strict=True)]


def pad(batch: Tensor) -> Tensor:
    height, width = (-(-n // 32) * 32 for n in batch.shape[-2:])
    return torch.nn.functional.pad(batch, (0, width - batch.shape[-1], 0, height - batch.shape[-2]))


def test_deformable_detr__batch_equals_single_photos(photos: list[Tensor]) -> None:
    detector = tiny(min_size=128, max_size=256, nms="none").eval()
    perturb(detector)
    mixed = [photos[0], photos[1].transpose(1, 2), photos[2][:, :300]]
    with torch.no_grad():
        together = detector(mixed)
        alone = [detector([photo])[0] for photo in mixed]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one["scores"], other["scores"], atol=1e-4, rtol=0)
        torch.testing.assert_close(one["boxes"], other["boxes"], atol=640 * 1e-4, rtol=0)


def test_deformable_detr__pads_the_batch_first_where_asked() -> None:
    detector = tiny(independent_images=False).eval()
    perturb(detector)
    batch, sizes, _ = detector.transform(create_images())
    seen = []
    detector.backbone.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    with torch.no_grad():
        padded = detector.predict(batch, sizes).decoder.boxes
        detector.levels.independent_images = True
        independent = detector.predict(batch, sizes).decoder.boxes
    assert seen == [batch.shape, (1, 3, 96, 160), (1, 3, 160, 96), (1, 3, 96, 96)]
    difference = (padded - independent).abs().flatten(2).amax(2)
    assert difference.min() > 1e-5  # norms over whole maps see the padding
    assert difference.max() < 0.2


def test_deformable_detr__batch_without_padding_has_no_mask() -> None:
    detector = tiny().eval()
    batch = torch.randn(2, 3, 96, 128)
    whole = detector.levels(detector.backbone, batch, None)
    told = detector.levels(detector.backbone, batch, *detector.levels.place(batch, [(96, 128)] * 2))
    cut = detector.levels(detector.backbone, batch, *detector.levels.place(batch, [(96, 128), (96, 127)]))
    assert whole.padding is None
    assert told.padding is None
    assert whole.positions.shape[0] == 1
    assert cut.padding is not None
    assert cut.padding.sum() == 0  # the last column's first pixel is still in the image


def test_flatten_levels__masked_path_equals_mask_free_path() -> None:
    maps = [torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 3)]
    free = flatten_levels(maps, None, torch.randn(2, 8), 0.5)
    masked = flatten_levels(maps, torch.tensor([[(4, 6), (2, 3)]] * 2), torch.zeros(2, 8), 0.5)
    assert masked.padding is not None
    assert not masked.padding.any()
    torch.testing.assert_close(masked.reference_points, free.reference_points.expand(2, -1, 2, -1))
    torch.testing.assert_close(
        free.to_maps(torch.ones(2, 5, 4)).expand(-1, -1, 2, -1), masked.to_maps(torch.ones(2, 5, 4))
    )


def test_flatten_levels__by_hand() -> None:
    maps = [torch.arange(6.0).view(1, 1, 2, 3).expand(1, 4, 2, 3)]
    levels = flatten_levels(maps, torch.tensor([[(1, 2)]]), torch.zeros(1, 4), 0.5)
    assert levels.tokens[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert levels.padding is not None
    assert levels.padding[0].tolist() == [False, False, True, True, True, True]
    torch.testing.assert_close(levels.valid_ratios, torch.tensor([[[2 / 3, 1 / 2]]]))
    torch.testing.assert_close(levels.centers[0, 1], torch.tensor([0.75, 0.5]))  # second of two columns, only row
    torch.testing.assert_close(
        levels.reference_points[0, 1, 0], torch.tensor([0.5, 0.25])
    )  # of three columns, two rows
    y, x = 2 * math.pi * 0.5, 2 * math.pi * 0.75
    expected = torch.tensor([math.sin(y), math.cos(y), math.sin(x), math.cos(x)])
    torch.testing.assert_close(levels.positions[0, 1], expected, atol=1e-5, rtol=0)


def test_flatten_levels__position_offset_moves_the_encoding() -> None:
    maps = [torch.zeros(1, 4, 1, 1)]
    edge = flatten_levels(maps, None, torch.zeros(1, 4), 0.0).positions[0, 0]
    torch.testing.assert_close(edge, torch.tensor([0.0, 1.0, 0.0, 1.0]), atol=1e-5, rtol=0)  # of a full turn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inverse_sigmoid__is_finite_at_the_ends(dtype: torch.dtype) -> None:
    logits = inverse_sigmoid(torch.tensor([0, 1e-8, 0.25, 1 - 1e-4, 1], dtype=dtype))
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert logits[2].item() == pytest.approx(math.log(1 / 3))


def test_deformable_attention__starts_as_the_paper_says() -> None:
    attention = DeformableAttention(32, 8, 2, 3)
    attention.reset_parameters()
    offsets = attention.sampling_offsets.bias.view(8, 2, 3, 2)
    torch.testing.assert_close(offsets[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
    torch.testing.assert_close(offsets[1, 1], torch.tensor([[1.0, 1], [2, 2], [3, 3]]))
    torch.testing.assert_close(offsets[4, 1, 2], torch.tensor([-3.0, 0]), atol=1e-6, rtol=0)
    assert attention.sampling_offsets.weight.abs().sum() == 0


def test_deformable_detr__references_are_detached_between_layers() -> None:
    detector = tiny()
    perturb(detector)
    losses = detector(create_images(), targets())
    box_heads = [h[6].weight for h in detector.box_heads]
    grads = torch.autograd.grad(losses["loss_box"], box_heads)
    assert [bool(g.abs().sum() > 0) for g in grads] == [False, False, True]


def test_deformable_detr__without_refinement_all_layers_share_heads_and_points() -> None:
    detector = tiny(box_refinement=False).eval()
    assert len(detector.box_heads) == len(detector.class_heads) == 1
    boxes = detector.predict(torch.randn(1, 3, 96, 96)).decoder.boxes  # box heads start at zero: all say the same
    torch.testing.assert_close(boxes[0], boxes[2])
    assert boxes[..., 2:].flatten().tolist() == pytest.approx([1 / (1 + math.exp(2))] * boxes[..., 2:].numel())


def test_deformable_detr__starts_at_the_prior() -> None:
    detector = tiny().eval()
    biases = torch.cat([head.bias for head in detector.class_heads])
    torch.testing.assert_close(biases.sigmoid(), torch.full((9,), 0.01))


def test_deformable_detr__two_stage_starts_from_the_best_proposals() -> None:
    detector = tiny(two_stage=True).eval()
    perturb(detector)
    with torch.no_grad():
        batch, sizes, _ = detector.transform(create_images())
        levels = detector.levels(detector.backbone, batch, *detector.levels.place(batch, sizes))
        memory = detector.encoder(levels)
        heads = detector.class_heads[-1], detector.box_heads[-1]
        proposals, reference, chosen = detector.proposer(memory, levels, *heads, 12)
    assert chosen.all()
    for i in range(3):
        padding = levels.padding[i]
        usable = ((levels.centers[i] > 0.01) & (levels.centers[i] < 0.99)).all(-1)
        assert not (usable & padding).any()
        scores = proposals.logits[0, i, :, 0].masked_fill(~usable, -math.inf)
        expected = proposals.boxes[0, i][scores.topk(12).indices]
        torch.testing.assert_close(reference[i], expected)


def test_deformable_detr__two_stage_with_fewer_tokens_than_queries() -> None:
    detector = tiny(two_stage=True, strides=(32,), num_queries=50, min_size=64, max_size=64)
    losses = detector([torch.rand(3, 64, 64)], [target([[3, 3, 40, 40]], [1])])
    assert all(x.isfinite() for x in losses.values())
    assert detector.eval().predict(torch.randn(1, 3, 64, 64)).decoder.boxes.shape == (3, 1, 4, 4)


@pytest.mark.parametrize("method", ["none", "hard"])
def test_deformable_detr__two_stage_of_a_small_image_does_not_depend_on_its_padding(method: str) -> None:
    # 40 x 40 pixels fill 10 x 10, 5 x 5, 3 x 3 and 2 x 2 cells: fewer than queries, but not than cells with padding
    options = {"two_stage": True, "num_queries": 400, "detections_per_image": 500, "nms": method}
    detector = tiny(min_size=40, max_size=160, nms_threshold=0.5, **options).eval()
    perturb(detector)
    small, wide, high = torch.rand(3, 40, 40), torch.rand(3, 40, 160), torch.rand(3, 150, 41)
    with torch.no_grad():
        (alone,) = detector([small])
        for batch in ([small, wide], [high, small], [wide, small, high]):
            found = detector(batch)[[x is small for x in batch].index(True)]
            assert len(found["boxes"]) == len(alone["boxes"])
            torch.testing.assert_close(found["scores"], alone["scores"], atol=1e-5, rtol=0)
            torch.testing.assert_close(found["boxes"], alone["boxes"], atol=1e-3, rtol=0)
    if method == "none":
        assert len(alone["boxes"]) == 3 * (100 + 25 + 9 + 4)  # all classes of all queries that have a token
    assert alone["boxes"].min() >= 0
    assert alone["boxes"].max() <= 40


@pytest.mark.heavy
@pytest.mark.parametrize("two_stage", [False, True])
def test_deformable_detr__half_precision_keeps_boxes_and_losses_in_float32(two_stage: bool) -> None:
    detector = tiny(two_stage=two_stage)
    perturb(detector)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(create_images(), targets())
        found = detector.eval()(create_images())
        outputs = detector.predict(torch.randn(1, 3, 96, 96))
    assert {x.dtype for x in losses.values()} == {torch.float32}
    assert {x.dtype for d in found for x in (d["boxes"], d["scores"])} == {torch.float32}
    assert outputs.decoder.boxes.dtype == outputs.decoder.logits.dtype == torch.float32
    boxes = outputs.decoder.boxes
    assert not torch.equal(boxes, boxes.bfloat16().float())  # not merely cast back
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def test_deformable_detr__without_auxiliary_losses() -> None:
    torch.manual_seed(4)
    full = tiny()
    perturb(full)
    last = tiny(auxiliary_losses=False)
    last.load_state_dict(full.state_dict())
    images = create_images()
    losses, expected = last(images, targets()), full(images, targets())
    assert set(losses) == {"loss_classification", "loss_box", "loss_giou"}
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.heavy
def test_deformable_detr__gradient_checkpointing_changes_no_gradient() -> None:
    plain, frugal = tiny(), tiny(gradient_checkpointing=True)
    perturb(plain)
    frugal.load_state_dict(plain.state_dict())
    images = create_images()
    for detector in (plain, frugal):
        sum(detector(images, targets()).values()).backward()
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_deformable_detr__losses_ignore_padding_pixels_and_order() -> None:
    detector = tiny()
    perturb(detector)
    images, wanted = create_images(), targets()
    forth = detector(images, wanted)
    back = detector(images[::-1], wanted[::-1])
    for name, value in forth.items():
        torch.testing.assert_close(value, back[name], rtol=1e-4, atol=1e-5)


def test_select__applies_threshold_and_hard_suppression() -> None:
    detector = tiny(nms="hard", nms_threshold=0.5, score_threshold=0.3, num_queries=4).eval()
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.42], [0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])
    logits = torch.full((4, 3), -9.0)
    logits[0, 1], logits[1, 1], logits[2, 1], logits[3, 0] = 3.0, 2.0, 1.0, -2.0
    outputs = Outputs(detector_predictions(logits, boxes), None)
    (found,) = select(detector, outputs, (100, 200))
    assert found["labels"].tolist() == [1, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 1.0]).sigmoid())
    torch.testing.assert_close(found["boxes"], torch.tensor([[60.0, 30, 140, 70], [30, 15, 50, 25]]))
    detector.nms = "none"
    assert select(detector, outputs, (100, 200))[0]["labels"].tolist() == [1, 1, 1]


def select(detector: DeformableDETR, outputs: Outputs, size: tuple[int, int]) -> list[Detection]:
    return split_detections(detector.select(outputs, torch.zeros(1, 3, *size)))


def detector_predictions(logits: Tensor, boxes: Tensor) -> object:
    from lightning_convnext_det.models.deformable_detr.criterion import Predictions

    return Predictions(logits[None, None], boxes[None, None])


def test_select__soft_suppression_keeps_order_and_lowers_scores() -> None:
    detector = tiny(nms="soft", num_queries=3).eval()
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]])
    logits = torch.full((3, 3), -20.0)
    logits[0, 1], logits[1, 1], logits[2, 1] = 3.0, 2.0, 1.0
    (found,) = select(detector, Outputs(detector_predictions(logits, boxes), None), (100, 100))
    expected = [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1)), math.exp(-1 / 0.5) / (1 + math.exp(-2))]
    assert found["scores"][:3].tolist() == pytest.approx(expected, rel=1e-5)


def test_deformable_detr__diverged_weights_are_refused_in_evaluation() -> None:
    detector = tiny().eval()
    with torch.no_grad():
        detector.class_heads[-1].weight[1] = math.nan
    with pytest.raises(DivergenceError, match=r"LCD-N001\] the scores are not finite"):
        detector(create_images())


def test_deformable_detr__diverged_weights_are_refused_in_training() -> None:
    detector = tiny()
    with torch.no_grad():
        detector.box_heads[1][6].bias[0] = math.nan
    with pytest.raises(DivergenceError, match=r"LCD-N001\] the boxes of decoder layer 1"):
        detector(create_images(), targets())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"hidden_dim": 64, "num_heads": 5}, "hidden_dim 64 cannot be divided among 5 heads"),
        ({"hidden_dim": 48, "num_heads": 4}, "hidden_dim is 48; GroupNorm needs a multiple of 32"),
        ({"strides": (4, 8, 64)}, "has strides 4, 8, 16, 32; a pyramid needs 4, 8, 64"),
        ({"two_stage": True, "box_refinement": False}, "two_stage=True needs box_refinement=True"),
        ({"nms": "gentle"}, "nms is 'gentle'; choose hard, soft or none"),
        ({"backbone": "resnet10t", "stem_eps": 1e-5}, "'resnet10t' has no LayerNorm"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_deformable_detr__arguments_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**{"num_classes": 3, **options})


def test_deformable_detr__targets_are_checked() -> None:
    detector = tiny()
    with pytest.raises(ValueError, match="needs targets"):
        detector(create_images())
    with pytest.raises(DataError, match=r"LCD-D110\] label 3 in image 0"):
        detector(create_images()[:1], [target([[1, 1, 9, 9]], [3])])


def test_deformable_detr__fixed_size_computes_what_padding_by_hand_does() -> None:
    torch.manual_seed(0)
    fixed = tiny(fixed_size=[160, 192], objects_multiple=5)
    perturb(fixed)
    free = tiny(independent_images=False)
    free.load_state_dict(fixed.state_dict())
    images = create_images()
    batch, sizes, _ = fixed.transform(images)
    assert batch.shape == (3, 3, 160, 192)
    assert sizes == [(96, 129), (140, 96), (96, 96)]
    # an empty image of the fixed size beside the others makes the other network pad to it
    frame = torch.zeros(3, 3, 160, 192)
    frame[:] = batch
    with torch.no_grad():
        torch.testing.assert_close(
            fixed.predict(batch, sizes).decoder, free.predict(frame, sizes).decoder, atol=1e-5, rtol=0
        )
    ours, theirs = fixed.train()(images, targets()), free.train()(images, targets())
    assert ours.keys() == theirs.keys()
    assert all(loss.isfinite() for loss in ours.values())


def test_deformable_detr__fixed_size_of_full_images_is_masked_all_the_same() -> None:
    detector = tiny(fixed_size=[96, 96]).eval()
    batch = torch.rand(1, 3, 96, 96)
    levels = detector.levels(detector.backbone, batch, *detector.levels.place(batch, [(96, 96)]))
    assert levels.padding is not None
    assert not levels.padding.any()


def test_deformable_detr__losses_do_not_depend_on_filling_up() -> None:
    torch.manual_seed(0)
    one, other = tiny(), tiny(objects_multiple=16)
    perturb(one)
    other.load_state_dict(one.state_dict())
    images = create_images()
    for place in (slice(None), slice(1, 2)):  # also an image without objects
        expected = one.train()(images[place], targets()[place])
        found = other.train()(images[place], targets()[place])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_deformable_detr__fixed_size_must_suit_the_strides() -> None:
    with pytest.raises(ValueError, match=r"fixed_size is \[100, 96\]; expected \(height, width\), multiples of 32"):
        tiny(fixed_size=[100, 96])


@pytest.mark.parametrize(
    "options", [{}, {"nms": "hard", "nms_threshold": 0.3}, {"score_threshold": 0.012}, {"two_stage": True}]
)
def test_forward_tensors__has_fixed_shapes_and_what_forward_finds(options: dict[str, object]) -> None:
    detector = tiny(detections_per_image=40, independent_images=False, **options).eval()
    perturb(detector)
    images = create_images()
    with torch.no_grad():
        batch, sizes, _ = detector.transform(images)
        found = detector.forward_tensors(batch, torch.tensor(sizes))
        expected = detector(images)
    assert found.boxes.shape == (3, 40, 4)
    assert found.scores.shape == found.labels.shape == (3, 40)
    assert found.labels.dtype == found.count.dtype == torch.int64
    for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
        n = len(expected[i]["scores"])
        assert found.count[i] == n <= 36  # 12 queries of 3 classes
        assert torch.equal(found.scores[i, :n], expected[i]["scores"])
        assert torch.equal(found.labels[i, :n], expected[i]["labels"])
        ratio = torch.tensor([image.shape[2] / size[1], image.shape[1] / size[0]]).repeat(2)
        limit = torch.tensor([image.shape[2], image.shape[1]]).repeat(2)
        boxes = (found.boxes[i, :n] * ratio).clamp(min=0).minimum(limit)
        torch.testing.assert_close(boxes, expected[i]["boxes"], atol=1e-4, rtol=0)
        assert not found.boxes[i, n:].any()
        assert not found.scores[i, n:].any()
        assert not found.labels[i, n:].any()


@pytest.mark.parametrize("nms", ["none", "hard", "soft"])
def test_deformable_detr__what_is_not_finite_is_refused_by_any_nms(nms: str) -> None:
    detector = tiny(nms=nms, score_threshold=0.9).eval()
    with torch.no_grad():
        detector.box_heads[-1].get_parameter("6.bias")[0] = math.nan
    with pytest.raises(DivergenceError, match=r"LCD-N001\] the boxes are not finite"):
        detector(create_images())
