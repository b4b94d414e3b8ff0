"""Detectors for OpenVINO: a folder with ``model.xml`` and ``model.bin``, in float32, float16 or int8 weights."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_convnext_det.inference.export.optional import import_optional

# heads decide positions and scores, and take little time
_EXACT = (
    ".*box_head.*",
    ".*class_head.*",
    ".*box_predictor.*",
    ".*rpn.*",
    ".*sampling_offsets.*",
    ".*reference_points.*",
)


def write_openvino(
    onnx_file: Path,
    folder: Path,
    metadata: Mapping[str, Any],
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    calibration: Iterable[Tensor] = (),
    is_transformer: bool = False,
) -> None:
    """Convert an ONNX file.

    Args:
        onnx_file: from `write_onnx`, in float32.
        folder: to write; ``metadata.json`` is the third file in it.
        metadata: the description.
        precision: ``fp16`` halves the weights in the file; ``int8`` quantises weights and activations by the values
            seen on the ``calibration`` images.
        calibration: uint8 images [1, C, H, W].
        is_transformer: whether the detector is one, which NNCF quantises otherwise.

    Raises:
        ArgumentError: if OpenVINO or, for int8, NNCF is missing.
    """
    openvino = import_optional("openvino", "openvino")
    model = openvino.convert_model(onnx_file)
    if precision == "int8":
        model = _quantise(model, calibration, is_transformer)
    for key, value in metadata.items():
        model.set_rt_info(json.dumps(value), ["lightning_convnext_det", key])
    folder.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=precision == "fp16")
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")


def _quantise(model: Any, calibration: Iterable[Tensor], is_transformer: bool) -> Any:  # openvino.Model
    nncf = import_optional("nncf", "openvino")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    images = [image.numpy() for image in calibration]
    return nncf.quantize(
        model,
        nncf.Dataset(images, lambda image: {"images": image}),
        subset_size=len(images),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
        ignored_scope=nncf.IgnoredScope(patterns=list(_EXACT), validate=False),
    )
