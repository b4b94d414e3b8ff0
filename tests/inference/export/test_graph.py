import pytest
import torch
from timm.models import swin_transformer

from lightning_convnext_det import DINO, CascadeRCNN, DeformableDETR, FasterRCNN
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.inference.export.backbones import roll, window_reverse
from lightning_convnext_det.inference.export.graph import ExportGraph, record
from lightning_convnext_det.models.tensor_detections import split_detections
from lightning_convnext_det.ops.resize import resize_like_opencv
from lightning_convnext_det.types import TensorDetections
from tests.inference.export.conftest import spread_scores

RCNN = {"fpn_channels": 16, "box_head_features": 32, "score_threshold": 0.2}
DETR = {"num_queries": 10, "hidden_dim": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
DETECTORS = {
    "faster": (FasterRCNN, RCNN),
    "faster_opencv": (FasterRCNN, {**RCNN, "convention": "mmdetection"}),
    "cascade": (CascadeRCNN, RCNN),
    "detr": (DeformableDETR, DETR),
    "detr_two_stage": (DeformableDETR, {**DETR, "two_stage": True}),
    "detr_fixed_size": (DeformableDETR, {**DETR, "fixed_size": [96, 128]}),
    "dino": (DINO, DETR),
    "detr_nms": (DeformableDETR, {**DETR, "nms": "hard", "nms_threshold": 0.3}),
}


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("size", [(61, 87), (120, 40), (64, 64)])
def test_export_graph__finds_what_the_detector_finds(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    kind, options = DETECTORS[name]
    detector = kind(3, backbone="test_convnext", min_size=64, max_size=128, **options).eval()
    spread_scores(detector)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    with torch.no_grad():
        found = split_detections(TensorDetections(*ExportGraph(detector)(images)))
        expected = detector(list(images))
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs["scores"]) > 0
        torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=1e-3, rtol=0)
        assert torch.equal(ours["labels"], theirs["labels"])


@pytest.mark.parametrize("size", [(33, 50), (64, 64), (200, 77)])
def test_resize__opencv_as_in_the_transform(size: tuple[int, int]) -> None:
    detector = FasterRCNN(2, "test_convnext", min_size=64, max_size=128, convention="mmdetection", **RCNN)
    graph = ExportGraph(detector)
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    new, _ = graph.new_sizes(torch.tensor(size, dtype=torch.float64))
    expected = detector.transform.eval().new_size(*size)
    assert tuple(new.tolist()) == expected
    batch, _ = graph._prepare(images, torch.tensor(size, dtype=torch.float64), new)
    wanted = graph.normalise(resize_like_opencv(images[0], expected), 255.0)
    assert torch.equal(batch[0], wanted)


def test_new_sizes__round_as_the_transform() -> None:
    graph = ExportGraph(FasterRCNN(2, "test_convnext", **RCNN))  # 800, at most 1333
    for height in range(3, 3000, 37):
        for width in (8, 333, 799, 800, 801, 1333, 2048):
            new, tiles = graph.new_sizes(torch.tensor([height, width], dtype=torch.float64))
            assert tuple(new.tolist()) == graph.transform.new_size(height, width)
            assert tiles.tolist() == [-(-n // 32) for n in new.tolist()]


@pytest.mark.parametrize("kind", [DINO, DeformableDETR])
def test_export_graph__images_of_fewer_tokens_than_queries(
    kind: type[DeformableDETR], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    options = {
        **DETR,
        "num_queries": 100,
        "strides": (8, 16),
        "min_size": 64,
        "max_size": 64,
        "detections_per_image": 400,
    }
    if kind is DeformableDETR:
        options["two_stage"] = True
    detector = kind(2, backbone="test_convnext", score_threshold=0.0, **options).eval()
    spread_scores(detector)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = detector(list(images))
        monkeypatch.setattr("torch.compiler.is_exporting", lambda: True)
        found = split_detections(TensorDetections(*ExportGraph(detector)(images)))
    assert 100 < len(expected[0]["scores"]) < 2 * 100  # 2 classes of 80 or 84 tokens
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.heavy
def test_record__detr_with_nms_of_any_batch() -> None:
    torch.manual_seed(0)
    options = {**DETR, "strides": (16,), "extra_levels": 0, "min_size": 64, "max_size": 64}
    detector = DeformableDETR(2, "test_convnext", nms="hard", nms_threshold=0.01, score_threshold=0.0, **options).eval()
    spread_scores(detector)
    example = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    run = record(ExportGraph(detector), example, ["batch"]).module()
    for count in (1, 3):
        images = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8)
        with torch.no_grad():
            found, expected = split_detections(TensorDetections(*run(images))), detector(list(images))
        for ours, theirs in zip(found, expected, strict=True):
            assert 0 < len(theirs["scores"]) < 20  # of 10 queries and 2 classes
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_record__a_refusal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Refused(ExportGraph):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if images[images > 0].numel() == 0 else images + 1

    graph = Refused(FasterRCNN(2, "test_convnext", **RCNN))
    with pytest.raises(ArgumentError, match=r"\[LCD-X002\] the detector cannot be exported with batch free"):
        record(graph, torch.zeros(2, 3, 64, 64), ["batch"])
    assert capsys.readouterr().err == ""


def test_export_graph__soft_nms_is_refused() -> None:
    with pytest.raises(ArgumentError, match="nms='soft' cannot be exported"):
        ExportGraph(FasterRCNN(2, "test_convnext", nms="soft", **RCNN))


def test_export_graph__leaves_the_detector_as_it_is() -> None:
    detector = FasterRCNN(2, "test_convnext", frozen_stages=1, **RCNN).train()
    frozen = [p.requires_grad for p in detector.parameters()]
    ExportGraph(detector)
    assert detector.training
    assert [p.requires_grad for p in detector.parameters()] == frozen
    assert not all(frozen)


def test_roll_and_window_reverse__equal_torch_and_timm() -> None:
    x = torch.randn(2, 14, 21, 5)
    assert torch.equal(roll(x, (-3, 4), (1, 2)), torch.roll(x, (-3, 4), (1, 2)))
    windows = torch.randn(2 * 2 * 3, 7, 7, 5)
    expected = swin_transformer.window_reverse(windows, (7, 7), 14, 21)
    assert torch.equal(window_reverse(windows, (7, 7), 14, 21), expected)
    assert torch.equal(window_reverse(windows, (7, 7), (14, 21)), expected)
