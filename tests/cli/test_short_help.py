"""The short help names arguments that exist, and leaves out none of this package's own."""

import inspect
import re
from typing import get_args

import pytest

from lightning_convnext_det import DetectionDataModule, FasterRCNNModule
from lightning_convnext_det.cli.commands import FLAGS, TRAINER
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.cli.short_help import MAIN, short_help
from lightning_convnext_det.data.transforms import Preset
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.modules.registry import DETECTORS


@pytest.mark.heavy
def test_short_help__names_arguments_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help", "all"])
    everything = set(re.findall(r"--[\w.]+", capsys.readouterr().out))
    for kind, classes in (("data", (DetectionDataModule,)), ("model", (FasterRCNNModule, FasterRCNN))):
        everything |= {f"--{kind}.{name}" for one in classes for name in inspect.signature(one).parameters}
    named = {option.split()[0] for entries in MAIN.values() for option in entries}
    assert named <= everything
    own = {option for option in everything if "." not in option} - {"--help", "--print_config", "--ensemble+"}
    lightnings = {"--config", "--seed_everything", "--ckpt_path", "--weights_only", "--data", "--model", "--trainer"}
    assert own - lightnings - {"--checkpoint", "--output"} == {f"--{name}" for name in FLAGS}


@pytest.mark.parametrize("command", TRAINER)
def test_short_help__has_the_options_of_its_command(command: str) -> None:
    text = short_help(command)
    assert max(map(len, text.splitlines()[:-1])) <= 120
    assert ("--early_stopping" in text) == ("--report" in text) == (command == "fit")
    assert ("--tta" in text) == (command != "fit")
    assert "--tiles" in text
    assert f"convnext-det {command} --help all" in text


def test_short_help__names_every_detector_and_augmentation() -> None:
    text = " ".join(short_help("fit").split())
    assert [name for name in (*DETECTORS, "ClassifierModule", *get_args(Preset)) if name not in text] == []
