"""Detectors for OpenVINO: a folder with ``model.xml`` and ``model.bin``, in float32, float16 or int8 weights."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_convnext_det.inference.export.metadata import write_card
from lightning_convnext_det.inference.export.onnx_file import name_modules
from lightning_convnext_det.inference.export.optional import import_optional

# layers that decide positions and scores; they take little time
_EXACT = (
    "box_heads", "class_heads", "cls_logits", "bbox_pred", "cls_score", "sampling_offsets", "reference_points",
)  # fmt: skip


def write_openvino(
    onnx_file: Path,
    folder: Path,
    metadata: Mapping[str, Any],
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    calibration: Sequence[Tensor] = (),
    is_transformer: bool = False,
) -> None:
    """Convert an ONNX file.

    Args:
        onnx_file: from `write_onnx`, in float32.
        folder: to write; ``metadata.json`` is the third file in it.
        metadata: the description.
        precision: ``fp16`` halves the weights in the file; ``int8`` quantises weights and activations by the values
            seen on the ``calibration`` images, but for the last layers of the heads.
        calibration: what the file takes, [B, C, H, W]; read one by one.
        is_transformer: whether the detector is one, which NNCF quantises otherwise.

    Raises:
        ArgumentError: if OpenVINO or, for int8, NNCF is missing.
    """
    openvino = import_optional("openvino", "openvino")
    model = openvino.convert_model(onnx_file)
    if precision == "int8":
        model = _quantise(model, calibration, is_transformer, find_exact_layers(onnx_file, model))
    for key, value in metadata.items():
        model.set_rt_info(json.dumps(value), ["lightning_convnext_det", key])
    folder.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=precision == "fp16")
    write_card(metadata, folder / "metadata.json")


def _quantise(
    model: Any, calibration: Sequence[Tensor], is_transformer: bool, exact: list[str]
) -> Any:  # openvino.Model
    nncf = import_optional("nncf", "openvino")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf.quantize(
        model,
        nncf.Dataset(calibration, lambda images: {"images": images.numpy()}),
        subset_size=len(calibration),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
        ignored_scope=nncf.IgnoredScope(names=exact),
    )


def find_exact_layers(onnx_file: Path, model: Any) -> list[str]:  # of an openvino.Model
    """Names of the convolutions and matrix products in OpenVINO's model that stay in float32.

    OpenVINO keeps the names of ONNX's nodes (``node_conv2d_61``), which tell nothing of the module.
    """
    graph = import_optional("onnx", "export").load(onnx_file).graph
    modules = name_modules(graph)
    exact = {node.name for node in graph.node if any(part in modules[node.output[0]] for part in _EXACT)}
    products = [op.get_friendly_name() for op in model.get_ops() if op.get_type_name() in ("Convolution", "MatMul")]
    return [name for name in products if name.removesuffix("/WithoutBiases") in exact]
