"""The seven published checkpoints by their lists of tensors, and files as MMDetection writes them."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.convert.importer import import_weights
from lightning_convnext_det.convert.mmdetection import convert_mmdetection
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.inference.predictor import Predictor
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.modules import load_module, start_module
from lightning_convnext_det.modules.registry import DETECTORS, save_module
from tests.models.rcnn.goldens import GOLDENS, load_case, load_state_dict, needs_goldens

PUBLISHED = {  # millions of parameters with the mask branch, backbone, box head
    "mask_rcnn_convnext_tiny_1k_3x": (48.10, "convnext_tiny", "two_fc"),
    "cascade_mask_rcnn_convnext_tiny_1k_3x": (85.93, "convnext_tiny", "four_conv"),
    "cascade_mask_rcnn_convnext_small_1k_3x": (107.57, "convnext_small", "four_conv"),
    "cascade_mask_rcnn_convnext_base_1k_3x": (145.80, "convnext_base", "four_conv"),
    "cascade_mask_rcnn_convnext_base_22k_3x": (145.80, "convnext_base", "four_conv"),
    "cascade_mask_rcnn_convnext_large_22k_3x": (254.71, "convnext_large", "four_conv"),
    "cascade_mask_rcnn_convnext_xlarge_22k_3x": (406.88, "convnext_xlarge", "four_conv"),
}
COCO = tuple(n for n in FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:] if n != "N/A")
MINI = {"backbone": "convnext_golden"}

pytestmark = needs_goldens


def empty_tensors(checkpoint: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors without memory of the names and shapes of a published checkpoint."""
    listed = json.loads((GOLDENS / "keys" / f"{checkpoint}.json").read_text())
    with torch.device("meta"):
        return {k: torch.empty(v["shape"]) for k, v in listed["keys"].items()}, listed


@pytest.mark.heavy
@pytest.mark.parametrize("checkpoint", PUBLISHED)
def test_convert_mmdetection__published_names_and_shapes(checkpoint: str) -> None:
    tensors, listed = empty_tensors(checkpoint)
    millions, backbone, head = PUBLISHED[checkpoint]
    converted = convert_mmdetection(tensors)
    report = converted.report
    assert round((report.parameters + report.ignored_parameters) / 1e6, 2) == millions
    assert report.parameters == listed["params_box"]
    assert report.ignored_parameters == listed["params_mask"]
    # every name of the list is either filled here or left out as the mask branch
    assert len(report.matched) + len(report.ignored) == len(tensors) == listed["n_keys"]
    assert list(report.ignored) == [k for k, v in listed["keys"].items() if v.get("ignore")]
    assert (report.left_over, report.missing, report.mismatched) == ((), (), ())
    assert converted.arguments["backbone"] == backbone
    assert converted.arguments["box_head"] == head
    assert converted.module == ("FasterRCNNModule" if checkpoint.startswith("mask") else "CascadeRCNNModule")
    assert [s.name for s in report.slots][::79] == ["person", "toothbrush"]
    assert [s.category_id for s in report.slots][::79] == [1, 90]
    assert "12 left out (2,643,280 parameters" in str(report) or "36 left out (7,929,840 parameters" in str(report)


def renamed(tensors: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new if k == old else k: v for k, v in tensors.items()}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("backbone.norm2.bias", "backbone.norm9.bias", r"1 left over .*1 missing \(backbone.body.norms.2.bias\)"),
        ("neck.fpn_convs.3.conv.bias", "neck.fpn_convs.4.conv.bias", "1 left over .*layer_blocks.4.0.bias"),
        ("rpn_head.rpn_cls.weight", "rpn_head.rpn_cls.gain", "1 left over"),
        (
            "roi_head.bbox_head.fc_cls.weight",
            "roi_head.bbox_head.fc.weight",
            r"LCD-K011.*cls_score.weight.* is missing",
        ),
    ],
)
def test_convert_mmdetection__anything_unexpected_is_refused(old: str, new: str, message: str) -> None:
    tensors, _ = empty_tensors("mask_rcnn_convnext_tiny_1k_3x")
    with pytest.raises(CheckpointError, match=message):
        convert_mmdetection(renamed(tensors, old, new))


@pytest.mark.heavy
def test_convert_mmdetection__another_shape_or_backbone_is_refused() -> None:
    tensors, _ = empty_tensors("mask_rcnn_convnext_tiny_1k_3x")
    tensors["rpn_head.rpn_cls.bias"] = torch.empty(6, device="meta")
    with pytest.raises(CheckpointError, match=r"1 mismatched \(rpn.head.cls_logits.bias \[6\], expected \[3\]"):
        convert_mmdetection(tensors)
    with pytest.raises(CheckpointError, match="the backbone is not recognised; give its timm name"):
        convert_mmdetection(load_state_dict("mask_rcnn_convnext_mini"))


