"""Files as detrex and MMDetection write them for DINO, through the command to boxes."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.convert.importer import import_weights
from lightning_convnext_det.convert.mmdetection_dino import convert_mmdetection_dino
from lightning_convnext_det.convert.naming import coco_categories
from lightning_convnext_det.convert.report import name_slots
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.inference.predictor import Predictor
from lightning_convnext_det.models.deformable_detr.dino import DINO
from lightning_convnext_det.modules import load_module, start_module
from lightning_convnext_det.modules.registry import DETECTORS, save_module
from tests.models.dino_goldens import GOLDENS, MINI, build_detector, load_state_dict, needs_goldens

MINI_ARGUMENTS = {"backbone": "convnext_golden", "num_heads": 4, "detections_per_image": 100}
SMALL = {
    "num_queries": 10, "hidden_dim": 32, "num_heads": 8, "encoder_layers": 1, "decoder_layers": 2,
    "feedforward_dim": 32,
}  # fmt: skip

TO_DETREX = [
    (r"^backbone\.net\.stem_(\d)\.", r"backbone.downsample_layers.0.\1."),
    (r"^backbone\.net\.stages_(\d)\.downsample\.", r"backbone.downsample_layers.\1."),
    (r"^backbone\.net\.stages_(\d)\.blocks\.(\d+)\.", r"backbone.stages.\1.\2."),
    (r"^(backbone.*)\.conv_dw\.", r"\1.dwconv."),
    (r"^(backbone.*)\.mlp\.fc(\d)\.", r"\1.pwconv\2."),
    (r"^backbone\.norms\.0\.", "backbone.norm1."),
    (r"^backbone\.norms\.1\.", "backbone.norm2."),
    (r"^backbone\.norms\.2\.", "backbone.norm3."),
    (r"^levels\.embedding$", "transformer.level_embeds"),
    (r"^levels\.projections\.3\.", "neck.extra_convs.0."),
    (r"^levels\.projections\.", "neck.convs."),
    (r"^(neck.*)\.0\.(\w+)$", r"\1.conv.\2"),
    (r"^(neck.*)\.1\.(\w+)$", r"\1.norm.\2"),
    (r"^query_embedding\.", "transformer.tgt_embed."),
    (r"^proposer\.memory_projection\.", "transformer.enc_output."),
    (r"^proposer\.memory_norm\.", "transformer.enc_output_norm."),
    (r"^denoising\.label_embedding\.", "label_enc."),
    (r"^class_heads\.", "class_embed."),
    (r"^box_heads\.(\d)\.0\.", r"bbox_embed.\1.layers.0."),
    (r"^box_heads\.(\d)\.3\.", r"bbox_embed.\1.layers.1."),
    (r"^box_heads\.(\d)\.6\.", r"bbox_embed.\1.layers.2."),
    (r"^(encoder|decoder)\.", r"transformer.\1."),
    (r"position_head\.0\.", "ref_point_head.layers.0."),
    (r"position_head\.3\.", "ref_point_head.layers.1."),
    (r"(encoder\.layers\.\d)\.attention\.", r"\1.attentions.0."),
    (r"(encoder\.layers\.\d)\.norm\.", r"\1.norms.0."),
    (r"(encoder\.layers\.\d)\.feedforward\.norm\.", r"\1.norms.1."),
    (r"self_attention\.", "attentions.0.attn."),
    (r"cross_attention\.", "attentions.1."),
    (r"self_norm\.", "norms.0."),
    (r"cross_norm\.", "norms.1."),
    (r"feedforward\.norm\.", "norms.2."),
    (r"feedforward\.linear1\.", "ffns.0.layers.0.0."),
    (r"feedforward\.linear2\.", "ffns.0.layers.1."),
    (r"(value|output)_projection\.", r"\1_proj."),
]
FROM_DETREX_TO_MMDETECTION = [
    (r"^(neck.*)\.norm\.", r"\1.gn."),
    (r"^transformer\.level_embeds$", "level_embed"),
    (r"^transformer\.tgt_embed\.", "query_embedding."),
    (r"^transformer\.enc_output\.", "memory_trans_fc."),
    (r"^transformer\.enc_output_norm\.", "memory_trans_norm."),
    (r"^label_enc\.", "dn_query_generator.label_embedding."),
    (r"^class_embed\.", "bbox_head.cls_branches."),
    (r"^bbox_embed\.(\d)\.layers\.0\.", r"bbox_head.reg_branches.\1.0."),
    (r"^bbox_embed\.(\d)\.layers\.1\.", r"bbox_head.reg_branches.\1.2."),
    (r"^bbox_embed\.(\d)\.layers\.2\.", r"bbox_head.reg_branches.\1.4."),
    (r"^transformer\.", ""),
    (r"\.ffns\.0\.", ".ffn."),
    (r"\.attentions\.0\.attn\.", ".self_attn.attn."),
    (r"\.attentions\.0\.", ".self_attn."),
    (r"\.attentions\.1\.", ".cross_attn."),
]


def rename(tensors: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in tensors.items():
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def detrex_tensors(detector: DINO) -> dict[str, Tensor]:
    """Name the tensors of a detector as detrex does, its heads twice."""
    tensors = rename(detector.state_dict(), TO_DETREX)
    heads = {f"transformer.decoder.{k}": v for k, v in tensors.items() if k.startswith(("class_embed", "bbox_embed"))}
    return {**tensors, **heads}


def mmdetection_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of detrex; MMDetection has the heads once, and no bias in the neck."""
    kept = {k: v for k, v in tensors.items() if not re.match(r"transformer\.decoder\.(class|bbox)_embed", k)}
    renamed = rename(kept, FROM_DETREX_TO_MMDETECTION)
    return {k: v for k, v in renamed.items() if not re.match(r"neck.*\.conv\.bias$", k)}


