"""No detector's tensor core reads values of the device, which would stall a GPU and end an export.

What runs between a batch and its detections is found by running it. The sources of all these functions are walked, and
while an exporter would record, torch tells which operators read values or have as many results as there are values.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_convnext_det
from lightning_convnext_det import DINO, CascadeRCNN, DeformableDETR, FasterRCNN
from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.deformable_detr import levels
from lightning_convnext_det.models.deformable_detr.detector import QueryDetector
from lightning_convnext_det.models.fpn import PyramidFPN
from lightning_convnext_det.models.rcnn import rpn
from lightning_convnext_det.ops import batch_nms, deform_attn_indexed, deform_attn_triton, token_blocks
from lightning_convnext_det.ops.tracing import record_attention

ROOT = str(Path(lightning_convnext_det.__file__).parent)
RCNN = {"fpn_channels": 8, "box_head_features": 8, "score_threshold": 0.0, "rpn_post_nms_top_n": (50, 50)}
DETR = {
    "strides": (8, 16), "num_queries": 8, "hidden_dim": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 2,
    "feedforward_dim": 32,
}  # fmt: skip
DETECTORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "faster": (FasterRCNN, RCNN),
    "faster_without_nms": (FasterRCNN, {**RCNN, "nms": "none", "convention": "mmdetection"}),
    "cascade": (CascadeRCNN, RCNN),
    "detr": (DeformableDETR, DETR),
    "detr_v2": (DeformableDETR, {**DETR, "backbone": "convnextv2_atto", "two_stage": True}),
    "detr_nms": (DeformableDETR, {**DETR, "nms": "hard", "independent_images": False}),
    "dino": (DINO, DETR),
    "dino_nms": (DINO, {**DETR, "nms": "hard"}),
}
# what only a GPU runs
ON_GPU = [
    batch_nms._nms_on_gpu, batch_nms._nms_of_all, batch_nms.nms_of_levels, rpn._choose_best,
    deform_attn_triton.attention_by_triton, deform_attn_triton._forward, deform_attn_triton._launch,
]  # fmt: skip
READS = {"item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "equal", "allclose", "unique"}
NUMBERS = {"float('inf')", "bool(torch.jit.is_tracing())"}
ALLOWED = {
    # lengths of lists
    "CascadeHeads.detect": {"len(self.stages)"},
    "DeformableDETR.decode": {"len(self.decoder.layers)", "len(self.box_heads)", "len(self.class_heads)"},
    "LookForwardTwiceDecoder.forward": {"len(hidden)", "len(self.layers)"},
    "MultiScaleRoIAlign._pool": {"len(maps)"},
    "ProposalNetwork.propose": {"len(anchors)"},
    "PyramidLevels._project": {"len(maps)"},
    "_assemble": {"len(maps)", "len(p)"},
    "_check_shapes": {"len(shape)", "len(spatial_shapes)"},
    "_take": {"len(images)"},
    "number_tensor": {"len(rows)"},
    # an XLA device's only
    "QueryDetector.select": {"torch.cat([boxes, scores[..., None], index[..., None].to(boxes.dtype)], -1).cpu()"},
    # not recorded: a wait of the host for how many boxes each level has, or the largest group of NMS
    "_split_by_level": {"(levels[:, None] == torch.arange(count, device=levels.device)).sum(0).tolist()"},
    "_nms_on_gpu": {"int(starts.diff().amax())", "len(boxes)", "starts[1:-1].cpu()"},
    "nms_by_triton": {"len(starts)", "len(boxes)"},
}
# these run on CPUs alone and are not recorded: lengths and values are at hand
ON_CPU = {
    "roi_align", "_check_images", "_as_rois", "grouped_nms", "map_tokens", "EncoderLayer._encode_in_blocks",
}  # fmt: skip
ON_CPU_FILES = {"roi_align_gather.py", "deform_attn_gather.py"}
# what is recorded with as many results as there are values, which NMS needs and runtimes can do
DATA_DEPENDENT_SHAPES = {
    "batch_nms", "_recorded_nms", "_nms", "_split_by_level", "BoxHeads.select", "Selection.select",
}  # fmt: skip


def create(name: str) -> Any:  # a detector
    torch.manual_seed(0)
    kind, options = DETECTORS[name]
    return kind(3, **{"backbone": "test_convnext", **options}).eval()


@contextmanager
def collecting(found: set[CodeType]) -> Iterator[None]:
    """Collect the functions of this package that run."""

    def see(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            found.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(before)


class ValueReads(TorchDispatchMode):
    """Collects what reads values, and what has a shape that depends on values, with the function that asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[str] = []
        self.shapes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor
        if by_mask and not any(index is not None and index.dtype == torch.bool for index in args[1]):
            return func(*args, **(kwargs or {}))
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            frame = sys._getframe()
            while not frame.f_code.co_filename.startswith(ROOT):
                frame = frame.f_back  # type: ignore[assignment]  # this package called
            caller = frame.f_code.co_qualname.partition(".<locals>")[0]
            if torch.Tag.data_dependent_output in func.tags:
                self.values.append(f"{func} in {caller}")
            else:
                self.shapes.add(caller)
        return func(*args, **(kwargs or {}))


