import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_convnext_det import DeformableDETRModule, DetectionModule, DINOModule
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.errors import ArgumentError, ExportError
from lightning_convnext_det.inference.export import onnx_file
from lightning_convnext_det.inference.export.export import ExportReport, export, verify_file
from lightning_convnext_det.inference.export.openvino_folder import find_exact_layers, write_openvino
from lightning_convnext_det.inference.export.runtimes import load_runner
from lightning_convnext_det.inference.export.triton import write_triton
from tests.inference.export.conftest import spread_scores


def damage(path: Path, to: Path) -> Path:
    """A copy of an ONNX file with one weight of the last box head changed by a hundredth."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("box_heads.0.6.bias"))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0] += 0.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, to)
    return to


@pytest.mark.heavy
def test_export__onnx_of_any_batch_and_size_finds_what_the_detector_finds(
    exported: ExportReport, module: DeformableDETRModule
) -> None:
    check_onnx(exported, module)


WITHOUT_PACKAGE = """
import sys
import torch

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lightning_convnext_det", "lightning", "timm", "torchvision"):
            raise ImportError(name)

sys.meta_path.insert(0, Hidden())
if sys.argv[4] == "compiled":
    run = torch._inductor.aoti_load_package(sys.argv[1])
else:
    run = torch.export.load(sys.argv[1]).module()