@needs_goldens
@pytest.mark.heavy
def test_import_weights__published_names_of_detrex() -> None:
    published = "dino_convnext_tiny_384_4scale_12ep"
    listed = json.loads((GOLDENS / "keys" / f"{published}.json").read_text())["keys"]
    with torch.device("meta"):
        named = detrex_tensors(DINO(80))
    assert {
        k: list(v.shape) for k, v in named.items()
    } == listed  # so that files of these names are like published ones


@pytest.mark.heavy
def test_import_weights__from_a_file_of_detrex_to_boxes_on_a_photo(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    as_detrex = {"size_divisible": 1, "resize": "pillow", "min_size": 200, "max_size": 320}
    theirs = DINO(80, "convnext_atto", **as_detrex, **SMALL).eval()  # type: ignore[arg-type]
    content = {
        "model": detrex_tensors(theirs),
        "trainer": {"iteration": 89999, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
        "iteration": 89999,
    }
    torch.save(content, tmp_path / "dino_convnext_atto.pth")
    assert main(["import-weights", str(tmp_path / "dino_convnext_atto.pth"), str(tmp_path / "dino.ckpt")]) == 0
    report = capsys.readouterr().out
    assert "24 redundant, 0 left over, 0 missing, 0 mismatched" in report  # three heads of two and six tensors
    module = load_module(tmp_path / "dino.ckpt", min_size=200, max_size=320)
    assert (module.class_names[0], module.category_ids[-1]) == ("person", 90)
    photo = min((shared_data / "coco_mini" / "val2017").glob("*.jpg"))
    expected = Predictor(theirs, module.class_names)(photo)
    save_module(module, tmp_path / "small.ckpt")
    arguments = [f"--ckpt_path={tmp_path / 'small.ckpt'}", f"--data.predict={photo}", f"--output.folder={tmp_path}"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--output.draw=false"]
    assert main(["predict", *arguments, *quiet, "--data.num_workers=0"]) == 0
    found = json.loads((tmp_path / "predictions.json").read_text())
    boxes = torch.tensor([row["bbox"] for row in found])
    boxes[:, 2:] += boxes[:, :2]
    assert len(boxes) == 300
    assert {row["category_id"] for row in found} <= set(module.category_ids)
    torch.testing.assert_close(boxes, expected["boxes"], rtol=0, atol=0.02)


def test_import_weights__copies_of_a_head_that_differ_are_named(tmp_path: Path) -> None:
    tensors = detrex_tensors(DINO(3, "convnext_atto", **SMALL))  # type: ignore[arg-type]
    name = "transformer.decoder.class_embed.1.bias"
    torch.save({"model": {**tensors, name: tensors[name] + 1}}, tmp_path / "dino.pth")
    with pytest.raises(CheckpointError, match=rf"dino\.pth: .* 1 left over \({re.escape(name)}\)"):
        import_weights(tmp_path / "dino.pth")


@needs_goldens
@pytest.mark.heavy
def test_convert_mmdetection_dino__golden_weights_under_its_names() -> None:
    state = load_state_dict(MINI)
    without_bias = {k: torch.zeros_like(v) if re.match(r"neck.*conv\.bias$", k) else v for k, v in state.items()}
    named = mmdetection_tensors(without_bias)
    converted = convert_mmdetection_dino(named, **MINI_ARGUMENTS)  # type: ignore[arg-type]
    assert len(converted.report.matched) == len(named) + 4  # the biases of the neck
    expected = {"position_offset": 0.0, "position_temperature": 20.0, "resize": "opencv", "out_norm": True}
    assert converted.arguments.items() >= expected.items()
    for key, tensor in build_detector(MINI).state_dict().items():
        ours = converted.state_dict[key]
        assert torch.equal(ours, tensor) or key.endswith(".0.bias"), key  # all are where detrex's are


@pytest.mark.heavy
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_convert_mmdetection_dino__resnet(backbone: str) -> None:
    with torch.device("meta"):
        network = DINO(80, backbone, out_norm=False, **SMALL)  # type: ignore[arg-type]
    tensors = mmdetection_tensors(rename(detrex_tensors(network), [(r"^backbone\.net\.", "backbone.")]))
    tensors["backbone.bn1.num_batches_tracked"] = torch.tensor(7)
    converted = convert_mmdetection_dino(tensors)
    assert (converted.arguments["backbone"], converted.arguments["strides"]) == (backbone, [8, 16, 32])
    assert converted.report.redundant == ("backbone.bn1.num_batches_tracked",)
    assert [s.category_id for s in converted.report.slots][::79] == [1, 90]
    assert converted.module == "DINOModule"


@pytest.mark.heavy
def test_start_module__dino_for_other_classes_keeps_all_but_heads_and_label_embedding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    module = DETECTORS["DINOModule"](80, backbone="test_convnext", min_size=64, max_size=96, **SMALL)
    save_module(module, tmp_path / "a.ckpt")
    data = write_synthetic_coco(tmp_path / "data", 2, 2)
    arguments = [f"--start_from={tmp_path / 'a.ckpt'}", f"--data.root={data}", "--data.num_workers=0"]
    arguments += ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    assert main(["fit", *arguments]) == 0
    assert "7 begin anew for other classes" in capsys.readouterr().err
    started = start_module(tmp_path / "a.ckpt", 2, ["cat", "dog"])
    kept, new = module.detector.state_dict(), started.detector.state_dict()
    changed = {k for k in kept if kept[k].shape != new[k].shape or not torch.equal(kept[k], new[k])}
    heads = {f"class_heads.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert changed == heads | {"denoising.label_embedding.weight"}


@pytest.mark.parametrize("given", [[], [name for _, name in coco_categories()]], ids=["none", "COCO's"])
def test_name_slots__eighty_classes_of_coco_have_its_ids(given: list[str]) -> None:
    slots = name_slots(80, given)
    assert [(slots[i].name, slots[i].category_id) for i in (0, 11, 79)] == [
        ("person", 1), ("stop sign", 13), ("toothbrush", 90),
    ]  # fmt: skip
