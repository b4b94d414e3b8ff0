import pytest
import timm
import torch
from torch import nn

from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.modules import DeformableDETRModule, FasterRCNNModule
from lightning_convnext_det.modules.layer_decay import find_layers
from lightning_convnext_det.modules.optimization import format_groups

DEPTHS = {"convnext_atto": (2, 2, 6, 2), "convnext_tiny": (3, 3, 9, 3), "convnext_base": (3, 3, 27, 3)}


def authors_scale(name: str, depths: tuple[int, ...], decay: float) -> float:
    """The rule as the issue of ConvNeXt's detectors states it, told from the parts of a name of this package."""
    last = 12 if depths[2] > 9 else 6
    layer = last + 1
    parts = name.removeprefix("backbone.body.net.").split(".") if name.startswith("backbone.body.net.") else []
    if parts and parts[0].startswith("stem"):
        layer = 0
    elif parts and parts[0].startswith("stages_"):
        stage = int(parts[0][-1])
        if parts[1] == "downsample":
            layer = {1: 2, 2: 3, 3: last}[stage]
        else:
            layer = {0: 1, 1: 2, 2: 3 + int(parts[2]) // 3, 3: last}[stage]
    return decay ** (last + 1 - layer)


@pytest.mark.heavy
@pytest.mark.parametrize(("backbone", "decay"), [("convnext_tiny", 0.95), ("convnext_base", 0.8)])
def test_parameter_groups__equal_the_authors_rule(backbone: str, decay: float) -> None:
    with torch.device("meta"):
        module = FasterRCNNModule(80, backbone=backbone, out_norm=True, lr=1e-4, weight_decay=0.05, layer_decay=decay)
    groups = module.parameter_groups()
    print("\n" + backbone)  # shown by pytest -s
    print(format_groups(groups))
    of_parameter = {id(p): g for g in groups for p in g["params"]}
    modules = dict(module.detector.named_modules())
    kinds = set()
    for name, parameter in module.detector.named_parameters():
        group, owner = of_parameter[id(parameter)], modules[name.rpartition(".")[0]]
        assert group["lr"] == pytest.approx(1e-4 * authors_scale(name, DEPTHS[backbone], decay), rel=1e-12), name
        is_norm = isinstance(owner, nn.LayerNorm | nn.BatchNorm2d | nn.GroupNorm)
        free = is_norm or name.endswith((".bias", ".gamma"))
        assert group["weight_decay"] == (0.0 if free else 0.05), name
        kinds.add((type(owner).__name__, free))
    assert {("Linear", False), ("Conv2d", False), ("LayerNorm2d", True), ("ConvNeXtBlock", True)} <= kinds
    assert sum(len(g["params"]) for g in groups) == len(of_parameter) == len(list(module.detector.parameters()))
    # the figures that the rule gives by hand: seven (13) layers below the heads, stem at the bottom
    layers = {g["layer"] for g in groups}
    assert layers == set(range(8 if backbone == "convnext_tiny" else 14))
    stem = next(g for g in groups if g["layer"] == 0)
    assert stem["lr"] == pytest.approx(1e-4 * decay ** (7 if backbone == "convnext_tiny" else 13))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_small", "convnext_zepto_rms_ols"])
def test_find_layers__any_convnext_as_pyramid_and_as_classifier(name: str) -> None:
    with torch.device("meta"):
        pyramid, classifier = TimmPyramid(name).net, timm.create_model(name)
    own, whole = find_layers(name, pyramid), find_layers(name, classifier)
    assert own.heads == whole.heads == (13 if name == "convnext_small" else 7)
    flat = {key.replace(".", "_"): layer for key, layer in whole.of_parameter.items()}
    assert {key.replace(".", "_"): layer for key, layer in own.of_parameter.items()} == flat
    assert set(own.of_parameter) == {key for key, _ in pyramid.named_parameters()}
    assert all(
        key.startswith(("head.", "norm_pre."))
        for key, _ in classifier.named_parameters()
        if key not in whole.of_parameter
    )


def test_find_layers__grn_and_layer_scale_do_not_decay() -> None:
    module = FasterRCNNModule(2, backbone="convnextv2_atto", fpn_channels=32, box_head_features=32, layer_decay=0.9)
    free = {id(p) for g in module.parameter_groups() if g["weight_decay"] == 0 for p in g["params"]}
    grn = [p for name, p in module.detector.named_parameters() if ".grn." in name]
    assert len(grn) == 24
    assert all(id(p) in free for p in grn)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_find_layers__others_as_timm_groups_them(name: str) -> None:
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        pyramid, classifier = TimmPyramid(name).net, timm.create_model(name)
    layers = find_layers(name, pyramid)
    expected = {}
    by_id = {id(p): key.replace(".", "_") for key, p in classifier.named_parameters()}
    for group in param_groups_layer_decay(classifier, layer_decay=0.5):
        expected |= {by_id[id(p)]: group["lr_scale"] for p in group["params"]}
    for key, _ in pyramid.named_parameters():
        flat = key.removeprefix("model.").replace(".", "_")
        if flat in expected:
            assert layers.scale(key, 0.5) == pytest.approx(expected[flat]), key
    assert layers.scale(None, 0.5) == 1.0
    assert len({layers.scale(key, 0.5) for key in layers.of_parameter}) > 4


@pytest.mark.heavy
def test_parameter_groups__layer_decay_with_a_factor_and_in_deformable_detr() -> None:
    with torch.device("meta"):
        options = {"backbone": "convnext_atto", "layer_decay": 0.5, "lr": 1.0}
        plain = DeformableDETRModule(2, **options)
        slow = DeformableDETRModule(2, **options, backbone_lr_factor=0.1)
    for name in ("backbone.net.stem_0.weight", "backbone.net.stages_3.blocks.0.gamma"):
        assert slow.learning_rate_factor(name) == pytest.approx(0.1 * plain.learning_rate_factor(name))
    assert plain.learning_rate_factor("backbone.net.stem_0.weight") == 0.5**7
    assert plain.learning_rate_factor("levels.embedding") == 1.0


@pytest.mark.heavy
def test_parameter_groups__tables_that_timm_exempts_do_not_decay() -> None:
    with torch.device("meta"):
        module = FasterRCNNModule(2, backbone="swin_tiny_patch4_window7_224", layer_decay=0.9)
    free = {id(p) for g in module.parameter_groups() if g["weight_decay"] == 0 for p in g["params"]}
    tables = [p for name, p in module.detector.named_parameters() if "relative_position_bias_table" in name]
    assert tables
    assert all(id(p) in free for p in tables)


def test_layer_decay__out_of_range() -> None:
    with pytest.raises(ValueError, match=r"layer_decay is 1\.5; it must be above 0"):
        FasterRCNNModule(2, backbone="test_convnext", layer_decay=1.5)
