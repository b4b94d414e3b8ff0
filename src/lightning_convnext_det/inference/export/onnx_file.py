"""Detectors as one ONNX file, in float32, or with the matrix products of backbone and transformer in float16."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.inference.export.optional import import_optional

OPSET = 18  # the exporter's own; the first with GridSample, LayerNormalization and ReduceMax on axes
LIMIT = 2**31 - 1  # bytes that one protobuf message holds
OUTPUTS = ("boxes", "scores", "labels", "count")
_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch names the modules that a node belongs to
_PRODUCTS = ("Conv", "Gemm", "MatMul")
# parts whose products stay in float32: they decide positions, or which boxes are kept
_EXACT = ("box_heads", "class_heads", "reference_points", "sampling_offsets", "rpn", "box_predictor", "proposer")


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: Mapping[str, str],
    precision: Literal["fp32", "fp16"] = "fp32",
) -> None:
    """Write a recorded graph as ONNX.

    Args:
        program: from `record`.
        path: file to write.
        metadata: text to keep in the file.
        precision: ``fp16`` halves the file: convolutions and linear layers compute in float16; norms, softmax, the
            heads, boxes and NMS stay in float32, as do input and output.

    Raises:
        ArgumentError: if ONNX packages are missing, an operator has no ONNX form, or the file would exceed 2 GB.
    """
    onnx = import_optional("onnx", "export")
    import_optional("onnxscript", "export")
    model = _translate(program)
    _name_axes(model)
    if precision == "fp16":
        halve(onnx, model)
    for node in model.graph.node:  # keep the names of modules, but not the stack traces with paths of this machine
        scopes = [entry.value for entry in node.metadata_props if entry.key == _SCOPES]
        del node.metadata_props[:]
        onnx.helper.set_metadata_props(node, dict.fromkeys([_SCOPES], scopes[0]) if scopes else {})
    onnx.helper.set_model_props(model, dict(metadata))
    if model.ByteSize() > LIMIT:
        raise ArgumentError(f"[LCD-X002] {path} would exceed 2 GB, the limit of one ONNX file; try precision=fp16")
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def _translate(program: torch.export.ExportedProgram) -> Any:  # an onnx.ModelProto
    for name in ("torch.onnx", "onnx_ir", "onnxscript"):  # which warn of themselves
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        try:
            translated = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, verbose=False, input_names=["images"], output_names=OUTPUTS,
                optimize=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0][:200]
            raise ArgumentError(f"[LCD-X002] an operator of the detector has no ONNX form: {reason}") from error
        assert translated is not None
        simplify(translated.model)
    return translated.model_proto


def simplify(model: Any) -> None:  # an onnx_ir.Model
    """Fold constants, and remove duplicates and what is not used.

    The exporter's own optimisation also tries some hundred patterns on each node, which takes longer than the
    translation (147 of 261 seconds for Faster R-CNN with a ResNet-50); runtimes fuse operators themselves.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    optimizer.inline(model)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    for simplification in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        simplification(model)


def _name_axes(model: Any) -> None:
    names = {"images": ("batch", None, "height", "width"), **dict.fromkeys(OUTPUTS, ("batch",))}
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in zip(value.type.tensor_type.shape.dim, names[value.name], strict=False):
            if name and not axis.HasField("dim_value"):
                axis.dim_param = name


def name_modules(graph: Any) -> dict[str, str]:  # an onnx.GraphProto
    """Text with the names of the modules that each node belongs to, by the name of the node's first output.

    Beside the scopes, these are the names of the weights and of the bias that is added next: heads that are handed to
    another module have no scope of their own, and folded weights no name.
    """
    added: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type == "Add":
            for name in node.input:
                added.setdefault(name, []).extend(node.input)
    names = {}
    for node in graph.node:
        scopes = [entry.value for entry in node.metadata_props if entry.key == _SCOPES]
        names[node.output[0]] = " ".join([*scopes, *node.input, *added.get(node.output[0], [])])
    return names


def halve(onnx: ModuleType, model: Any) -> int:
    """Let convolutions and linear layers with weights in the file compute in float16; return how many do.

    Casts surround each, so that everything else keeps its type; runtimes fuse neighbouring casts.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    halved: dict[str, str] = {}
    modules = name_modules(graph)
    nodes, count = [], 0
    for node in graph.node:
        exact = any(part in modules[node.output[0]] for part in _EXACT)
        if node.op_type not in _PRODUCTS or exact or not any(name in weights for name in node.input[:2]):
            nodes.append(node)
            continue
        count += 1
        for i, name in enumerate(node.input):
            if name in weights:
                half = halved.setdefault(name, f"{name}_fp16")
            elif name:
                half = f"{node.name or count}_in{i}_fp16"
                nodes.append(onnx.helper.make_node("Cast", [name], [half], to=onnx.TensorProto.FLOAT16))
            else:
                continue
            node.input[i] = half
        output, node.output[0] = node.output[0], f"{node.output[0]}_fp16"
        nodes += [node, onnx.helper.make_node("Cast", [node.output[0]], [output], to=onnx.TensorProto.FLOAT)]
    for name, half in halved.items():
        array = onnx.numpy_helper.to_array(weights[name]).astype("float16")
        graph.initializer.append(onnx.numpy_helper.from_array(array, half))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return count
