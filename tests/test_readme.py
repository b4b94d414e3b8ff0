import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from lightning_convnext_det.cli import main
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.modules import load_module
from lightning_convnext_det.tools import TOOLS

from .test_cli import SMALL

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


def test_readme__the_two_commands_of_ones_own_data(place: Path) -> None:
    fit, predict = (
        next(shlex.split(command)[1:] for command in COMMANDS if command.startswith(f"convnext-det {name}"))
        for name in ("fit", "predict")
    )
    assert main([*fit, *SMALL, "--trainer.max_epochs=1"]) == 0
    assert main([*predict, *SMALL[-3:]]) == 0
    assert (place / "predictions" / "predictions.json").is_file()
    assert len(list((place / "predictions").glob("*.jpg"))) == 3


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