def run(detector: Any, records: bool, given: Sequence[Any]) -> ValueReads:
    """Run a detector's tensor core, as it is or as an exporter records it."""
    reads = ValueReads()
    with torch.no_grad(), patch("torch.compiler.is_exporting", lambda: records), record_attention("gather"), reads:
        detector.forward_tensors(*given)
    return reads


@cache
def run_all() -> tuple[dict[str, ValueReads], set[CodeType]]:
    """Run the tensor cores of all detectors in all ways."""
    batch, sizes = torch.rand(2, 3, 64, 96), [(64, 96), (50, 70)]
    codes: set[CodeType] = set()
    recorded = {}
    for name in DETECTORS:
        detector = create(name)
        padded = (batch, torch.tensor(sizes))
        grouped = (batch, *detector.levels.place(batch, sizes)) if isinstance(detector, QueryDetector) else padded
        with collecting(codes):
            for given in ((batch,), padded, grouped):
                run(detector, False, given)
            with patch.object(token_blocks, "_MIN_HIDDEN", 0):  # as with large images
                run(detector, False, padded)
            recorded[name] = run(detector, True, padded)
    return recorded, codes


@cache
def parse(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"))


@cache
def sources() -> list[tuple[str, str, ast.AST]]:
    """File, qualified name and syntax of each function that runs; what is defined inside one is part of it."""
    found: list[tuple[str, str, ast.AST]] = [
        ("on a GPU", function.__qualname__, ast.parse(textwrap.dedent(inspect.getsource(function))))
        for function in ON_GPU
    ]
    for code in run_all()[1]:
        for node in ast.walk(parse(code.co_filename)):
            if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
                first = min(part.lineno for part in (node, *node.decorator_list))
                if first == code.co_firstlineno:
                    found.append((Path(code.co_filename).name, code.co_qualname, node))
    return found


def reads(tree: ast.AST, allowed: Collection[str] = ()) -> list[str]:
    """The calls in a source that read values or the length of a tensor."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [(ast.unparse(call.func), ast.unparse(call)) for call in calls]
    return [
        text for name, text in found
        if text not in NUMBERS and text not in allowed
        and (name in ("len", "bool", "int", "float") or name.rpartition(".")[2] in READS)
    ]  # fmt: skip


@pytest.mark.heavy
def test_core__reads_no_values_of_the_device() -> None:
    found = {}
    for file, name, node in sources():
        function = name.partition(".<locals>")[0]
        if file not in ON_CPU_FILES and function not in ON_CPU:
            found[f"{file} {name}"] = reads(node, ALLOWED.get(function, ()))
    assert {place: calls for place, calls in found.items() if calls} == {}
    for part in (  # of each room that a core consists of
        FasterRCNN.forward_tensors, QueryDetector.forward_tensors, DINO.decode, DeformableDETR.decode,
        TimmPyramid.forward, PyramidFPN.forward, levels._assemble, rpn.ProposalNetwork.propose,
        batch_nms._recorded_nms, batch_nms.fill_rows, deform_attn_indexed.attention_by_indexing,
    ):  # fmt: skip
        assert any(name.endswith(f" {part.__qualname__}") for name in found), part
    assert {name for _, name, _ in sources()} >= ON_CPU


@pytest.mark.heavy
@pytest.mark.parametrize("name", DETECTORS)
def test_core__records_no_values(name: str) -> None:
    recorded = run_all()[0][name]
    assert recorded.values == []
    has_nms = name.startswith(("faster", "cascade")) or name.endswith("nms")
    assert recorded.shapes <= (DATA_DEPENDENT_SHAPES if has_nms else set())


@pytest.mark.parametrize(
    "line",
    ["len(boxes)", "boxes.max().item()", "float(scores[0])", "int(x.sum())", "bool(x.any())", "x.detach().cpu()",
     "x.tolist()", "x.nonzero()", "torch.equal(x, y)"],
)  # fmt: skip
def test_reads__finds(line: str) -> None:
    assert reads(ast.parse(f"y = {line} + 1")) == [line]


@pytest.mark.parametrize("read", [Tensor.item, bool, int, float, lambda x: 1 if x > 0 else 2, lambda x: x in (1, 2)])
def test_value_reads__finds(read: Callable[[Tensor], object]) -> None:
    mode = ValueReads()
    with patch.object(sys.modules[__name__], "ROOT", str(Path(__file__).parent)), mode:  # this file's calls
        read(torch.ones(()))
    assert len(mode.values) == 1
