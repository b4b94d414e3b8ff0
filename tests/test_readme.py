import re
from pathlib import Path

import timm
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from lightning_convnext_det.convert.naming import CONVNEXT_SIZES
from lightning_convnext_det.models.zoo import list_detectors

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_readme__is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_readme__image_is_small() -> None:
    image = re.search(r"!\[[^\]]+\]\((docs/images/[\w.]+)\)", README)
    assert image is not None
    assert (ROOT / image[1]).stat().st_size < 300_000


def test_readme__blocks_are_ten_lines() -> None:
    shell, python = (
        max(re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL), key=len) for kind in ("shell", "python")
    )
    assert len(shell.splitlines()) == 10
    assert len([line for line in python.splitlines() if line]) == 10


def test_readme__ap_of_torchvision_is_its_own() -> None:
    weights = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    ap = weights.meta["_metrics"]["COCO-val2017"]["box_map"]
    row = next(line for line in README.splitlines() if weights.url.rpartition("/")[2] in line)
    assert f"| {ap} |" in row


def test_readme__ap_of_the_convnext_authors_is_that_of_the_configurations() -> None:
    configs = "".join(path.read_text() for path in (ROOT / "configs").glob("*.yaml"))
    for ap in re.findall(r"\d\d\.\d", "".join(line for line in README.splitlines() if "R-CNN, ConvNeXt-" in line)):
        assert ap in configs
    named = {size for sizes in re.findall(r"convnext_\{([\w,]+)\}", README) for size in sizes.split(",")}
    assert named <= set(CONVNEXT_SIZES.values())


def test_readme__licences_of_backbones_are_what_timm_says() -> None:
    for tag, licence in (("convnext_tiny.fb_in1k", "apache-2.0"), ("convnextv2_tiny.fcmae", "cc-by-nc-4.0")):
        assert timm.get_pretrained_cfg(tag).license == licence
        assert licence in README.lower()


def test_backbones__detectors_it_names_exist() -> None:
    text = (ROOT / "docs" / "backbones.md").read_text()
    names = re.findall(r"`((?:fasterrcnn|cascadercnn|deformable_detr)\w*?_?)(?:\{([\w,]+)\}(\w*))?`", text)
    assert len(names) > 8
    for start, sizes, end in names:
        for size in sizes.split(","):
            assert f"{start}{size}{end}" in list_detectors()
