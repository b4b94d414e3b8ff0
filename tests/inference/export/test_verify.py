from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from lightning_convnext_det import FasterRCNN, export
from lightning_convnext_det.errors import ArgumentError, ExportError
from lightning_convnext_det.inference.export.export import verify_file
from lightning_convnext_det.inference.export.graph import ExportGraph
from lightning_convnext_det.inference.export.runtimes import Runner
from lightning_convnext_det.inference.export.verify import (
    Differences,
    Tolerance,
    _measure_rounding,
    compare,
    create_batches,
    verify,
)
from lightning_convnext_det.types import Detection, TensorDetections


def detection(*rows: tuple[float, int, float]) -> Detection:
    """Boxes 10 pixels wide at (x, 0), given as (x, label, score)."""
    boxes = torch.tensor([[x, 0.0, x + 10, 10.0] for x, _, _ in rows]).reshape(-1, 4)
    return Detection(
        boxes=boxes,
        labels=torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
        scores=torch.tensor([score for _, _, score in rows]),
    )


@pytest.mark.parametrize(
    ("found", "boxes", "scores", "unmatched"),
    [
        pytest.param([(0, 1, 0.9), (50, 0, 0.5)], 0, 0, 0, id="equal"),
        pytest.param([(0.004, 1, 0.9), (50, 0, 0.50005)], 0.004, 5e-5, 0, id="within"),
        pytest.param([(0.2, 1, 0.9), (50, 0, 0.5)], 0.2, 0, 0, id="moved"),
        pytest.param([(0, 1, 0.9)], 0, 0, 1, id="one missing"),
        pytest.param([(0, 1, 0.9), (50, 0, 0.5), (70, 0, 0.4)], 0, 0, 1, id="one more"),
        pytest.param([(0, 0, 0.9), (50, 0, 0.5)], 0, 0, 2, id="another label"),
        pytest.param([(0, 1, 0.9), (50, 0, 0.5), (70, 0, 0.30005)], 0, 0, 0, id="one more at the threshold"),
    ],
)
def test_compare__counts(found: list[tuple[float, int, float]], boxes: float, scores: float, unmatched: int) -> None:
    differences = Differences(shapes=["1x8x8"])
    expected = detection((0, 1, 0.9), (50, 0, 0.5))
    compare(detection(*found), expected, Tolerance(), differences, threshold=0.3)
    assert differences.boxes == pytest.approx(boxes, abs=1e-6)
    assert differences.scores == pytest.approx(scores, abs=1e-6)
    assert len(differences.unmatched) == unmatched
    assert differences.exceed(Tolerance()) == (boxes > 0.01 or unmatched > 0)


def test_compare__ties_may_be_in_any_order() -> None:
    differences = Differences()
    ours, theirs = detection((0, 1, 0.5), (50, 1, 0.5)), detection((50, 1, 0.5), (0, 1, 0.5))
    compare(ours, theirs, Tolerance(), differences)
    assert differences == Differences(detections=2)


def test_compare__nothing_found_at_all() -> None:
    differences = Differences()
    compare(detection(), detection(), Tolerance(), differences)
    assert differences == Differences()


