import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_convnext_det.cli import planning
from lightning_convnext_det.cli.given import names_in_file, names_on_command_line, parse_duration
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.planning.machine import Machine

TINY = [
    "--model.backbone=test_convnext",
    "--model.pretrained_backbone=false",
    "--model.fpn_channels=16",
    "--model.box_head_features=32",
    "--model.min_size=64",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.num_workers=0",
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop without network, whatever this machine is."""
    monkeypatch.setattr(planning, "find_machine", lambda *arguments: Machine(2, 8 * 2**30))
    monkeypatch.setattr(planning, "missing_weights", lambda name: "no network")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_coco(tmp_path_factory.mktemp("data") / "shapes", 8, 4)


def test_plan__prints_settings_and_builds_nothing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", str(dataset), "--model.lr=0.25", "--data.batch_size", "4"]) == 0
    said = capsys.readouterr().err
    rows = {words[1]: words[3:] for line in said.splitlines() if len(words := line.split()) > 4}
    assert rows["model.lr"][0] == "0.25"
    assert rows["data.batch_size"][:3] == ["4", "│", "given"]
    assert rows["model.min_size"][0] == "240"
    assert "add --model.pretrained_backbone false" in said
    assert not list(tmp_path.iterdir())


def test_fit__weights_that_cannot_be_had_end_in_one_line(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", f"--data.root={dataset}"]) == 5
    said = capsys.readouterr().err
    assert "error: [LCD-W001]" in said
    assert "add --model.pretrained_backbone false" in said


@pytest.mark.heavy
def test_fit__follows_the_plan_and_writes_it(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(json.dumps({"model": {"init_args": {"weight_decay": 0.25, "lr": 0.125}}}))
    folder = f"--trainer.default_root_dir={tmp_path}"
    arguments = [f"--data.root={dataset}", *TINY, f"--config={config}", "--model.lr=0.5", "--trainer.max_steps=2"]
    assert main(["fit", *arguments, folder]) == 0
    written = read_config(tmp_path)
    model, data, trainer = written["model"]["init_args"], written["data"]["init_args"], written["trainer"]
    assert (model["lr"], model["weight_decay"], model["fpn_channels"]) == (0.5, 0.25, 16)  # given
    assert model["anchor_sizes"][0] != [32]  # planned
    assert (data["batch_size"], model["max_size"], trainer["precision"]) == (2, 88, "32-true")
    assert (trainer["max_steps"], trainer["max_epochs"], trainer["gradient_clip_val"]) == (2, -1, 5.0)
    assert capsys.readouterr().err.count("plan (what you give wins") == 1


@pytest.mark.heavy
def test_fit__without_plan_is_as_the_defaults_are(dataset: Path, tmp_path: Path) -> None:
    arguments = [f"--data.root={dataset}", *TINY, "--plan=false", "--trainer.fast_dev_run=true"]
    assert main(["fit", *arguments, f"--trainer.default_root_dir={tmp_path}"]) == 0


def read_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "version_0" / "config.yaml").read_text())
    return found


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("1h30m", 5400), ("90s", 90), ("1.5h", 5400), ("45", 45), (20, 20)]
)
def test_parse_duration__of_hours_minutes_seconds(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0m", "-5m", "5 parsecs"])
def test_parse_duration__refuses(text: str) -> None:
    with pytest.raises(ArgumentError, match="give a duration such as 30m"):
        parse_duration(text)


def test_names__on_command_lines_and_in_files_are_the_same() -> None:
    flags = [
        "--model.lr=1",
        "--model.init_args.optimizer",
        "sgd",
        "--trainer.callbacks+=A",
        "--config=a.yaml",
        "-c",
        "b",
    ]
    assert names_on_command_line(flags) == {"model.lr", "model.optimizer", "trainer.callbacks", "config"}
    content = {"model": {"class_path": "A", "init_args": {"lr": 1}}, "trainer": {"max_steps": 2}, "data": "B"}
    assert names_in_file(content) == {"model.lr", "trainer.max_steps"}
