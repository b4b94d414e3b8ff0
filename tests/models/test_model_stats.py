import pytest
import torch
from torch import nn

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.models.model_stats import list_facts, measure_backbone, measure_detector

# parameters in millions and multiply-adds in 10^9 as published: arXiv:2201.03545 table 1 and mmpretrain's table of
# ConvNeXt; arXiv:2301.00808 for V2, whose authors give one or two digits; torchvision's weights for the ResNets
PUBLISHED = {
    "convnext_tiny": (28.59, 4.46, 0.01),
    "convnext_small": (50.22, 8.69, 0.01),
    "convnext_base": (88.59, 15.36, 0.02),
    "convnext_large": (197.77, 34.37, 0.04),
    "convnext_xlarge": (350.20, 60.93, 0.02),
    "convnextv2_atto": (3.7, 0.55, 0.01),
    "convnextv2_femto": (5.2, 0.78, 0.01),
    "convnextv2_pico": (9.1, 1.37, 0.01),
    "convnextv2_nano": (15.6, 2.45, 0.01),
    "convnextv2_tiny": (28.6, 4.47, 0.02),
    "convnextv2_base": (89, 15.4, 0.1),
    "convnextv2_large": (198, 34.4, 0.1),
    "convnextv2_huge": (660, 115, 0.5),
    "resnet50": (25.557, 4.089, 0.01),
    "resnext50_32x4d": (25.029, 4.23, 0.01),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", PUBLISHED)
def test_measure_backbone__equals_what_is_published(name: str) -> None:
    facts, (parameters, gflops, tolerance) = measure_backbone(name), PUBLISHED[name]
    digits = len(str(parameters).partition(".")[2])
    assert facts.parameters / 1e6 == pytest.approx(parameters, abs=0.51 * 10**-digits)
    assert facts.gflops == pytest.approx(gflops, abs=tolerance)
    assert facts.strides == (4, 8, 16, 32)
    widths = {"resnet50": 256, "resnext50_32x4d": 256, "convnext_tiny": 96, "convnext_base": 128}
    assert facts.channels == tuple(facts.channels[0] * 2**i for i in range(4))
    assert facts.channels[0] == widths.get(name, facts.channels[0])
    assert facts.top1 is not None


@pytest.mark.heavy
def test_measure_detector__counts_every_product() -> None:
    """A second count: convolutions and linear layers of the parts, from the sizes that a hook sees."""
    from lightning_convnext_det import create_detector

    facts = measure_detector("fasterrcnn_convnext_tiny_fpn")
    assert facts.parameters == 45_504_566
    products = 0

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal products
        if isinstance(module, nn.Conv2d):
            products += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            products += output.numel() * module.in_features

    with torch.device("meta"), torch.no_grad():
        detector = create_detector("fasterrcnn_convnext_tiny_fpn", 90).eval()
        for module in detector.modules():
            module.register_forward_hook(add)
        maps = detector.backbone(torch.zeros(1, 3, 800, 1344))
        detector.rpn.head(list(maps.values()))
        detector.roi_heads.box_predictor(detector.roi_heads.box_head(torch.zeros(1000, 256, 7, 7)))
    assert facts.gflops == pytest.approx(products / 1e9, rel=1e-6)


@pytest.mark.heavy
def test_measure_detector__every_kind() -> None:
    boxref = measure_detector("deformable_detr_boxref_convnextv2_tiny")
    assert (boxref.strides, boxref.channels) == ((4, 8, 16, 32), (96, 192, 384, 768))
    paper = measure_detector("deformable_detr_resnet50", strides=(8, 16, 32), extra_levels=1)
    # arXiv:2010.04159, table 1: 173 G on average over COCO's images, which are smaller than 800 x 1333
    assert 173 < paper.gflops < 173 * 1.2
    faster, cascade = (measure_detector(f"{kind}_convnext_tiny_fpn") for kind in ("fasterrcnn", "cascadercnn"))
    assert cascade.gflops > faster.gflops


@pytest.mark.heavy
def test_models__prints_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "*resnext50*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "model"
    assert lines[1].split()[:3] == ["resnext50_32x4d", "25.03", "4.23"]
    assert lines[2].startswith("fasterrcnn_resnext50_32x4d_fpn ")
    assert main(["models", "test_convnext"]) == 0  # any name of timm
    assert "test_convnext" in capsys.readouterr().out
    assert main(["models", "nothing*"]) == 2
    assert "no backbone or detector matches 'nothing*'" in capsys.readouterr().err


@pytest.mark.heavy
def test_list_facts__detectors_and_backbones() -> None:
    assert [f.name for f in list_facts("resn*50*")] == ["resnet50", "resnext50_32x4d"]


@pytest.mark.heavy
def test_measure_backbone__tags_and_fixed_sizes() -> None:
    assert measure_backbone("convnext_tiny.fb_in1k").top1 == 82.1
    assert measure_backbone("convnext_tiny.in12k_ft_in1k").top1 is None  # not the weights that have the figure
    assert [facts.name for facts in list_facts("convnext_atto.d2_*")] == ["convnext_atto.d2_in1k"]
    assert measure_backbone("swinv2_tiny_window8_256").gflops > 5  # it takes 256 pixels and nothing else
