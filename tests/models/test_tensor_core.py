"""No detector's tensor core reads values of the device, which would stall a GPU and end an export."""

import ast
import inspect
import textwrap
from collections.abc import Callable

import pytest

from lightning_convnext_det.models import tensor_detections
from lightning_convnext_det.models.deformable_detr import dino_decoder, heads, levels, proposals, transformer
from lightning_convnext_det.models.deformable_detr.detector import QueryDetector
from lightning_convnext_det.models.deformable_detr.dino import DINO
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
from lightning_convnext_det.models.fpn import PyramidFPN
from lightning_convnext_det.models.rcnn import faster_rcnn
from lightning_convnext_det.models.rcnn.anchors import PyramidAnchors
from lightning_convnext_det.models.rcnn.box_coder import StdBoxCoder, clip_boxes
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.rcnn.roi_heads import BoxHeads, CascadeHeads, Regions
from lightning_convnext_det.models.rcnn.rpn import ProposalNetwork
from lightning_convnext_det.models.selection import Selection
from lightning_convnext_det.ops import batch_nms, deform_attn, deform_attn_indexed, roi_align
from lightning_convnext_det.ops.roi_align import MultiScaleRoIAlign

# what runs between the batch and TensorDetections; torch.export would find the others, which are torch's or timm's
RCNN = [
    FasterRCNN.forward_tensors,
    faster_rcnn._as_regions,
    PyramidFPN.forward,
    PyramidAnchors.forward,
    StdBoxCoder.decode_single,
    clip_boxes,
    ProposalNetwork.propose,
    Regions.as_rois,
    BoxHeads.detect,
    BoxHeads.classify,
    BoxHeads.select,
    BoxHeads.move,
    CascadeHeads.detect,
    MultiScaleRoIAlign.pool,
    MultiScaleRoIAlign._pool,
    MultiScaleRoIAlign._assign_levels,
    roi_align._find_zoom,
    Selection.select,
    Selection._rank,
    batch_nms.batch_nms,
    batch_nms._recorded_nms,
    batch_nms._nms,
    batch_nms.fill_rows,
]
DETR = [
    QueryDetector.forward_tensors,
    QueryDetector.select,
    DeformableDETR.decode,
    DINO.decode,
    DINO._decode,
    levels.PyramidLevels.forward,
    levels.PyramidLevels._project,
    levels.Levels.to_maps,
    levels.flatten_levels,
    levels._encode_grid,
    levels.encode_sine,
    levels._count_covered,
    levels.number_tensor,
    transformer.inverse_sigmoid,
    heads.apply_in_full_precision,
    transformer.DeformableAttention.forward,
    transformer.DeformableAttention._locate,
    transformer.FeedForward.forward,
    transformer.EncoderLayer.forward,
    transformer.Encoder.forward,
    transformer.DecoderLayer.forward,
    transformer.Decoder.forward,
    dino_decoder.LookForwardTwiceDecoder.forward,
    dino_decoder.LookForwardTwiceDecoder.encode_boxes,
    proposals.TokenProposals.project,
    proposals.TokenProposals.choose,
    proposals.Proposer.forward,
    proposals.Proposer.encode,
    proposals.QuerySelection.forward,
    proposals.token_boxes,
    deform_attn.multi_scale_deformable_attention,
    deform_attn.attention_by_grid_sample,
    deform_attn_indexed.attention_by_indexing,
    deform_attn_indexed._read_level,
    tensor_detections.keep_first,
]
READS = {"item", "tolist", "numpy", "cpu"}
ALLOWED = {
    # lengths of lists
    "len(self.stages)", "len(anchors)", "len(maps)", "len(rows)", "len(hidden)",
    "len(self.layers)", "len(self.decoder.layers)", "len(self.box_heads)",
    "len(self.class_heads)",
    "float('inf')",
    # an XLA device's only
    "torch.cat([boxes, scores[..., None], index[..., None].to(boxes.dtype)], -1).cpu()",
}  # fmt: skip


def reads(source: str) -> list[str]:
    """The calls in a source that read values or the length of a tensor."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = [(ast.unparse(call.func), ast.unparse(call)) for call in calls]
    return [
        text for name, text in found
        if text not in ALLOWED and (name in ("len", "bool", "int", "float") or name.rpartition(".")[2] in READS)
    ]  # fmt: skip


@pytest.mark.parametrize("function", [*RCNN, *DETR], ids=lambda f: f.__qualname__)
def test_core__reads_no_values_of_the_device(function: Callable[..., object]) -> None:
    assert reads(textwrap.dedent(inspect.getsource(function))) == []


@pytest.mark.parametrize("line", ["len(boxes)", "boxes.max().item()", "float(scores[0])", "x.detach().cpu()"])
def test_reads__finds(line: str) -> None:
    assert reads(f"y = {line} + 1") == [line]
