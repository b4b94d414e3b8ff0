"""Exported files as functions from images to detections, by the runtime that users of the file have."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_convnext_det.errors import ArgumentError, ExportError, first_line
from lightning_convnext_det.inference.export.optional import import_optional
from lightning_convnext_det.types import TensorDetections

Runner = Callable[[Tensor], TensorDetections]
"""From images [B, C, H, W] of the type that the file takes to their detections."""


def load_runner(path: str | Path) -> Runner:
    """Load an exported file by its runtime: onnxruntime, PyTorch or OpenVINO.

    Raises:
        ArgumentError: if the runtime is not installed, or the path is none of an exported file.
        ExportError: if the runtime cannot load the file.
    """
    path = Path(path)
    if not path.exists():
        raise ArgumentError(f"{path} is missing")
    kinds: dict[str, Callable[[Path], Runner]] = {".onnx": _load_onnx, ".pt2": _load_torch, ".xml": _load_openvino}
    is_openvino = path.is_dir() and (path / "model.xml").is_file()
    load = _load_openvino if is_openvino else kinds.get(path.suffix)
    if load is None:
        raise ArgumentError(f"{path} must be a file .onnx or .pt2, or a folder with OpenVINO's model.xml")
    try:
        run = load(path)
    except ArgumentError:
        raise
    except Exception as error:  # each runtime has its own kinds
        raise ExportError(f"[LCD-X001] {path} cannot be loaded: {_cause(error)}") from error

    def compute(images: Tensor) -> TensorDetections:
        try:
            return run(images)
        except Exception as error:
            what = f"{images.dtype} {list(images.shape)}".removeprefix("torch.")
            raise ExportError(f"[LCD-X001] {path} cannot compute images {what}: {_cause(error)}") from error

    return compute


def _cause(error: Exception) -> str:
    """The message of an error on one line, without the places in OpenVINO's sources that come before it."""
    lines = [line for line in str(error).splitlines() if not line.startswith("Exception from ")]
    return first_line(RuntimeError("\n".join(lines))) if any(lines) else first_line(error)


def threads() -> int:
    """How many threads a runtime may use: those of PyTorch."""
    return torch.get_num_threads()


def _load_onnx(path: Path) -> Runner:
    runtime = import_optional("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> TensorDetections:
        return TensorDetections(*(torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})))

    return run


def _load_torch(path: Path) -> Runner:
    with zipfile.ZipFile(path) as file:
        is_compiled = any("/data/aotinductor/" in name for name in file.namelist())
    program = torch._inductor.aoti_load_package(os.fspath(path)) if is_compiled else torch.export.load(path).module()

    def run(images: Tensor) -> TensorDetections:
        with torch.no_grad():
            return TensorDetections(*program(images))

    return run


def _load_openvino(path: Path) -> Runner:
    openvino = import_optional("openvino", "openvino")
    model = openvino.Core().read_model(path / "model.xml" if path.is_dir() else path)
    # the plugin would compute in bfloat16 where a processor has it
    compiled = openvino.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads()}
    )

    def run(images: Tensor) -> TensorDetections:
        outputs = compiled(images.numpy())
        return TensorDetections(*(torch.from_numpy(outputs[name].copy()) for name in TensorDetections._fields))

    return run
