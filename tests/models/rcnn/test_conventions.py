import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.conventions import (
    CONVENTIONS,
    MMDETECTION,
    TORCHVISION,
    Convention,
    resolve_convention,
)
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.zoo import arguments_of
from lightning_convnext_det.modules import FasterRCNNModule, load_module
from lightning_convnext_det.modules.registry import save_module


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, TORCHVISION),
        ("mmdetection", MMDETECTION),
        (MMDETECTION, MMDETECTION),
        ({"base": "mmdetection"}, MMDETECTION),
        ({}, TORCHVISION),
        ({"roi_aligned": True}, dataclasses.replace(TORCHVISION, roi_aligned=True)),
        (
            {"base": "mmdetection", "roi_sampling_ratio": 2, "box_loss_weight": 3},
            dataclasses.replace(MMDETECTION, roi_sampling_ratio=2, box_loss_weight=3.0),
        ),
    ],
)
def test_resolve_convention__name_mapping_or_dataclass(setting: Any, expected: Convention) -> None:
    assert resolve_convention(setting, CONVENTIONS, "torchvision") == expected


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ("detectron2", ValueError, "convention is 'detectron2'; choose one of torchvision, mmdetection"),
        ({"base": "detectron2"}, ValueError, "convention is 'detectron2'"),
        ({"roi_align": True}, ValueError, "convention has no point 'roi_align'; did you mean 'roi_aligned'"),
        ({"box_loss": "l2"}, ValueError, "box_loss is 'l2'; choose smooth_l1, l1 or giou"),
        ({"rpn_box_loss": "giou"}, ValueError, "rpn_box_loss is 'giou'; choose smooth_l1 or l1"),
        ({"resize": "bicubic"}, ValueError, "resize is 'bicubic'; choose torchvision, opencv or pillow"),
        ({"roi_aligned": "yes"}, TypeError, "roi_aligned is 'yes'; expected true or false"),
        ({"roi_sampling_ratio": "2"}, ValueError, "roi_sampling_ratio is '2'; it must be at least 0"),
        ({"roi_sampling_ratio": True}, TypeError, "roi_sampling_ratio is True; expected a number or a word"),
        ({"min_proposal_side": None}, ValueError, "min_proposal_side is None; it must be at least 0"),
        ({"min_detection_side": -1}, ValueError, "min_detection_side is -1; it must be at least 0"),
        ({"rpn_skip_crossing": True}, ValueError, "rpn_skip_crossing=True needs matching='mmdetection'"),
        (["mmdetection"], TypeError, "convention is a list; give a name, a mapping or a Convention"),
    ],
)
def test_resolve_convention__mistakes(setting: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        resolve_convention(setting, CONVENTIONS, "torchvision")


@pytest.mark.parametrize("detector", [FasterRCNN, CascadeRCNN])
def test_constructor__at_most_40_arguments(detector: type[FasterRCNN]) -> None:
    assert len(arguments_of(detector)) <= 40


def test_convention__every_field_is_documented() -> None:
    documentation = inspect.getdoc(Convention) or ""
    assert [f.name for f in dataclasses.fields(Convention) if f"\n    {f.name}: " not in documentation] == []


def test_faster_rcnn__a_mapping_changes_single_points() -> None:
    small = {"backbone": "test_convnext", "fpn_channels": 8, "box_head_features": 8}
    detector = FasterRCNN(2, **small, convention={"base": "mmdetection", "roi_aligned": False, "box_loss": "giou"})
    assert not detector.roi_heads.box_roi_pool.aligned
    assert detector.roi_heads.box_roi_pool.sampling_ratio == 0
    assert detector.transform.resize == "opencv"
    assert detector.roi_heads.box_loss_weight == 10
    assert FasterRCNN(2, **small, convention=MMDETECTION).roi_heads.box_loss_weight == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.convention", "mmdetection"], "mmdetection"),
        (["--model.convention.roi_aligned", "false"], {"roi_aligned": False}),
        (
            ["--model.convention.base=mmdetection", "--model.convention.roi_sampling_ratio=2"],
            {"base": "mmdetection", "roi_sampling_ratio": 2},
        ),
        (["--model.convention={base: mmdetection, box_loss: giou}"], {"base": "mmdetection", "box_loss": "giou"}),
    ],
)
@pytest.mark.parametrize("kind", ["FasterRCNNModule", "CascadeRCNNModule"])
def test_command_line__takes_a_name_or_single_points(
    kind: str, arguments: list[str], expected: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model", kind, *arguments, "--data.root", str(tmp_path), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["convention"] == expected


def test_checkpoint__keeps_the_convention_as_plain_data(tmp_path: Path) -> None:
    small = {"backbone": "test_convnext", "fpn_channels": 8, "box_head_features": 8}
    for given in ("mmdetection", {"base": "mmdetection", "roi_sampling_ratio": 2}, Convention(roi_sampling_ratio=2)):
        module = FasterRCNNModule(2, convention=given, **small)
        save_module(module, tmp_path / "a.ckpt")
        stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["convention"]
        assert stored == (dataclasses.asdict(given) if isinstance(given, Convention) else given)
        loaded = load_module(tmp_path / "a.ckpt").detector
        assert loaded.roi_heads.box_roi_pool.sampling_ratio == module.detector.roi_heads.box_roi_pool.sampling_ratio
        assert loaded.transform.resize == module.detector.transform.resize