torch.save(tuple(run(torch.load(sys.argv[2]))), sys.argv[3])
"""


@pytest.mark.heavy
def test_export__pt2_runs_without_this_package(module: DeformableDETRModule, tmp_path: Path) -> None:
    check_torch_file(export(module, tmp_path / "a.pt2").path, module, "pt2")


@pytest.mark.slow  # minutes of the C++ compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_export__compiled_runs_without_this_package(module: DeformableDETRModule, tmp_path: Path) -> None:
    # of one shape: with free axes AOTInductor of torch 2.14 computes other boxes, which the comparison notices
    shape = {"dynamic": (), "batch_size": 2, "image_size": (61, 87)}
    report = export(module, tmp_path / "a.pt2", format="compiled", **shape)
    assert report.differences is not None  # within the tolerance
    assert report.differences.detections > 100
    check_torch_file(report.path, module, "compiled")
    assert verify_file(module, report.path).differences.shapes[0] == "2x61x87"


def check_torch_file(path: Path, module: DetectionModule, kind: str) -> None:
    """Compare with the module what a file finds in a process that cannot import this package."""
    folder, images = path.parent, torch.randint(0, 256, (2, 3, 61, 87), dtype=torch.uint8)
    torch.save(images, folder / "images")
    files = [str(path), str(folder / "images"), str(folder / "found")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_PACKAGE, *files, kind], check=True)
    boxes, scores, labels, counts = torch.load(folder / "found")
    with torch.no_grad():
        expected = module(list(images))
    for i, detection in enumerate(expected):
        assert counts[i] == len(detection["boxes"]) > 0
        torch.testing.assert_close(boxes[i, : counts[i]], detection["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(scores[i, : counts[i]], detection["scores"], rtol=0, atol=1e-5)
        assert torch.equal(labels[i, : counts[i]], detection["labels"])


@pytest.mark.slow  # a minute
def test_export__onnx_of_dino(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = DINOModule(
        2, ["cat", "dog"], backbone="test_convnext", strides=(8, 16), num_queries=10, hidden_dim=32, num_heads=2,
        encoder_layers=1, decoder_layers=2, feedforward_dim=32, min_size=64, max_size=160, detections_per_image=15,
    )  # fmt: skip
    spread_scores(module.detector)
    check_onnx(export(module.eval(), tmp_path / "dino.onnx", attention="grid_sample"), module)


def check_onnx(exported: ExportReport, module: DetectionModule) -> None:
    session = onnxruntime.InferenceSession(exported.path)
    assert [axis for value in session.get_inputs() for axis in value.shape] == ["batch", 3, "height", "width"]
    for count, height, width in ((1, 61, 87), (3, 150, 50), (2, 64, 96)):
        images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
        boxes, scores, labels, counts = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = module(list(images))
        for i, detection in enumerate(expected):
            n = int(counts[i])
            assert n == len(detection["scores"]) == 15
            np.testing.assert_allclose(scores[i, :n], detection["scores"], atol=1e-5)
            np.testing.assert_allclose(boxes[i, :n], detection["boxes"], atol=1e-2)
            np.testing.assert_array_equal(labels[i, :n], detection["labels"])


@pytest.mark.heavy
def test_export__metadata_and_report(exported: ExportReport, checkpoint: Path) -> None:
    differences = exported.differences
    assert differences is not None
    assert differences.shapes[:4] == ["1x240x320", "2x240x320", "5x240x320", "1x187x251"]
    assert differences.detections == sum(int(s.split("x")[0]) for s in differences.shapes) * 15
    assert "boxes differ by at most" in str(exported)
    entries = onnxruntime.InferenceSession(exported.path).get_modelmeta().custom_metadata_map
    assert json.loads(entries["class_names"]) == ["cat", "dog"]
    assert json.loads(entries["category_ids"]) == [7, 9]
    assert json.loads(entries["resize"])["min_size"] == 64
    assert entries["source"] == "a.ckpt"
    assert len(entries["source_sha256"]) == 64
    assert (
        json.loads(entries["versions"])["torch"] == torch.__version__.partition("+")[0]
        or "torch" in entries["versions"]
    )


@pytest.mark.heavy
def test_verify__one_weight_changed_is_noticed(
    exported: ExportReport, module: DeformableDETRModule, checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert "without a counterpart" in str(verify_file(module, exported.path))
    wrong = damage(exported.path, tmp_path / "wrong.onnx")
    with pytest.raises(ExportError, match=r"LCD-X001\].*wrong.onnx finds other objects than the detector"):
        verify_file(module, wrong)
    assert main(["export", str(checkpoint), str(wrong), "--verify_only"]) == 7
    assert "finds other objects than the detector" in capsys.readouterr().err
    assert wrong.exists()
    wrong.write_bytes(wrong.read_bytes()[:5000])
    with pytest.raises(ExportError, match="cannot be loaded"):
        verify_file(module, wrong)


@pytest.mark.heavy
def test_verify__openvinos_fp32_is_held_to_fp32(
    exported: ExportReport, module: DeformableDETRModule, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    right, wrong = tmp_path / "right_openvino", tmp_path / "wrong_openvino"
    write_openvino(exported.path, right, {"precision": "fp32"})
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((150, 50), (240, 320), (375, 500))]
    differences = verify_file(module, right, images).differences
    assert differences is not None
    assert differences.boxes < 1e-2
    assert differences.scores < 1e-4
    assert not differences.unmatched
    assert differences.detections == 15 * 3
    assert differences.resized_otherwise is None
    write_openvino(damage(exported.path, tmp_path / "wrong.onnx"), wrong, {"precision": "fp32"})
    with pytest.raises(ExportError, match=r"LCD-X001\].*wrong_openvino finds other objects than the detector"):
        verify_file(module, wrong, images)
    (wrong / "metadata.json").write_text('{"precision": "fp16"}')  # half a pixel is within what float16 may differ by
    assert "without a counterpart" in str(verify_file(module, wrong, images))


@pytest.mark.heavy
def test_find_exact_layers__are_those_of_the_heads(exported: ExportReport) -> None:
    openvino = pytest.importorskip("openvino")
    exact = find_exact_layers(exported.path, openvino.convert_model(exported.path))
    # a class head of one layer, a box head of three, reference points, offsets of one encoder and one decoder layer
    assert len(exact) == len(set(exact)) == 1 + 3 + 1 + 2


@pytest.mark.heavy
def test_export__a_wrong_file_is_removed(
    exported: ExportReport, module: DeformableDETRModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = onnx.load(damage(exported.path, tmp_path / "wrong.onnx"))
    monkeypatch.setattr(onnx_file, "_translate", lambda program: wrong)
    monkeypatch.setattr("lightning_convnext_det.inference.export.export.record", lambda *arguments: None)
    with pytest.raises(ExportError, match="finds other objects"):
        export(module, tmp_path / "new.onnx")
    assert not (tmp_path / "new.onnx").exists()
    (tmp_path / "earlier.onnx").write_bytes(b"earlier")
    with pytest.raises(ExportError, match=r"earlier\.onnx finds other objects"):
        export(module, tmp_path / "earlier.onnx")
    assert (tmp_path / "earlier.onnx").read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier.onnx", "wrong.onnx"]
    with pytest.raises(ExportError, match=r"LCD-X001\].*cannot compute images float32 \[1, 3, 64, 64\]"):
        load_runner(exported.path)(torch.zeros(1, 3, 64, 64))


@pytest.mark.heavy
def test_halve__computes_products_in_float16_and_stays_close(
    exported: ExportReport, module: DeformableDETRModule, tmp_path: Path
) -> None:
    model = onnx.load(exported.path)
    modules = onnx_file.name_modules(model.graph)
    assert onnx_file.halve(onnx, model) > 20
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").stat().st_size < exported.path.stat().st_size
    halves = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax", "Sigmoid"):
            assert not halves & set(node.input)
    products = [node for node in model.graph.node if halves & set(node.input)]
    names = [modules[node.output[0].removesuffix("_fp16")] for node in products]
    assert sum("value_projection" in name for name in names) == 2
    exact = ("box_heads", "class_heads", "sampling_offsets", "reference_points")
    assert not [name for name in names if any(part in name for part in exact)]
    assert sum(any(part in name for part in exact) for name in modules.values()) > 7
    images = torch.randint(0, 256, (1, 3, 61, 87), dtype=torch.uint8).numpy()
    whole, half = (
        onnxruntime.InferenceSession(path).run(None, {"images": images})
        for path in (exported.path, tmp_path / "half.onnx")
    )
    assert 0 < np.abs(whole[1] - half[1]).max() < 0.01


@pytest.mark.heavy
def test_triton__repository(exported: ExportReport, tmp_path: Path) -> None:
    folder = write_triton(exported.path, tmp_path / "models")
    assert (folder / "1" / "model.onnx").read_bytes() == exported.path.read_bytes()
    config = (folder / "config.pbtxt").read_text()
    assert 'name: "detr"' in config
    assert '{ name: "images", data_type: TYPE_UINT8, dims: [ -1, 3, -1, -1 ] }' in config
    assert '{ name: "boxes", data_type: TYPE_FP32, dims: [ -1, 15, 4 ] }' in config
    assert '{ name: "count", data_type: TYPE_INT64, dims: [ -1 ] }' in config
    with pytest.raises(ArgumentError, match="exists"):
        write_triton(exported.path, tmp_path / "models")


def test_export__weights_and_card(checkpoint: Path, module: DeformableDETRModule, tmp_path: Path) -> None:
    assert main(["export", str(checkpoint), str(tmp_path / "w.safetensors")]) == 0
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert set(file.keys()) == set(module.detector.state_dict())
        assert json.loads(file.metadata()["class_names"]) == ["cat", "dog"]
    card = json.loads((tmp_path / "w.json").read_text())
    assert card["detector"] == "DeformableDETR"
    assert card["normalise"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert card["backbone"] == "test_convnext"
    assert len(card["source_sha256"]) == 64
    assert card["metrics"] == {}  # nothing was validated


def test_verify__weights_are_compared_bit_for_bit(
    checkpoint: Path, module: DeformableDETRModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = export(module, tmp_path / "w.safetensors").path
    assert main(["export", str(checkpoint), str(path), "--verify_only"]) == 0
    assert capsys.readouterr().out == "the weights are those of the checkpoint\n"
    tensors = load_file(path)
    tensors["levels.embedding"][0, 0] += 1e-6
    save_file(tensors, path)
    assert main(["export", str(checkpoint), str(path), "--verify_only"]) == 7
    assert "holds other weights than the detector, e.g. levels.embedding" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ExportError, match=r"w\.safetensors cannot be loaded"):
        verify_file(module, path)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("a.bin", {}, "must end in .onnx, .pt2, .safetensors or _openvino"),
        ("a.onnx", {"precision": "int8"}, "onnx has fp32, fp16, not int8"),
        ("a.pt2", {"precision": "fp16"}, "pt2 has fp32, not fp16"),
        ("b/a.onnx", {}, "there is no such folder"),
        ("a.onnx", {"attention": "other"}, "attention"),
        ("a.onnx", {"class_names": ["cat"]}, "class_names has 1 entries, but the detector has 2 classes"),
    ],
)
def test_export__refuses(
    module: DeformableDETRModule, tmp_path: Path, path: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        export(module, tmp_path / path, **options)
    assert not list(tmp_path.iterdir())


def test_command__misspelt_axis(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(checkpoint), str(tmp_path / "a.onnx"), "--dynamic", "batch,heigth"]) == 2
    assert "dynamic: 'heigth' is none of batch, height, width" in capsys.readouterr().err
