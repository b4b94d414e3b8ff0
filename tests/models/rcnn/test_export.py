"""The tensor core of Faster and Cascade R-CNN: eager, as a program of torch.export, and in onnxruntime."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.models import selection as selection_module
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.selection import Selection
from lightning_convnext_det.models.tensor_detections import split_detections

SIZES = [(95, 125), (281, 93), (128, 384), (200, 131)]  # odd ones, portrait 1:3


class Core(nn.Module):
    """What is exported: a detector's tensor core alone."""

    def __init__(self, detector: FasterRCNN) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.detector.forward_tensors(images, sizes))


def build(kind: type[FasterRCNN] = FasterRCNN, **options: object) -> FasterRCNN:
    """Build a detector with spread scores and boxes that differ from their proposals."""
    small = {"fpn_channels": 16, "box_head_features": 32, "score_threshold": 0.3, "detections_per_image": 30}
    limits = {"rpn_pre_nms_top_n": (100, 100), "rpn_post_nms_top_n": (60, 60)}
    widths = {"cls_score.weight": 0.4, "bbox_pred.weight": 0.05, "cls_logits.weight": 0.05}
    torch.manual_seed(4)
    detector = kind(3, backbone="test_convnext", **{**small, **limits, **options}).eval()
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if width := widths.get(".".join(name.split(".")[-2:])):
                parameter.normal_(std=width)
    return detector


def pad(sizes: list[tuple[int, int]], scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Make a batch of random images of (height, width), zero on padding, and their sizes."""
    height, width = (max(-(-side // 32) * 32 for side in sides) for sides in zip(*sizes, strict=True))
    batch = torch.zeros(len(sizes), 3, height, width)
    for slot, (own_height, own_width) in zip(batch, sizes, strict=True):
        slot[:, :own_height, :own_width] = torch.randn(3, own_height, own_width) * scale
    return batch, torch.tensor(sizes)


def batches() -> list[tuple[Tensor, Tensor]]:
    """One image of each size, batches of 2 and 3, and images without a pixel, on which nothing can be found."""
    torch.manual_seed(5)
    several = pad([(96, 130), (120, 128)]), pad([(97, 96), (128, 90), (33, 128)])
    images, sizes = several[1]
    empty = (images[:1], sizes[:1] * 0), (images, sizes * torch.tensor([[1], [0], [1]]))
    return [*(pad([size]) for size in SIZES), *several, *empty]


@torch.no_grad()
def test_forward_tensors__rows_beyond_the_count_are_zeros() -> None:
    boxes, scores, labels, count = build(score_threshold=0.3).forward_tensors(*pad([(96, 130), (40, 50)]))
    assert (boxes.dtype, scores.dtype, labels.dtype, count.dtype) == (torch.float32,) * 2 + (torch.int64,) * 2
    assert boxes.shape == (2, 30, 4)
    assert 0 < count.min() < 30
    for image, number in enumerate(count):
        assert scores[image, :number].min() > 0.3
        assert scores[image, :number].diff().le(0).all()
        assert not any(x[image, number:].any() for x in (boxes, scores, labels))
    assert boxes[1].amax(0).tolist()[2] <= 50
    assert boxes[1].amax(0).tolist()[3] <= 40


@torch.no_grad()
def test_forward_tensors__without_sizes_no_image_is_padded() -> None:
    detector, images = build(), torch.randn(2, 3, 96, 128)
    for found, expected in zip(
        detector.forward_tensors(images), detector.forward_tensors(images, torch.tensor([[96, 128]] * 2)), strict=True
    ):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_forward__is_the_tensor_core_and_the_way_back() -> None:
    detector = build(min_size=96, max_size=160)
    images = [torch.rand(3, 48, 70), torch.rand(3, 60, 50)]
    batch, sizes, _ = detector.transform(images)
    found = detector.transform.restore(
        split_detections(detector.forward_tensors(batch, torch.tensor(sizes))), sizes, [(48, 70), (60, 50)]
    )
    for ours, expected in zip(detector(images), found, strict=True):
        assert all(torch.equal(ours[key], expected[key]) for key in ("boxes", "scores", "labels"))


@pytest.mark.filterwarnings("ignore::FutureWarning:torchvision")  # create_unbacked_symint, torchvision's own call
@pytest.mark.parametrize(
    ("kind", "convention", "head"),
    [
        pytest.param(FasterRCNN, "torchvision", "two_fc", marks=pytest.mark.slow),
        pytest.param(FasterRCNN, "mmdetection", "four_conv", marks=pytest.mark.slow),
        pytest.param(CascadeRCNN, "torchvision", "two_fc", marks=pytest.mark.slow),
        pytest.param(CascadeRCNN, "mmdetection", "four_conv", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_export__batch_height_and_width_are_free(
    kind: type[FasterRCNN], convention: str, head: str, tmp_path: Path
) -> None:
    # of the means of three stages' softmax over four classes, none is above 0.3
    threshold = 0.25 if kind is CascadeRCNN and convention == "torchvision" else 0.3
    core = Core(build(kind, convention=convention, box_head=head, score_threshold=threshold)).eval()
    batch = torch.export.Dim("batch", max=16)
    rows, columns = (32 * torch.export.Dim(name, min=3, max=60) for name in ("rows", "columns"))
    program = torch.export.export(
        core, pad([(96, 130), (120, 128)]), dynamic_shapes=({0: batch, 2: rows, 3: columns}, {0: batch})
    )
    onnx = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False)
    onnx.save(tmp_path / "detector.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    module, counts = program.module(), []
    for images, sizes in batches():
        expected = core(images, sizes)
        counts += expected[3].tolist()
        in_onnxruntime = session.run(None, dict(zip(names, (images.numpy(), sizes.numpy()), strict=True)))
        for found in (module(images, sizes), [torch.from_numpy(value) for value in in_onnxruntime]):
            check(found, expected)
    assert max(counts) > 5
    assert counts.count(0) == 2


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs, tolerance in zip(found, expected, (1e-2, 1e-4, 0, 0), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def test_select__soft_nms_cannot_be_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_module, "is_recording", lambda: True)
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="soft NMS cannot be exported; set the detector's nms to 'hard' or 'none'"):
        Selection(nms="soft").select(torch.ones(1, 4), torch.ones(1), one, one, 1, 1)
