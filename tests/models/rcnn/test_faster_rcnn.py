from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import box_iou

from lightning_convnext_det.errors import DataError
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.rcnn.matcher import Sampling, draw_samples
from lightning_convnext_det.models.zoo import create_detector
from lightning_convnext_det.types import Target

# our losses, and torchvision's names of them
LOSSES = {
    "loss_objectness": "loss_objectness",
    "loss_rpn_box": "loss_rpn_box_reg",
    "loss_classification": "loss_classifier",
    "loss_box": "loss_box_reg",
}


def tiny(num_classes: int = 3, **options: object) -> FasterRCNN:
    defaults = {"min_size": 64, "max_size": 96, "fpn_channels": 32, "box_head_features": 32, "score_threshold": 0.0}
    return FasterRCNN(num_classes, "test_convnext", **{**defaults, **options})


def target(boxes: list[list[float]], labels: list[int]) -> Target:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


@pytest.fixture(scope="module")
def torchvisions(photos: list[Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Weights of torchvision's detector, and what it finds in the photos."""
    torch.manual_seed(0)
    reference = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=91, box_score_thresh=0.02, min_size=320, max_size=533
    ).eval()
    with torch.no_grad():
        return reference.state_dict(), reference([photo / 255 for photo in photos])


# with torchvision's own operators the boxes are the same bits; RoIAlign by the gather adds in another order, and moves
# a corner at 600 px by about 1e-4 px, two roundings of float32
@pytest.mark.heavy
@pytest.mark.parametrize(("custom_kernels", "pixels"), [(False, 1e-4), (True, 1e-3)])
def test_faster_rcnn__equals_torchvision_on_real_photos(
    photos: list[Tensor],
    torchvisions: tuple[dict[str, Tensor], list[dict[str, Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
    custom_kernels: bool,
    pixels: float,
) -> None:
    monkeypatch.setenv("DISABLE_CUSTOM_KERNELS", "0" if custom_kernels else "1")
    weights, expected = torchvisions
    detector = create_detector(
        "fasterrcnn_resnet50_fpn", 90, score_threshold=0.02, min_size=320, max_size=533, channels_last=False
    ).eval()
    state = {k.replace("backbone.body.", "backbone.body.net."): v for k, v in weights.items()}
    detector.load_state_dict({k: v for k, v in state.items() if "num_batches_tracked" not in k})
    with torch.no_grad():
        found = detector(photos)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours["boxes"]) == 100
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=pixels, rtol=0)
        torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-5, rtol=0)
        assert torch.equal(ours["labels"], theirs["labels"] - 1)


def draw_as_torchvision(
    sampler: BalancedPositiveNegativeSampler, labels: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What torchvision's sampler returns, masks of objects and background, of the boxes that ours draws."""
    sampling = Sampling(0.5, 0.5, sampler.batch_size_per_image, sampler.positive_fraction)
    drawn = draw_samples(pad_sequence(labels, batch_first=True, padding_value=-1), sampling)
    masks = []
    for rows, used in ((drawn.objects, drawn.has_object), (drawn.background, drawn.is_background)):
        masks.append([torch.zeros(len(x), dtype=torch.uint8) for x in labels])
        for mask, row, own in zip(masks[-1], rows, used, strict=True):
            mask[row[own]] = 1
    return masks[0], masks[1]


@pytest.mark.heavy
def test_faster_rcnn__training_losses_equal_torchvision(photos: list[Tensor]) -> None:
    reference = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, min_size=160, max_size=266)
    reference.backbone.eval()
    reference.transform.torch_choice = lambda sizes: sizes[0]  # it would draw a random number for one size too
    detector = create_detector("fasterrcnn_resnet50_fpn", 3, min_size=160, max_size=266, channels_last=False)
    state = {k.replace("backbone.body.", "backbone.body.net."): v for k, v in reference.state_dict().items()}
    detector.load_state_dict({k: v for k, v in state.items() if "num_batches_tracked" not in k})
    targets = [target([[10, 20, 200, 220], [50, 60, 90, 100]], [0, 2]), target([], []), target([[5, 5, 99, 99]], [1])]
    shifted = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]
    for part in (reference.rpn, reference.roi_heads):  # the same samples: torchvision's sampler makes the host wait
        part.fg_bg_sampler = partial(draw_as_torchvision, part.fg_bg_sampler)
    torch.manual_seed(5)
    expected = reference([p / 255 for p in photos], shifted)
    torch.manual_seed(5)
    losses = detector(photos, targets)
    assert set(losses) == set(LOSSES)
    for name, theirs in LOSSES.items():
        torch.testing.assert_close(losses[name], expected[theirs], rtol=1e-5, atol=1e-6)


