"""Where the command takes its arguments from: flags, configuration files, the environment, a checkpoint."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_convnext_det.checkpoints.file import read_checkpoint_file
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.cli.trainer import DetectionCLI
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.modules import DeformableDETRModule, FasterRCNNModule
from tests.cli.test_main import QUIET, SMALL

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]
MINE = """
from lightning_convnext_det import DetectionDataModule, FasterRCNNModule as Base
from lightning.pytorch import Callback

class Fixed(Base):
    def __init__(self, width: int = 16) -> None:
        super().__init__(5, backbone="test_convnext", min_size=64, max_size=96, fpn_channels=width)

class Mine(Base):
    def __init__(self, num_classes: int, alpha: float = 0.5, **options) -> None:
        super().__init__(num_classes, **options)
        self.alpha = alpha

class FasterRCNNModule(Base):
    pass

class MyData(DetectionDataModule):
    pass

class Count(Callback):
    calls = []
    def setup(self, trainer, pl_module, stage):
        self.calls.append(stage)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_coco(tmp_path_factory.mktemp("data"), 4, 2, 2)


@pytest.fixture(scope="module")
def checkpoint(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a training of one step."""
    folder = tmp_path_factory.mktemp("runs")
    root = ["--data.root", str(dataset), "--trainer.default_root_dir", str(folder)]
    assert main(["fit", *root, *SMALL, "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]) == 0
    return folder / "version_0" / "checkpoints" / "last.ckpt"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[DetectionCLI]:
    """The commands that were set up; none is run."""
    found: list[DetectionCLI] = []
    monkeypatch.setattr(DetectionCLI, "_run_subcommand", lambda self, _: found.append(self))
    return found


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a file of a user's own classes."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return "mine"


def write(folder: Path, **files: dict[str, Any]) -> list[str]:
    """Write YAML files; the flags that name them, in order."""
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return [f"--config={folder / name}.yaml" for name in files]


DETR = {"hidden_dim": 32, "num_queries": 12, "encoder_layers": 1, "decoder_layers": 1, "backbone": "test_convnext"}
RUN = {"trainer": {"max_epochs": 2}}


@pytest.mark.parametrize(
    "files",
    [
        pytest.param([{"model": {"class_path": "DeformableDETRModule", "init_args": DETR}}, RUN], id="first"),
        pytest.param([RUN, {"model": {"class_path": "DeformableDETRModule", "init_args": DETR}}], id="last"),
        pytest.param([{"model": "DeformableDETRModule"}, {"model": {"init_args": DETR}}], id="split"),
        pytest.param([{"model": "DeformableDETRModule"}, {"model": DETR}], id="without init_args"),
        pytest.param(
            [{"model": "FasterRCNNModule"}, {"model": {"class_path": "DeformableDETRModule", "init_args": DETR}}],
            id="replaced",
        ),
    ],
)
def test_configs__name_the_model_in_any_of_them(
    files: list[dict[str, Any]], dataset: Path, tmp_path: Path, seen: list[DetectionCLI]
) -> None:
    flags = write(tmp_path, **{f"c{i}": content for i, content in enumerate(files)})
    last = ["--model.backbone=test_convnext", "--model.box_refinement=false", f"--data.root={dataset}", *QUIET]
    assert main(["fit", *flags, *last]) == 0
    assert type(seen[0].model) is DeformableDETRModule
    assert seen[0].model.hparams["hidden_dim"] == 32


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("key", ["ckpt_path", "start_from"])
def test_configs__name_the_checkpoint_in_any_of_them(
    key: str, order: int, checkpoint: Path, dataset: Path, tmp_path: Path, seen: list[DetectionCLI]
) -> None:
    flags = write(tmp_path, base={key: str(checkpoint)}, run=RUN)[::order]
    assert main(["fit", *flags, f"--data.root={dataset}", *QUIET]) == 0
    assert seen[0].model.hparams["fpn_channels"] == 16  # the checkpoint's
    assert seen[0].trainer.max_epochs == 2
    kept = read_checkpoint_file(checkpoint)["state_dict"]
    if key == "start_from":
        assert all(torch.equal(kept[name], tensor) for name, tensor in seen[0].model.state_dict().items())


def test_configs__the_checkpoint_of_the_command_line_wins_over_start_from_of_a_file(
    checkpoint: Path, dataset: Path, tmp_path: Path, seen: list[DetectionCLI], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = write(tmp_path, base={"start_from": "gone.ckpt"})
    rest = [f"--data.root={dataset}", *QUIET, f"--ckpt_path={checkpoint}"]
    assert main(["fit", *flags, *rest]) == 0
    assert main(["test", *flags, *rest]) == 0
    assert main(["fit", *flags, *rest[:-1], f"--start_from={checkpoint}"]) == 0  # not the file's, which is gone
    assert seen[2].model.hparams["fpn_channels"] == 16
    assert seen[0].config["fit"]["ckpt_path"] == str(checkpoint)
    assert main(["fit", *rest, f"--start_from={checkpoint}"]) == 2
    assert "--start_from begins the training of a detector" in capsys.readouterr().err


def test_configs__null_in_a_later_file_takes_the_checkpoint_back(
    checkpoint: Path, dataset: Path, tmp_path: Path, seen: list[DetectionCLI]
) -> None:
    flags = write(tmp_path, base={"ckpt_path": str(checkpoint)}, run={"ckpt_path": None})
    assert main(["fit", *flags, f"--data.root={dataset}", *SMALL, "--model.fpn_channels=8"]) == 0
    assert seen[0].model.hparams["fpn_channels"] == 8


def test_configs__a_folders_own_config_is_taken(
    checkpoint: Path, dataset: Path, tmp_path: Path, seen: list[DetectionCLI]
) -> None:
    config = checkpoint.parents[1] / "config.yaml"
    assert main(["fit", f"--config={config}", "--model.lr=0.5"]) == 0
    assert (seen[0].model.hparams["fpn_channels"], seen[0].model.hparams["lr"]) == (16, 0.5)
    assert main(["test", f"--config={config}", f"--ckpt_path={checkpoint}"]) == 0
    assert seen[1].datamodule.num_classes == 5


def test_flags__win_over_files_wherever_they_stand(dataset: Path, tmp_path: Path, seen: list[DetectionCLI]) -> None:
    [flag] = write(tmp_path, c={"model": {"init_args": {"lr": 0.3, "weight_decay": 0.7}}})
    assert main(["fit", "--model.lr=0.5", flag, f"--data.root={dataset}", *SMALL]) == 0
    assert (seen[0].model.hparams["lr"], seen[0].model.hparams["weight_decay"]) == (0.5, 0.7)


@pytest.mark.parametrize("form", ["--model=X", "--model X", "--model.class_path=X"])
@pytest.mark.parametrize("name", ["DeformableDETRModule", "lightning_convnext_det.DeformableDETRModule"])
def test_flags__name_the_model(form: str, name: str, dataset: Path, seen: list[DetectionCLI]) -> None:
    options = [f"--model.{key}={value}" for key, value in DETR.items()]
    assert main(["fit", *options, *form.replace("X", name).split(), f"--data.root={dataset}", *QUIET]) == 0
    assert type(seen[0].model) is DeformableDETRModule
    assert seen[0].model.hparams["hidden_dim"] == 32


def test_environment__counts_where_it_is_switched_on(
    checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[DetectionCLI]
) -> None:
    monkeypatch.setenv("PL_TEST__CKPT_PATH", str(checkpoint))
    arguments = ["test", f"--data.root={dataset}", *QUIET]
    assert main(arguments) == 6  # off by default, as in Lightning
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    assert main(arguments) == 0
    assert seen[0].model.hparams["fpn_channels"] == 16
    assert seen[0].config["test"]["ckpt_path"] == str(checkpoint)


def test_print_config__holds_what_the_checkpoint_says(
    checkpoint: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = write(tmp_path, base={"ckpt_path": str(checkpoint)}, run=RUN)
    with pytest.raises(SystemExit) as caught:
        main(["fit", *flags, f"--data.root={dataset}", "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["fpn_channels"] == 16
    assert printed["trainer"]["max_epochs"] == 2


# ---- classes of a user


@pytest.mark.parametrize("name", ["Mine", "FasterRCNNModule"])
def test_fit__trains_a_users_own_class(name: str, mine: str, dataset: Path, seen: list[DetectionCLI]) -> None:
    arguments = [f"--model={mine}.{name}", f"--data={mine}.MyData", f"--data.root={dataset}", *SMALL]
    assert main(["fit", *arguments, f"--trainer.callbacks+={mine}.Count"]) == 0
    assert (type(seen[0].model).__module__, type(seen[0].model).__name__) == (mine, name)
    assert isinstance(seen[0].model, FasterRCNNModule)
    assert type(seen[0].datamodule).__name__ == "MyData"
    assert seen[0].model.num_classes == 5
    assert [type(c).__name__ for c in seen[0].trainer.callbacks].count("Count") == 1


def test_fit__of_a_users_class_with_arguments_of_its_own(mine: str, dataset: Path, seen: list[DetectionCLI]) -> None:
    arguments = [f"--model={mine}.Fixed", "--model.width=8", f"--data.root={dataset}", *QUIET]
    assert main(["fit", *arguments]) == 0
    assert seen[0].model.hparams["fpn_channels"] == 8


@pytest.mark.heavy
def test_commands__run_a_users_own_class(
    mine: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [f"--model={mine}.Mine", "--trainer.default_root_dir", str(tmp_path), f"--trainer.callbacks+={mine}.Count"]
    data = [f"--data={mine}.MyData", f"--data.root={dataset}"]
    assert main(["fit", *model, *data, *SMALL, "--model.alpha=0.25", "--trainer.max_epochs=1"]) == 0
    trained = f"--ckpt_path={tmp_path / 'version_0' / 'checkpoints' / 'last.ckpt'}"
    for command in ("validate", "test"):
        assert main([command, *model, *data, *QUIET, trained]) == 0
    assert main(["fit", *model, *data, *QUIET, trained, "--trainer.max_epochs=2"]) == 0
    images = [f"--data.predict={dataset / 'test'}", f"--output.folder={tmp_path / 'found'}"]
    assert main(["predict", *model, *images, *QUIET, trained]) == 0
    assert "replaces the checkpoint's" not in capsys.readouterr().err
    config = tmp_path / "version_0" / "config.yaml"
    assert main(["test", f"--config={config}", trained, *QUIET]) == 0
    stages = sys.modules[mine].Count.calls
    assert [stages.count(stage) for stage in ("fit", "validate", "test", "predict")] == [2, 1, 2, 1]


@pytest.mark.parametrize(
    ("argument", "suggestion"),
    [
        ("--model=FasterRCNModule", "FasterRCNNModule"),
        ("--data=DetectionDataModul", "DetectionDataModule"),
        ("--data.train_transforms=multiscal", "multiscale"),
        ("--data.format=coc", "coco"),
        ("--model.optimizer=adam", "adamw"),
        ("--nms=sof", "soft"),
        ("--trainer.precision=bf16mixed", "bf16-mixed"),
        ("--trainer.callbacks+=EarlyStoping", "EarlyStopping"),
        ("--trainer.logger=WandLogger", "WandbLogger"),
    ],
)
def test_fit__misspelt_values_are_suggested(argument: str, suggestion: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--data.root=nowhere", argument])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"; did you mean '{suggestion}'?")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("class Mine(Base)\n    pass", "line 1: expected ':'"),
        ("\nimport not_there", "line 2: ModuleNotFoundError: No module named 'not_there'"),
        ("def f():\n    return {}['x']\n\nf()", "line 2: KeyError: 'x'"),
        ("raise SystemExit(3)", "line 1: SystemExit: 3"),
    ],
    ids=["syntax", "import", "any error", "exit"],
)
def test_fit__a_users_module_that_fails_is_named_with_file_and_line(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"failing_{len(code)}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["fit", "--data.root=nowhere", f"--model={name}.Mine"]) == 2
    assert capsys.readouterr().err == f"error: {name}.Mine cannot be imported: {tmp_path / name}.py, {said}\n"
