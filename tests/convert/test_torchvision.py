from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.convert.importer import import_weights
from lightning_convnext_det.convert.torchvision import convert_torchvision
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.modules import load_module

SMALL = {"box_score_thresh": 0.02, "min_size": 160, "max_size": 266}


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that the published file has: those of torchvision before 0.14, and frozen BatchNorms."""
    renamed = {}
    for key, value in state.items():
        if not key.endswith("num_batches_tracked"):
            key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
            if key.startswith("backbone.fpn."):
                key = key.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
            renamed[key] = value
    assert "backbone.fpn.inner_blocks.3.weight" in renamed
    return renamed


@pytest.mark.heavy
@pytest.mark.parametrize("is_published", [False, True], ids=["names of today", "names of the published file"])
def test_import_weights__same_boxes_as_torchvision(
    is_published: bool, photos: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_CUSTOM_KERNELS", "1")  # torchvision's own RoIAlign, for the same order of sums
    reference = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91, **SMALL).eval()
    if is_published:
        for norm in (m for m in reference.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.eps = 0.0  # as torchvision has it for the published weights, in models/detection/faster_rcnn.py
    state = reference.state_dict()
    torch.save(published_names(state) if is_published else state, tmp_path / "a.pth")
    assert main(["import-weights", str(tmp_path / "a.pth"), str(tmp_path / "a.ckpt")]) == 0
    module = load_module(tmp_path / "a.ckpt")
    assert (len(module.class_names), module.class_names[0], module.category_ids[-1]) == (90, "person", 90)
    detector = module.detector.to(memory_format=torch.contiguous_format)
    detector.backbone.body.channels_last = False
    detector.transform.min_sizes, detector.transform.max_size = [160], 266
    detector.roi_heads.score_thresh = 0.02
    with torch.no_grad():
        expected = reference([p / 255 for p in photos])
        found = detector(photos)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours["boxes"]) == 100
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=1e-4, rtol=0)
        torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-5, rtol=0)
        assert torch.equal(ours["labels"], theirs["labels"] - 1)


@pytest.mark.heavy
def test_import_weights__report_and_refusals(tmp_path: Path) -> None:
    state = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4).state_dict()
    torch.save(state, tmp_path / "a.pth")
    report = import_weights(tmp_path / "a.pth").report
    assert report.origin == "torchvision"
    assert (report.left_over, report.missing, report.mismatched, report.slots) == ((), (), (), ())
    assert len(report.matched) + len(report.redundant) == len(state)
    del state["backbone.body.layer4.2.bn3.running_mean"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"LCD-K011.*1 missing \(backbone.body.net.layer4.2.bn3.running_mean\)"):
        import_weights(tmp_path / "b.pth")
    with torch.device("meta"):
        second = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
    torch.save({key: torch.zeros(1) for key in second}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="fasterrcnn_resnet50_fpn_v2, whose heads are not modelled"):
        import_weights(tmp_path / "c.pth")


def test_convert_torchvision__a_tensor_is_missing() -> None:
    with torch.device("meta"):
        tensors = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    del tensors["roi_heads.box_predictor.cls_score.bias"]
    with pytest.raises(CheckpointError, match=r"LCD-K011.*1 missing \(roi_heads.box_predictor.cls_score.bias\)"):
        convert_torchvision(tensors)