def test_faster_rcnn__every_parameter_has_a_gradient_without_objects() -> None:
    detector = tiny()
    losses = detector([torch.rand(3, 50, 70), torch.rand(3, 64, 64)], [target([], []), target([], [])])
    assert losses["loss_box"] == 0
    assert losses["loss_rpn_box"] == 0
    sum(losses.values()).backward()
    assert [n for n, p in detector.named_parameters() if p.grad is None] == []


def test_faster_rcnn__detections_are_sorted_inside_and_labelled_from_zero() -> None:
    detector = tiny(detections_per_image=20).eval()
    image = torch.rand(3, 51, 73)
    with torch.no_grad():
        found = detector([image])[0]
    assert len(found["boxes"]) == 20
    assert found["scores"].diff().le(0).all()
    assert found["labels"].min() >= 0
    assert found["labels"].max() <= 2
    assert found["boxes"].min() >= 0
    assert found["boxes"][:, 2].max() <= 73.001
    assert found["boxes"][:, 3].max() <= 51.001


def test_faster_rcnn__batch_of_mixed_sizes_equals_single_images() -> None:
    detector = tiny(channels_last=False, nms="none", score_threshold=0.3).eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 96)]
    with torch.no_grad():
        together, alone = detector(images), [detector([x])[0] for x in images]
    # the wider image needs no padding, so its detections must not depend on its neighbour
    torch.testing.assert_close(together[1]["boxes"], alone[1]["boxes"], atol=1e-3, rtol=1e-4)
    assert torch.equal(together[1]["labels"], alone[1]["labels"])


def test_faster_rcnn__float32_edges_under_bfloat16() -> None:
    detector = tiny(min_size=256, max_size=384).eval()
    image = torch.rand(3, 250, 380)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = detector([image])[0]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    # bfloat16 has steps of 1 px from 256 on: its x2 would be whole numbers
    assert (found["boxes"][:, 2] % 1 != 0).float().mean() > 0.3
    assert len(found["scores"].unique()) > 50
    detector.train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector([image], [target([[10.3, 20.7, 61.3, 80.9]], [1])])
    assert {x.dtype for x in losses.values()} == {torch.float32}


