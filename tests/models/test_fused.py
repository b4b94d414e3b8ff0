"""Ensembles and test-time augmentation, with a detector that is exact and with ensemble-boxes as the reference."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_convnext_det.models.fused import FusedDetector, augment_detector
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.views import View, ViewDetector, parse_views
from tests.models.color_detector import ColorDetector, draw, found_boxes

BOXES = [(5, 8, 30, 20), (40, 2, 61, 33), (33, 30, 39, 45)]


@pytest.fixture(scope="module")
def detectors() -> list[FasterRCNN]:
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(FasterRCNN(3, backbone="test_convnext", min_size=64, max_size=96, score_threshold=0.0).eval())
    return found


@pytest.mark.parametrize(
    ("text", "views"),
    [
        ("flip", [(1.0, False), (1.0, True)]),
        ("scales=0.5:2", [(0.5, False), (2.0, False)]),
        ("scales=1:1", [(1.0, False)]),
        ("flip, scales=0.8:1.0", [(0.8, False), (0.8, True), (1.0, False), (1.0, True)]),
    ],
)
def test_parse_views__reads_flips_and_scales(text: str, views: list[tuple[float, bool]]) -> None:
    assert parse_views(text) == views


@pytest.mark.parametrize("text", ["", "flop", "flip=2", "scales=", "scales=0", "scales=1:a", "scales=nan", "scales=-1"])
def test_parse_views__refuses_others(text: str) -> None:
    with pytest.raises(ValueError, match=f"tta is '{text}'.*give 'flip', 'scales=0.8:1.0:1.25' or both"):
        parse_views(text)


def test_view_detector__flips_boxes_back() -> None:
    image = draw(50, 64, BOXES)
    assert found_boxes(ViewDetector(ColorDetector(), View(flip=True))([image])[0]) == sorted(BOXES)


@pytest.mark.heavy
def test_view_detector__resizes_to_other_sizes_and_gives_them_back(detectors: list[FasterRCNN]) -> None:
    detector, sizes = detectors[0], []
    hook = detector.backbone.register_forward_pre_hook(lambda module, given: sizes.append(tuple(given[0].shape[-2:])))
    images = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        found = ViewDetector(detector, View(scale=1.5))(images)[0]
        detector(images)
    hook.remove()
    assert sizes == [(96, 96), (64, 64)]
    assert detector.transform.min_sizes == [64]
    assert detector.transform.max_size == 96
    assert found["boxes"].max() <= 64


def test_view_detector__refuses_to_scale_what_it_cannot() -> None:
    with pytest.raises(ValueError, match=r"ColorDetector has no ImageTransform.*use tta=flip"):
        ViewDetector(ColorDetector(), View(scale=2.0))


@pytest.mark.heavy
def test_fused_detector__equals_ensemble_boxes(detectors: list[FasterRCNN]) -> None:
    reference = pytest.importorskip("ensemble_boxes").weighted_boxes_fusion
    images = [torch.rand(3, 80, 80), torch.rand(3, 64, 80)]
    with torch.no_grad():
        fused = FusedDetector(detectors)(images)
        found = [detector(images) for detector in detectors]
    for i, detection in enumerate(fused):
        parts = [one[i] for one in found]
        boxes, scores, _ = reference(
            *([part[key].double().numpy() / scale for part in parts] for key, scale in (("boxes", 80), ("scores", 1))),
            [part["labels"].numpy() for part in parts],
        )
        assert len(boxes) > 20
        assert np.abs(np.sort(detection["scores"].numpy()) - np.sort(scores)).max() < 1e-6
        assert np.abs(np.sort(detection["boxes"].numpy(), axis=0) / 80 - np.sort(boxes, axis=0)).max() < 1e-6
        assert (detection["scores"].diff() <= 0).all()


def test_fused_detector__of_equal_detectors_finds_the_same() -> None:
    image = draw(50, 64, BOXES)
    detector = ColorDetector()
    one, fused = detector([image])[0], FusedDetector([detector, detector, detector])([image])[0]
    assert found_boxes(fused) == found_boxes(one)
    assert torch.allclose(fused["scores"], one["scores"])


@pytest.mark.heavy
def test_fused_detector__of_one_is_that_one(detectors: list[FasterRCNN]) -> None:
    images = [torch.rand(3, 80, 80)]
    with torch.no_grad():
        one, fused = detectors[0](images)[0], FusedDetector(detectors[:1])(images)[0]
    assert all(torch.equal(one[key], fused[key]) for key in ("boxes", "labels", "scores"))


def test_fused_detector__refuses_detectors_of_other_classes() -> None:
    three, two = nn.Module(), nn.Module()
    three.num_classes, two.num_classes = 3, 2
    with pytest.raises(ValueError, match="fuse detectors of the same classes"):
        FusedDetector([three, two])
    with pytest.raises(ValueError, match="detectors is empty"):
        FusedDetector([])


def test_augment_detector__views_of_all_detectors_in_each_window() -> None:
    first, second = ColorDetector(), ColorDetector()
    image = draw(60, 90, [(70, 5, 80, 15), (30, 5, 65, 15)])
    detector = augment_detector(FusedDetector([first, second]), tiles=50, tta="flip", batch_size=3)
    assert found_boxes(detector([image])[0]) == [(30, 5, 65, 15), (70, 5, 80, 15)]
    assert first.seen == second.seen
    assert len(first.seen) == 2 * (2 * 2 + 1)  # two views of four windows and of the whole image
    assert augment_detector(first) is first
