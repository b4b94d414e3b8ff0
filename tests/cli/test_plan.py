import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from lightning_convnext_det.cli import planning
from lightning_convnext_det.cli.given import names_in_file, names_on_command_line, parse_duration
from lightning_convnext_det.cli.kept_plan import KeptPlan, read_kept_plan
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.modules.faster_rcnn import FasterRCNNModule
from lightning_convnext_det.modules.registry import save_module
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


@pytest.mark.parametrize("flag", ["--plan=false", "--ckpt_path=last"])
def test_plan__never_trains(flag: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--data.root={dataset}", *TINY, flag, f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    assert main(["plan", *arguments, "--trainer.max_steps=1"]) == 2
    assert "there is no plan for these arguments" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_plan__takes_what_files_of_a_group_give(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "trainer.yaml").write_text("max_steps: 70\n")
    given = json.dumps({"class_path": "DetectionDataModule", "init_args": {"root": str(dataset), "batch_size": 8}})
    assert main(["plan", *TINY, f"--trainer={tmp_path / 'trainer.yaml'}", f"--data={given}"]) == 0
    rows = {words[1]: words[3:6] for line in capsys.readouterr().err.splitlines() if len(words := line.split()) > 4}
    assert rows["trainer.max_steps"] == ["70", "│", "given"]
    assert rows["data.batch_size"] == ["8", "│", "given"]


def test_plan__what_the_detector_refuses_ends_in_one_line(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(dataset), *TINY, "--model.max_size=0"]) == 2
    assert "max_size is 0; it must be at least 1" in capsys.readouterr().err


def test_plan__of_a_detector_to_start_from_has_its_network(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    module = FasterRCNNModule(2, ["cat", "dog"], backbone="test_convnext", min_size=72, max_size=96)
    save_module(module, tmp_path / "a.ckpt")
    assert main(["plan", str(dataset), f"--start_from={tmp_path / 'a.ckpt'}"]) == 0
    rows = {words[1]: words[3:6] for line in capsys.readouterr().err.splitlines() if len(words := line.split()) > 4}
    assert rows["model.min_size"] == ["72", "│", "given"]


def test_plan__of_a_dataset_without_objects_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_synthetic_coco(tmp_path / "empty", 4, 2)
    for path in root.rglob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    assert main(["plan", str(root), *TINY]) != 0
    assert "have no boxes to learn from" in capsys.readouterr().err


KEPT = {"data.batch_size": 2, "trainer.max_steps": 3000, "trainer.max_epochs": -1, "trainer.val_check_interval": 150}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, KEPT),
        ({"data.batch_size": 8, "model.lr": 0.1}, {**KEPT, "data.batch_size": 8}),
        (
            {"trainer.max_epochs": 5},
            {"data.batch_size": 2, "trainer.max_epochs": 5, "trainer.val_check_interval": 150},
        ),
        ({"time": 60.0}, {k: v for k, v in {**KEPT, "time": 60.0}.items() if k != "trainer.max_steps"}),
        ({"trainer.max_steps": 9}, {**KEPT, "trainer.max_steps": 9}),
        (
            {"trainer.check_val_every_n_epoch": 3},
            {**{k: v for k, v in KEPT.items() if "val" not in k}, "trainer.check_val_every_n_epoch": 3},
        ),
    ],
)
def test_read_kept_plan__what_is_given_wins(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_kept_plan({"callbacks": {"KeptPlan": KeptPlan(KEPT).state_dict()}}, given) == expected


def test_read_kept_plan__a_wanted_time_goes_on_unless_another_length_is_given() -> None:
    content = {"callbacks": {"KeptPlan": {"time": 60.0, "trainer.max_epochs": -1}}}
    assert read_kept_plan(content, {}) == {"time": 60.0, "trainer.max_epochs": -1}
    assert read_kept_plan(content, {"trainer.max_epochs": 2}) == {"trainer.max_epochs": 2}


def test_read_kept_plan__of_a_file_that_anyone_may_have_written_takes_known_numbers_and_words_only() -> None:
    hostile = {
        "data.train_transforms": "os.system",
        "data.root": "/",
        "trainer.precision": {"class_path": "os.system"},
        "trainer.callbacks": ["os.system"],
        "trainer.max_steps": "7",
        "data.batch_size": 2,
    }
    assert read_kept_plan({"callbacks": {"KeptPlan": hostile}}, {}) == {"data.batch_size": 2}
    for content in ({}, {"callbacks": 3}, {"callbacks": {"KeptPlan": [1]}}):
        assert read_kept_plan(content, {"data.batch_size": 2}) == {}


@pytest.mark.heavy
def test_fit__continues_by_the_plan_of_its_first_part(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--data.root={dataset}", *TINY, f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", *arguments, "--trainer.max_steps=2", "--data.batch_size=3"]) == 0
    last = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    assert main(["fit", *arguments, f"--ckpt_path={last}", "--trainer.max_steps=3"]) == 0
    first, second = (read_config(tmp_path, version) for version in (0, 1))
    assert second["data"] == first["data"]
    assert second["trainer"] == {**first["trainer"], "max_steps": 3}
    assert second["data"]["init_args"]["batch_size"] == 3
    assert "the plan of the checkpoint: data.batch_size 3" in capsys.readouterr().err


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


def read_config(folder: Path, version: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / f"version_{version}" / "config.yaml").read_text())
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


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("lightning_convnext_det.DetectionDataModule", True),
        ("lightning_convnext_det.data.datamodule.DetectionDataModule", True),
        ("mine.DetectionDataModule", False),
        ("lightning_convnext_det.ImageFolderDataModule", False),
    ],
)
def test_has_own_data__not_a_users_class_of_the_same_name(path: str, expected: bool) -> None:
    assert planning.has_own_data(Namespace(data=Namespace(class_path=path))) is expected