def test_faster_rcnn__nms_none_keeps_overlaps() -> None:
    hard, none = tiny(nms_threshold=0.1).eval(), tiny(nms="none").eval()
    none.load_state_dict(hard.state_dict())
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        assert len(hard([image])[0]["boxes"]) < len(none([image])[0]["boxes"])


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        ([[5, 5, 5, 30]], [0], r"LCD-D101.*image 'a/7.jpg': box \[5.0, 5.0, 5.0, 30.0\] has no area"),
        ([[30, 5, 5, 30]], [0], "LCD-D101"),
        ([[5, 5, float("inf"), 30]], [0], "LCD-D103.*not finite"),
        ([[5, 5, float("nan"), 30]], [0], "LCD-D103"),
        ([[5, 5, 9, 30]], [3], "LCD-D110.*label 3 in image 'a/7.jpg', but num_classes is 3; labels run from 0 to 2"),
        ([[5, 5, 9, 30]], [-1], "label -1"),
        ([[5, 5, 9, 30]], [0, 1], "LCD-D112.*1 boxes but 2 labels"),
    ],
)
def test_faster_rcnn__bad_target_is_refused_by_name(boxes: list[list[float]], labels: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tiny()([torch.rand(3, 64, 64)], [{**target(boxes, labels), "file_name": "a/7.jpg"}])


def test_faster_rcnn__wrong_use() -> None:
    with pytest.raises(ValueError, match="needs targets"):
        tiny()([torch.rand(3, 64, 64)])
    with pytest.raises(ValueError, match="got 1 images and 0 targets"):
        tiny()([torch.rand(3, 64, 64)], [])
    with pytest.raises(DataError, match=r"boxes \[4\]"):
        tiny()([torch.rand(3, 64, 64)], [{"boxes": torch.zeros(4), "labels": torch.zeros(1, dtype=torch.int64)}])
    with pytest.raises(ValueError, match="num_classes is 0"):
        tiny(0)
    with pytest.raises(ValueError, match="anchor_sizes has 2 groups"):
        tiny(anchor_sizes=((32,), (64,)))


def test_faster_rcnn__soft_nms_lowers_scores_instead(photos: list[Tensor]) -> None:
    detector = tiny(nms="none", score_threshold=0.3, detections_per_image=500).eval()
    image = [photos[0]]
    with torch.no_grad():
        everything = detector(image)[0]
        detector.nms = "soft"
        soft = detector(image)[0]
    # independently: the paper's loop, in float64, class by class
    expected = []
    for label in everything["labels"].unique():
        own = everything["labels"] == label
        boxes, scores = everything["boxes"][own].double(), everything["scores"][own].double()
        while len(scores):
            best = int(scores.argmax())
            expected.append((float(scores[best]), int(label)))
            rest = torch.arange(len(scores)) != best
            overlap = box_iou(boxes[best : best + 1], boxes[rest])[0]
            boxes, scores = boxes[rest], scores[rest] * torch.exp(-(overlap**2) / 0.5)
            boxes, scores = boxes[scores > 1e-3], scores[scores > 1e-3]
    expected.sort(reverse=True)
    assert len(expected) > 100
    # a score that has been lowered below the threshold is dropped as any other
    torch.testing.assert_close(soft["scores"], torch.tensor([s for s, _ in expected if s > 0.3]), atol=1e-5, rtol=0)
    assert 0 < len(soft["scores"]) < len(expected)
    with pytest.raises(ValueError, match="nms is 'gentle'; choose hard, soft or none"):
        detector.nms = "gentle"


def test_box_heads__sample_leaves_out_proposals_beyond_their_number() -> None:
    detector = FasterRCNN(2, "test_convnext", box_batch_size_per_image=512)  # more than there are, so all are drawn
    corners = torch.rand(2, 40, 2) * 50
    proposals = torch.cat((corners, corners + 10 + torch.rand(2, 40, 2) * 20), dim=2)
    targets = [Target(boxes=proposals[i, 3:5] + 1, labels=torch.tensor([1, 2])) for i in range(2)]
    counts = torch.tensor([40, 25])
    padded = proposals * (torch.arange(40) < counts[:, None])[..., None]  # zeros beyond, as the RPN has them
    cut = [own[:count] for own, count in zip(proposals, counts, strict=True)]
    expected = detector.roi_heads.sample(cut, targets)
    found = detector.roi_heads.sample(list(padded), targets, counts)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.num_proposals == theirs.num_proposals
        for one, other in zip(ours[:3], theirs[:3], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("limits", [{}, {"rpn_pre_nms_top_n": (60, 60), "rpn_post_nms_top_n": (2000, 300)}])
def test_faster_rcnn__proposals_on_a_gpu_are_those_of_the_cpu(limits: dict[str, tuple[int, int]]) -> None:
    torch.manual_seed(3)
    detector = FasterRCNN(2, "test_convnext", **limits).double().eval()
    maps = {str(i): torch.randn(2, 256, 200 >> i, 160 >> i, dtype=torch.float64) for i in range(5)}
    sizes = torch.tensor([[800, 640], [700, 600]])
    expected, _ = detector.rpn(maps, (800, 640), sizes)
    found, _ = detector.cuda().rpn({name: x.cuda() for name, x in maps.items()}, (800, 640), sizes.cuda())
    assert found.count.tolist() == expected.count.tolist()
    torch.testing.assert_close(found.boxes.cpu(), expected.boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scores.cpu(), expected.scores, rtol=0, atol=1e-5)
