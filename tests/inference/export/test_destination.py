"""What an export refuses before it begins, what it leaves alone, and what it says and knows of its file."""

import copy
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_convnext_det import DeformableDETRModule, TiledDetector
from lightning_convnext_det.checkpoints.file import write_checkpoint_file
from lightning_convnext_det.cli.export import _ImageFiles
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.errors import ArgumentError, ExportError
from lightning_convnext_det.inference.export.accuracy import as_detector
from lightning_convnext_det.inference.export.destination import replacing
from lightning_convnext_det.inference.export.export import ExportReport, export, verify_file
from lightning_convnext_det.inference.export.graph import ExportGraph
from lightning_convnext_det.inference.export.metadata import describe, read_card, write_card
from lightning_convnext_det.inference.export.runtimes import load_runner
from lightning_convnext_det.inference.export.torch_file import write_torch
from lightning_convnext_det.models.fused import FusedDetector
from lightning_convnext_det.types import TensorDetections


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("a.onnx", {"format": "pt2"}, "must end in .pt2 for format pt2"),
        ("a.onnx", {"format": "openvino"}, "must end in _openvino for format openvino"),
        ("a_openvino", {"precision": "int8"}, "int8 needs images to calibrate on"),
        (
            "a_openvino",
            {"precision": "int8", "calibration": [torch.zeros(3, 8, 8, dtype=torch.uint8)], "attention": "grid_sample"},
            "int8 with grid_sample loses 6 points of mAP",
        ),
        ("a.ckpt", {"format": "weights"}, "must end in .safetensors"),
        ("a.onnx", {"dynamic": ["heigth"]}, "dynamic: 'heigth' is none of batch, height, width"),
        ("a.onnx", {"dynamic": "batch,height"}, "dynamic: 'batch,height' is none of batch, height, width"),
        ("a.onnx", {"image_size": (64,)}, r"image_size is \(64,\); expected \(height, width\)"),
        ("a.onnx", {"class_names": "ab"}, "class_names is 'ab'; give a list of names"),
        ("a.onnx", {"category_ids": [1.5, 2]}, r"category_ids is \[1.5, 2\]; give a list of whole numbers"),
        ("a.onnx", {"class_names": ["a", "a"]}, "class_names has 'a' for labels 0 and 1"),
        ("a.onnx", {"images": [torch.zeros(3, 8, 8)]}, "images holds torch.float32"),
        ("a.onnx", {"include": ["normalize"]}, "include: 'normalize' is none of resize, normalise"),
    ],
)
def test_export__refuses(
    path: str, options: dict[str, object], message: str, module: DeformableDETRModule, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=message):
        export(module, tmp_path / path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "options", "operator", "told"),
    [
        ("a.onnx", {}, "gather", True),
        ("a.pt2", {}, "grid_sample", True),
        ("a_openvino", {}, "grid_sample", True),
        ("a_openvino", {"precision": "int8", "calibration": torch.zeros(1, 3, 8, 8).byte()}, "gather", True),
        ("a_openvino", {"attention": "gather"}, "gather", False),
    ],
)
def test_export__tells_what_it_chose_and_what_it_does_not_use(
    path: str, options: dict[str, object], operator: str, told: bool, module: DeformableDETRModule, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recorded: list[object] = []

    def record(*arguments: object) -> None:
        recorded.extend(arguments)
        raise ArgumentError("far enough")

    monkeypatch.setattr("lightning_convnext_det.inference.export.export.record", record)
    lines: list[str] = []
    sizes = {"batch_size": 2, "image_size": (64, 96)}
    with pytest.raises(ArgumentError, match="far enough"):
        export(module, tmp_path / path, progress=lines.append, **sizes, **options)
    assert recorded[-1] == operator
    assert any(line.startswith(f"attention={operator}: ") for line in lines) == told
    assert {line.split()[0] for line in lines if "is not used" in line} == {"batch_size", "image_size"}
    lines.clear()
    with pytest.raises(ArgumentError, match="far enough"):
        export(module, tmp_path / path, progress=lines.append, dynamic=(), **sizes, **options)
    assert not any("is not used" in line for line in lines)


@pytest.mark.parametrize("around", [lambda d: FusedDetector([d, d]), lambda d: TiledDetector(d, 64)])
def test_export__refuses_what_is_around_a_detector(
    around: Callable[[nn.Module], nn.Module], module: DeformableDETRModule, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=r"LCD-X002\] (Fused|Tiled)Detector cannot be exported"):
        export(around(module.detector), tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("path", "options", "missing", "message"),
    [
        ("a.onnx", {}, "onnxscript", r"onnxscript is not installed; pip install 'lightning-convnext-det\[export\]'"),
        ("a.onnx", {}, "onnxruntime", r"onnxruntime is not installed.*\[export\]"),
        ("a_openvino", {}, "openvino", r"openvino is not installed.*\[openvino\]"),
        ("a_openvino", {"precision": "int8", "calibration": [torch.zeros(3, 8, 8, dtype=torch.uint8)]}, "nncf",
         r"nncf is not installed.*\[openvino\]"),
    ],
)  # fmt: skip
def test_export__names_a_missing_package_before_it_begins(
    path: str, options: dict[str, object], missing: str, message: str, module: DeformableDETRModule, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("lightning_convnext_det.inference.export.export.record", lambda *_: pytest.fail("recorded"))
    with pytest.raises(ArgumentError, match=rf"LCD-X003\] {message}"):
        export(module, tmp_path / path, **options)


def test_export__weights_are_float32(module: DeformableDETRModule, tmp_path: Path) -> None:
    half = copy.deepcopy(module.detector).bfloat16()
    path = export(half, tmp_path / "w.safetensors").path
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    assert next(half.parameters()).dtype == torch.bfloat16
    verify_file(half, path)


@pytest.mark.heavy
def test_export__weights_of_a_compiled_module_and_numbers_of_numpy(
    module: DeformableDETRModule, tmp_path: Path
) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9.ckpt")  # in Latin-1
    source.write_bytes(b"")
    compiled = torch.compile(module.detector)
    export(compiled, tmp_path / "w.safetensors", category_ids=np.array([1, 90]), source=source)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert set(file.keys()) == set(module.detector.state_dict())
        assert (file.metadata()["detector"], file.metadata()["category_ids"]) == ("DeformableDETR", "[1, 90]")
        assert file.metadata()["source"] == r"caf\udce9.ckpt"
    assert json.loads((tmp_path / "w.json").read_text())["source"] == "caf\udce9.ckpt"


def test_export__leaves_what_is_there_alone(module: DeformableDETRModule, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").mkdir()
    (tmp_path / "a_openvino").write_text("mine")
    (tmp_path / "w.json").write_text("[]")
    for name, message in (("a.onnx", "is a folder"), ("a_openvino", "is a file"), ("w.safetensors", "something else")):
        with pytest.raises(ArgumentError, match=message):
            export(module, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a_openvino", "w.json"]


def testreplacing__keeps_the_other_files_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a_openvino"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    (folder / "model.xml").write_text("old")

    def write(error: Exception | None) -> None:
        with replacing(folder, "openvino") as written:
            written.mkdir()
            (written / "model.xml").write_text("new")
            if error is not None:
                raise error

    with pytest.raises(ExportError):
        write(ExportError("wrong"))
    assert (folder / "model.xml").read_text() == "old"
    write(None)
    assert (folder / "model.xml").read_text() == "new"
    assert (folder / "mine.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a_openvino"]


def test_verify_file__knows_what_the_file_takes(
    module: DeformableDETRModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_card({"include": ["normalise"], "images": [2, 3, 64, 96]}, tmp_path / "metadata.json")
    given = []

    def load(path: Path) -> Callable[[Tensor], TensorDetections]:
        graph = ExportGraph(module.detector, ["normalise"])

        def run(images: Tensor) -> TensorDetections:
            given.append((images.dtype, tuple(images.shape)))
            return TensorDetections(*graph(images))

        return run

    monkeypatch.setattr("lightning_convnext_det.inference.export.export.load_runner", load)
    differences = verify_file(module, tmp_path, [torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)]).differences
    assert differences is not None
    assert differences.boxes == 0
    assert given == [(torch.uint8, (2, 3, 64, 96))]


def test_as_detector__prepares_images_and_scales_boxes_back(module: DeformableDETRModule) -> None:
    graph, given = ExportGraph(module.detector, []), []

    def run(images: Tensor) -> TensorDetections:
        given.append(images)
        height, width = images.shape[-2:]
        box, one = torch.tensor([[[0.0, 0.0, width, height]]]), torch.ones(1, 1)
        return TensorDetections(box, one, one.long(), torch.tensor([1]))

    image = torch.full((3, 100, 50), 255, dtype=torch.uint8)
    white = [(1 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    for size, shape in (((None, None), (2, 3, 128, 64)), ((64, 96), (2, 3, 64, 96))):
        [found] = as_detector(run, partial(graph.leave_to_file, batch_size=2, size=size))([image])
        assert found["boxes"][0].tolist() == pytest.approx([0.0, 0.0, 50.0, 100.0])
        assert (given[-1].shape, given[-1].dtype) == (shape, torch.float32)
        assert given[-1][1, :, 5, 5].tolist() == pytest.approx(white)


def test_new_sizes__follow_the_smallest_side(module: DeformableDETRModule) -> None:
    graph, side = ExportGraph(module.detector), torch.tensor([10.0, 160.0], dtype=torch.float64)
    assert graph.new_sizes(side)[1].tolist() == [1, 10]  # of 16 pixels
    graph.transform.smallest_side = 64  # as of DINO with stride 64
    assert graph.new_sizes(side)[1].tolist() == [4, 10]


def test_write_card__holds_names_of_any_characters(tmp_path: Path) -> None:
    names = ['a, "b"', "two\nlines", "\u732b", "caf\udce9"]
    write_card({"class_names": names}, tmp_path / "metadata.json")
    assert read_card(tmp_path)["class_names"] == names
    assert "\u732b" in (tmp_path / "metadata.json").read_text(encoding="utf-8")


def test_read_card__of_a_compiled_package(tmp_path: Path) -> None:
    # as AOTInductor of torch 2.14 packs it: all values are text, and some entries are its own
    own = {"images": "[2, 3, 64, 96]", "class_names": '["\\u732b"]', "AOTI_DEVICE_KEY": "cpu"}
    with ZipFile(tmp_path / "a.pt2", "w") as file:
        file.writestr("a/archive_format", "pt2")
        file.writestr("a/data/aotinductor/model/c5g7.wrapper_metadata.json", json.dumps(own))
    assert read_card(tmp_path / "a.pt2") == {"images": [2, 3, 64, 96], "class_names": ["\u732b"]}


def test_describe__has_the_metrics_of_the_checkpoint(module: DeformableDETRModule, tmp_path: Path) -> None:
    best = ModelCheckpoint(monitor="val/map")
    best.current_score = torch.tensor(0.25)
    states = {"a": best.state_dict(), "b": {"monitor": "val/loss", "current_score": None}, "c": {"monitor": None}}
    write_checkpoint_file({"callbacks": states}, tmp_path / "a.ckpt")
    assert describe(module.detector, ["a", "b"], [1, 2], tmp_path / "a.ckpt")["metrics"] == {"val/map": 0.25}


def test_write_torch__keeps_no_paths_of_this_machine(tmp_path: Path) -> None:
    class Shift(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images + 1

    program = torch.export.export(Shift(), (torch.zeros(2, 3),))
    write_torch(program, tmp_path / "a.pt2", {})
    with ZipFile(tmp_path / "a.pt2") as file:
        assert not [name for name in file.namelist() if __file__.encode() in file.read(name)]
    assert torch.equal(torch.export.load(tmp_path / "a.pt2").module()(torch.zeros(2, 3)), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.safetensors", r"missing\.safetensors is missing"),
        ("folder", "folder must be a file .onnx or .pt2, or a folder with OpenVINO's model.xml"),
        ("damaged.pt2", r"LCD-X001\].*damaged\.pt2 cannot be loaded: File is not a zip file"),
    ],
)
def test_load_runner__says_what_is_wrong_in_one_line(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged.pt2").write_bytes(b"PK" + bytes(500))
    with pytest.raises((ArgumentError, ExportError), match=message):
        load_runner(tmp_path / name)
    assert capsys.readouterr().err == ""


def test_load_runner__names_the_cause_of_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "model.xml").write_text("<net")
    with pytest.raises(ExportError, match=r"cannot be loaded: (?!Exception from)."):
        load_runner(tmp_path)


def test_report__says_that_nothing_was_measured(tmp_path: Path) -> None:
    assert "its mAP was not measured" in str(ExportReport(tmp_path, "openvino", precision="int8"))
    assert "mAP" not in str(ExportReport(tmp_path, "openvino"))
    assert "mAP" not in str(ExportReport(tmp_path, "weights"))


def test_image_files__are_read_as_the_detector_reads_them(tmp_path: Path) -> None:
    for i in range(5):
        Image.fromarray(np.full((8, 8), 200 * i, np.uint16)).save(tmp_path / f"{i}.png")
    images = _ImageFiles(str(tmp_path), 2, SimpleNamespace(in_chans=1, grey_range=(0, 1000, True)))
    assert [(tuple(image.shape), int(image[0, 0, 0])) for image in images] == [((1, 8, 8), 0), ((1, 8, 8), 102)]
    # evenly spread, also where less than half of them are left out
    spread = _ImageFiles(str(tmp_path), 3, SimpleNamespace(in_chans=1, grey_range=(0, 1000, True)))
    assert [int(image[0, 0, 0]) for image in spread] == [0, 51, 153]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--verify_images", "0"], "verify_images is 0; it must be at least 1"),
        (["--triton", "."], "exists; choose another folder"),
        (["--calibration", "photos"], "calibration is for int8; give --precision int8 with it"),
    ],
)
def test_command__refuses_before_it_begins(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert main(["export", "missing.ckpt", "a.onnx", *options]) == 2
    assert message in capsys.readouterr().err
