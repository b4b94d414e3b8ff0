import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.cli.tools import TOOLS
from lightning_convnext_det.convert.deformable_detr_names import CONVNEXT_SIZES
from lightning_convnext_det.convert.mmdetection import convert_mmdetection
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.modules import load_module
from tests.cli.test_main import SMALL
from tests.models.rcnn.goldens import GOLDENS, load_state_dict, needs_goldens

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [line for language, text in BLOCKS if language == "shell" for line in text.splitlines() if line]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_synthetic_coco(tmp_path / "DIR", 6, 3, 3)
    Image.new("RGB", (80, 60), (9, 99, 200)).save(tmp_path / "photo.jpg")
    (tmp_path / "PHOTOS").symlink_to(tmp_path / "DIR" / "test")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_readme__python_runs(block: str, place: Path) -> None:
    # as written, but for the size of the network and the length of the training
    small = 'backbone="test_convnext", min_size=64, max_size=96, fpn_channels=16, box_head_features=32'
    block = block.replace('backbone="convnext_tiny"', small).replace("max_epochs=24", 'max_epochs=1, accelerator="cpu"')
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    if "save_checkpoint" in block:
        assert load_module(place / "detector.ckpt").class_names[0] == "disc"


def test_readme__the_commands_of_ones_own_data(place: Path) -> None:
    check, fit, predict = (
        next(shlex.split(command)[1:] for command in COMMANDS if command.startswith(f"convnext-det {name}"))
        for name in ("check", "fit", "predict")
    )
    assert main(check) == 0
    assert main([*fit, *SMALL, "--trainer.max_epochs=1"]) == 0
    assert main([*predict, *SMALL[-3:]]) == 0
    assert (place / "predictions" / "predictions.json").is_file()
    assert len(list((place / "predictions").glob("*.jpg"))) == 3


@needs_goldens
def test_readme__from_a_published_checkpoint_to_boxes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a network of the published names, so small that its size has no name
    monkeypatch.setitem(CONVNEXT_SIZES, (16, 2), "golden")
    model = "cascade_rcnn_convnext_mini"
    torch.save({"state_dict": load_state_dict(model)}, place / "cascade_mask_rcnn_convnext_base_22k_3x.pth")
    shutil.copy(GOLDENS / "images" / "photo.png", place / "photo.jpg")
    commands = [shlex.split(c)[1:] for c in COMMANDS if "cascade.ckpt" in c]
    assert [c[0] for c in commands] == ["import-weights", "predict"]
    assert main(commands[0]) == 0
    assert main([*commands[1], *SMALL[-3:]]) == 0
    found = json.loads((place / "predictions" / "predictions.json").read_text())
    golden = load_file(GOLDENS / model / "photo_1333x800.safetensors")
    boxes = torch.tensor([f["bbox"] for f in found])
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(boxes, golden["boxes"], atol=0.06, rtol=0)  # written with two decimals
    ids = [s.category_id for s in convert_mmdetection(load_state_dict(model)).report.slots]
    assert [f["category_id"] for f in found] == [ids[label] for label in golden["labels"]]


def test_readme__every_command_exists() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for command in COMMANDS:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            assert f"\n{words[1]}: " in makefile
        else:
            assert words[1] in (*TOOLS, "fit", "validate", "test", "predict")


def test_readme__files_it_names_exist() -> None:
    for path in re.findall(r"`((?:configs|benchmarks|notebooks)/[\w./]+)`", README):
        assert (Path(__file__).parents[1] / path).is_file(), path


def test_readme__tests_that_keep_the_promises_exist() -> None:
    root = Path(__file__).parents[1]
    promises = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", README)
    assert len(promises) > 10
    for path, name in promises:
        assert f"def {name}(" in (root / path).read_text(), f"{path}::{name}"
