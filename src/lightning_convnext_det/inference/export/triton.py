"""A model repository of NVIDIA's Triton Inference Server around an exported ONNX file."""

import json
import shutil
from pathlib import Path
from typing import Any

from lightning_convnext_det.errors import ArgumentError

_TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8", 7: "TYPE_INT64"}  # of onnx.TensorProto


def write_triton(onnx_file: Path, repository: Path, name: str | None = None) -> Path:
    """Write ``NAME/config.pbtxt`` and ``NAME/1/model.onnx`` into a model repository; return the model's folder.

    KServe's Triton runtime reads the same layout.

    Args:
        onnx_file: an exported file.
        repository: folder of models, made if it is missing.
        name: of the model (default: the file's).

    Raises:
        ArgumentError: if it is no ONNX file, or the model is in the repository already.

    Reference:
        Triton's model repository and model configuration (triton-inference-server/server, docs/user_guide).
    """
    import onnx

    folder = triton_folder(onnx_file, repository, name)
    graph = onnx.load(onnx_file).graph
    try:
        (folder / "1").mkdir(parents=True)
    except OSError as error:
        raise ArgumentError(f"{folder} cannot be made ({error}); choose another folder") from error
    shutil.copyfile(onnx_file, folder / "1" / "model.onnx")
    lines = [
        f"name: {json.dumps(folder.name, ensure_ascii=False)}",
        'backend: "onnxruntime"',
        "max_batch_size: 0  # the batch is the first of dims",
    ]
    for kind, values in (("input", graph.input), ("output", graph.output)):
        lines += [f"{kind} [", ",\n".join(_describe(value) for value in values), "]"]
    lines.append("instance_group [{ count: 1 }]")
    (folder / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def triton_folder(onnx_file: Path, repository: Path, name: str | None = None) -> Path:
    """The folder of a model in a repository, which is not there yet.

    Raises:
        ArgumentError: as `write_triton`.
    """
    if onnx_file.suffix != ".onnx":
        raise ArgumentError(f"triton takes an ONNX file, not {onnx_file}")
    folder = repository / (name or onnx_file.stem)
    if folder.exists():
        raise ArgumentError(f"{folder} exists; choose another folder or remove it")
    return folder


def _describe(value: Any) -> str:  # an onnx.ValueInfoProto
    tensor = value.type.tensor_type
    dims = ", ".join(str(axis.dim_value) if axis.HasField("dim_value") else "-1" for axis in tensor.shape.dim)
    return f'  {{ name: "{value.name}", data_type: {_TYPES[tensor.elem_type]}, dims: [ {dims} ] }}'