def test_convert_mmdetection__class_names_of_the_file() -> None:
    tensors = load_state_dict("mask_rcnn_convnext_mini")
    names = [f"cell {i}" for i in range(80)]
    slots = convert_mmdetection(tensors, class_names=names, **MINI).report.slots
    assert [(s.name, s.category_id) for s in slots[:2]] == [("cell 0", 0), ("cell 1", 1)]


@pytest.mark.heavy
@pytest.mark.parametrize("model", ["mask_rcnn_convnext_mini", "cascade_rcnn_convnext_mini"])
def test_import_weights__from_the_published_file_to_boxes(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = load_case(model, "small_b")
    content = {
        "state_dict": load_state_dict(model),
        "meta": {"epoch": 36, "CLASSES": COCO, "config": "model = dict()"},
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": []},
    }
    torch.save(content, tmp_path / "published.pth")
    destination = tmp_path / "out.ckpt"
    assert (
        main(
            [
                "import-weights",
                str(tmp_path / "published.pth"),
                str(destination),
                f"--backbone={MINI['backbone']}",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "0 left over, 0 missing, 0 mismatched" in printed
    module = load_module(destination)
    assert module.class_names[:2] == ["person", "bicycle"]
    assert module.category_ids[-1] == 90
    assert module.hparams["convention"] == "mmdetection"
    module.detector.transform.min_sizes, module.detector.transform.max_size = [min(case.info["scale"])], 380
    found = Predictor(module.detector, module.class_names)(case.image)
    torch.testing.assert_close(found["boxes"], case.golden["boxes"], atol=0.02, rtol=0)
    assert isinstance(module.detector, CascadeRCNN) == model.startswith("cascade")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("model", "stages"),
    [("mask_rcnn_convnext_mini", [""]), ("cascade_rcnn_convnext_mini", [".stages.0", ".stages.1", ".stages.2"])],
)
def test_start_module__other_classes_keep_all_but_the_two_last_layers(
    model: str, stages: list[str], tmp_path: Path
) -> None:
    converted = convert_mmdetection(load_state_dict(model), **MINI)
    module = DETECTORS[converted.module](**converted.arguments)
    module.detector.load_state_dict(converted.state_dict)
    save_module(module, tmp_path / "imported.ckpt")
    tuned = start_module(tmp_path / "imported.ckpt", 3, ["a", "b", "c"], lr=1e-3)
    layers = [f"detector.roi_heads{s}.box_predictor.{x}." for s in stages for x in ("cls_score", "bbox_pred")]
    for name, tensor in tuned.state_dict().items():
        if name.startswith(tuple(layers)):
            assert len(tensor) in (4, 16)
        else:
            assert torch.equal(tensor, module.state_dict()[name]), name
    assert tuned.hparams["convention"] == "mmdetection"
    assert tuned.hparams["lr"] == 1e-3
    assert tuned.training
    again = start_module(tmp_path / "imported.ckpt", 80, module.class_names)
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in again.state_dict().items())
    # as many classes, but others
    renamed_classes = start_module(tmp_path / "imported.ckpt", 80, [f"cell {i}" for i in range(80)]).state_dict()
    assert not torch.equal(renamed_classes[f"{layers[0]}weight"], module.state_dict()[f"{layers[0]}weight"])


@pytest.mark.heavy
def test_fit__starts_from_imported_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(load_state_dict("mask_rcnn_convnext_mini"), tmp_path / "published.pth")
    destination = str(tmp_path / "imported.ckpt")
    assert main(["import-weights", str(tmp_path / "published.pth"), destination, f"--backbone={MINI['backbone']}"]) == 0
    data = write_synthetic_coco(tmp_path / "data", 2, 2)
    small = ["--model.min_size=64", "--model.max_size=96", "--trainer.accelerator=cpu", "--data.num_workers=0"]
    fit = ["fit", f"--data.root={data}", f"--start_from={destination}", "--trainer.fast_dev_run=true", *small]
    assert main(fit) == 0
    printed = capsys.readouterr().err
    assert "imported.ckpt: 95 tensors kept, 4 begin anew for other classes" in printed
    assert main(["test", *fit[1:]]) == 2
    assert "--start_from begins the training of a detector" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"LCD-K014.*'detector.backbone.fpn.inner_blocks.0.0.weight' is missing"):
        start_module(destination, 3, fpn_channels=16)


def test_import_weights__other_detectors_of_mmdetection_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {"rpn_head.x": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"LCD-K010.*got another R-CNN of MMDetection"):
        import_weights(tmp_path / "x.pth")