def test_verify__images_that_float32_resizes_otherwise_have_their_own_limits() -> None:
    torch.manual_seed(0)
    detector = FasterRCNN(2, backbone="test_convnext", min_size=64, max_size=160, score_threshold=0.0).eval()

    def run(images: torch.Tensor) -> TensorDetections:  # scores that are off by 0.001
        with torch.no_grad():
            [found] = detector(list(images))
        boxes, scores, labels = (found[name][None] for name in ("boxes", "scores", "labels"))
        return TensorDetections(boxes, scores + 1e-3, labels, torch.tensor([labels.shape[1]]))

    # 64 / 61 * 61 in float32 is 63.999996; 64 / 64 * 64 is 64
    assert int(np.float32(64) / np.float32(61) * np.float32(61)) == 63
    batches = [torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8) for size in ((61, 87), (64, 80))]
    with pytest.raises(ExportError, match=r"in 1 batches .1x64x80.*allowed are 0.01 px and 0.0001"):
        verify(run, detector, batches, resized_otherwise=Tolerance(scores=0.1))
    differences = verify(run, detector, batches[:1], resized_otherwise=Tolerance(scores=0.1))
    assert (differences.shapes, differences.detections) == ([], 0)
    assert differences.resized_otherwise is not None
    assert differences.resized_otherwise.shapes == ["1x61x87"]
    assert differences.resized_otherwise.scores == pytest.approx(1e-3, abs=1e-6)
    assert "resized otherwise" in str(differences)
    with pytest.raises(ExportError, match=r"in 1 batches .1x61x87.*one pixel off; include=normalise leaves that"):
        verify(run, detector, batches[:1], resized_otherwise=Tolerance())
    with pytest.raises(ExportError, match=r"in 1 batches .1x61x87"):
        verify(run, detector, batches[:1])  # for runtimes that compute in float64


class RoundedRCNN(FasterRCNN):
    """A detector whose boxes are elsewhere in float64, as weights do whose rounding decides."""

    shift = 0.5

    def forward_tensors(self, images: torch.Tensor, sizes: torch.Tensor | None = None) -> TensorDetections:
        found = super().forward_tensors(images, sizes)
        is_exact = self.rpn.head.cls_logits.weight.dtype == torch.float64
        return found._replace(boxes=found.boxes + self.shift * is_exact * (found.scores > 0)[..., None])


def test_verify__allows_for_what_rounding_alone_does() -> None:
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 160, "fpn_channels": 8, "box_head_features": 8, "score_threshold": 0.0}
    detector = RoundedRCNN(2, backbone="test_convnext", **options).eval()
    graph = ExportGraph(detector)

    def shifted(pixels: float) -> Runner:  # of the resized image, which is 1.5 times as small
        def run(images: torch.Tensor) -> TensorDetections:
            with torch.no_grad():
                found = TensorDetections(*graph(images))
            return found._replace(boxes=found.boxes + pixels * (found.scores > 0)[..., None])

        return run

    batches = [torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)]
    found = verify(shifted(0.5), detector, batches)
    assert found.rounding is not None
    assert found.rounding.boxes == pytest.approx(0.75, abs=0.01)
    assert "PyTorch that rounds otherwise differs from itself as well, by 0.75 px" in str(found)
    assert verify(shifted(0.0), detector, batches).rounding is None  # nothing to allow for
    with pytest.raises(ExportError, match=r"allowed are 0\.01 px and 0\.0001$"):  # more than twice as far
        verify(shifted(1.6), detector, batches)
    told = verify(shifted(1.6), detector, batches, refuse=False)
    assert told.exceed(Tolerance())
    assert told.rounding is None
    detector.shift = 0.0  # rounding does nothing
    with pytest.raises(ExportError, match=r"allowed are 0\.01 px and 0\.0001$"):
        verify(shifted(0.5), detector, batches)


def test_verify__keeps_no_gigabytes_of_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"min_size": 64, "max_size": 160, "fpn_channels": 8, "box_head_features": 8, "score_threshold": 0.0}
    detector = FasterRCNN(2, backbone="test_convnext", **options).eval()
    kept = []

    def measure(_: object, batches: list[torch.Tensor], limit: Tolerance) -> Differences:
        kept.extend(batches)
        return Differences()

    def run(images: torch.Tensor) -> TensorDetections:  # finds nothing
        none = torch.zeros(1, 1)
        return TensorDetections(torch.zeros(1, 1, 4), none, none.long(), torch.tensor([0]))

    monkeypatch.setattr("lightning_convnext_det.inference.export.verify._measure_rounding", measure)
    monkeypatch.setattr("lightning_convnext_det.inference.export.verify._KEPT_BYTES", 2 * 3 * 64 * 64)
    batches = [torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8) for _ in range(3)]
    with pytest.raises(ExportError, match="in 3 batches"):
        verify(run, detector, batches, ["resize"])  # which takes float32
    assert [batch.dtype for batch in kept] == [torch.uint8] * 2


def test_measure_rounding__of_fp16_rounds_the_weights() -> None:
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 160, "fpn_channels": 8, "box_head_features": 8, "score_threshold": 0.0}
    graph = ExportGraph(RoundedRCNN(2, backbone="test_convnext", **options).eval())
    batches = [torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)]
    of_fp16 = _measure_rounding(graph, batches, Tolerance(boxes=2.0, unmatched=0.02))
    of_fp32 = _measure_rounding(graph, batches, Tolerance())
    assert 1e-6 < of_fp16.scores < 1e-2
    assert of_fp32.scores < 1e-6


@pytest.mark.slow  # half a minute of export; the rule is tested above
def test_export__of_a_detector_that_was_not_trained(tmp_path: Path) -> None:
    """Its scores are nearly equal, so that rounding decides which boxes NMS keeps."""
    torch.manual_seed(2)
    small = {"fpn_channels": 16, "box_head_features": 16, "rpn_post_nms_top_n": (100, 100)}
    detector = FasterRCNN(3, backbone="test_convnext", min_size=160, max_size=256, **small)
    report = export(detector, tmp_path / "fresh.onnx")
    assert report.differences is not None
    assert report.differences.boxes <= 0.01
    assert report.differences.scores <= 1e-4
    assert report.differences.unmatched
    assert "hardly been trained" in str(report)
    model = onnx.load(tmp_path / "fresh.onnx")
    [bias] = [x for x in model.graph.initializer if x.name.endswith("box_predictor.cls_score.bias")]
    bias.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32([0, 0, 0, 0.01]), bias.name)
    )
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(ExportError, match="finds other objects"):
        verify_file(detector, tmp_path / "changed.onnx")


def test_verify__notices_rows_in_another_order() -> None:
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 160, "fpn_channels": 8, "box_head_features": 8, "score_threshold": 0.0}
    detector = FasterRCNN(2, backbone="test_convnext", **options).eval()
    with torch.no_grad():
        detector.roi_heads.box_predictor.cls_score.weight.mul_(10)
    detector.detections_per_image = 20
    graph = ExportGraph(detector)

    def run(images: torch.Tensor) -> TensorDetections:
        with torch.no_grad():
            boxes, scores, labels, count = graph(images)
        return TensorDetections(boxes.flip(1), scores.flip(1), labels.flip(1), count)

    with pytest.raises(ExportError, match="gives rows that are not by descending score, in a batch 1x64x64"):
        verify(run, detector, [torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)])


def test_verify__says_if_nothing_was_compared() -> None:
    detector = FasterRCNN(2, backbone="test_convnext", min_size=64, max_size=160, score_threshold=1.0).eval()
    graph = ExportGraph(detector)
    found = verify(lambda x: TensorDetections(*graph(x)), detector, [torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])
    assert "0 detections in 1 batches" in str(found)
    assert "compare on images with objects (--verify IMAGES)" in str(found)


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (torch.zeros(3, 8, 8), r"torch\.float32 \[3, 8, 8\]"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), r"torch\.uint8 \[1, 8, 8\]"),
        (np.zeros((8, 8, 3), np.uint8), "ndarray"),
    ],
)
def test_create_batches__refuses_other_images(image: object, what: str) -> None:
    with pytest.raises(ArgumentError, match=rf"images holds {what}; give uint8 tensors \[3, height, width\]"):
        list(create_batches([image]))  # type: ignore[list-item]  # on purpose


def test_create_batches__sizes_batches_and_fixed_sizes() -> None:
    shapes = [tuple(x.shape) for x in create_batches([])]
    assert shapes[:4] == [(1, 3, 240, 320), (2, 3, 240, 320), (5, 3, 240, 320), (1, 3, 187, 251)]
    assert (1, 3, 360, 120) in shapes
    images = [torch.zeros(3, 30, 40, dtype=torch.uint8)]
    assert [tuple(x.shape) for x in create_batches(images, (2,), (32, None))] == [(2, 3, 32, 40)]
