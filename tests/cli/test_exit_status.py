"""The command's exit statuses, by running it; and what wins over what when a training is continued."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from lightning_convnext_det import errors
from lightning_convnext_det.callbacks.divergence import find_non_finite
from lightning_convnext_det.callbacks.run_guard import EXIT_STATUS as TERMINATED
from lightning_convnext_det.checkpoints.file import read_checkpoint_file
from lightning_convnext_det.cli.commands import EXIT_STATUS
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.cli.trainer import DetectionCLI
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.modules import FasterRCNNModule
from tests.cli.test_main import QUIET, SMALL
from tests.processes import run_script

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_coco(tmp_path_factory.mktemp("data"), 12, 3, 3)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training of one epoch."""
    folder = tmp_path_factory.mktemp("runs")
    assert main([*fit(dataset, folder), "--trainer.max_epochs=1"]) == 0
    return folder


def fit(dataset: Path, folder: Path, network: list[str] = SMALL) -> list[str]:
    return ["fit", "--data.root", str(dataset), "--trainer.default_root_dir", str(folder), *network]


def test_exit_status__every_error_of_the_package_is_listed() -> None:
    listed = {int(number) for number in re.findall(r"\d+", EXIT_STATUS)}
    own = {e.exit_status for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.UserError)}
    assert own == {2, 3, 4, 5, 6, 7}
    assert listed == own | {0, 130, TERMINATED}


@pytest.mark.heavy
def test_fit__divergence_is_4_and_what_is_on_disk_is_finite(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hopeless = ["--model.lr=1e30", "--model.warmup_steps=0", "--trainer.max_epochs=3"]
    assert main([*fit(dataset, tmp_path), *hopeless]) == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.match(r"error: \[LCD-N00[12]\] ", lines[0])
    for file in tmp_path.rglob("*.ckpt"):
        assert find_non_finite(read_checkpoint_file(file)["state_dict"]) is None


def test_fit__an_interrupt_is_130(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    monkeypatch.setattr(FasterRCNNModule, "training_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        assert main(fit(dataset, tmp_path)) == 130
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.heavy
def test_fit__sigterm_is_143_and_the_run_goes_on(
    run: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FasterRCNNModule, "on_train_epoch_start", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        main([*fit(dataset, tmp_path), "--trainer.max_epochs=1"])
    assert caught.value.code == 143
    path = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    assert f"continue with --ckpt_path {path}" in caplog.text
    monkeypatch.undo()
    assert main([*fit(dataset, tmp_path, QUIET), "--trainer.max_epochs=1", f"--ckpt_path={path}"]) == 0
    # one epoch, interrupted, is that of the run that was not
    whole, parts = (
        read_checkpoint_file(folder / "checkpoints" / "last.ckpt")["state_dict"]
        for folder in (run / "version_0", tmp_path / "version_1")
    )
    assert [name for name in whole if not (whole[name] == parts[name]).all()] == []


SIGNALS_ITS_GROUP = """
import os, subprocess, sys, time
from lightning_convnext_det.cli.commands import EXIT_STATUS
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.modules import FasterRCNNModule
os.setsid()
step = FasterRCNNModule.training_step
def training_step(self, *arguments):
    # by another process: a worker ends without a word if its own parent sends the signal
    subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"])
    time.sleep(1)  # a worker that dies is noticed within this time
    return step(self, *arguments)
FasterRCNNModule.training_step = training_step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.heavy
def test_fit__sigterm_to_all_processes_with_workers_is_143_too(dataset: Path, tmp_path: Path) -> None:
    arguments = [*fit(dataset, tmp_path), "--data.num_workers=1", "--trainer.max_epochs=1"]
    result = run_script(SIGNALS_ITS_GROUP, *arguments)
    assert result.returncode == 143, result.stderr
    assert "told to stop after step 1 " in result.stderr
    assert (tmp_path / "version_0" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.heavy
def test_fit__a_continued_training_keeps_the_best_checkpoint(run: Path, dataset: Path, tmp_path: Path) -> None:
    earlier = run / "version_0" / "checkpoints"
    # with this learning rate nothing gets better
    worse = ["--trainer.max_epochs=2", "--model.lr=0", "--trainer.limit_val_batches=1"]
    assert main([*fit(dataset, tmp_path, QUIET), *worse, f"--ckpt_path={earlier / 'last.ckpt'}"]) == 0
    later = tmp_path / "version_0" / "checkpoints"
    assert {p.name for p in later.iterdir()} == {"best.ckpt", "last.ckpt"}
    states = [read_checkpoint_file(f / "last.ckpt")["callbacks"] for f in (earlier, later)]
    scores = [float(v["best_model_score"]) for s in states for k, v in s.items() if k.startswith("BestCheckpoint")]
    assert scores[1] >= scores[0]


@pytest.mark.heavy
def test_fit__the_command_line_wins_over_the_configuration_which_wins_over_the_checkpoint(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(DetectionCLI, "_run_subcommand", lambda self, _: seen.append(dict(self.model.hparams)))
    (tmp_path / "c.yaml").write_text(
        "model:\n  class_path: lightning_convnext_det.FasterRCNNModule\n  init_args: {lr: 0.3, weight_decay: 0.7}\n"
    )
    checkpoint = f"--ckpt_path={run / 'version_0' / 'checkpoints' / 'last.ckpt'}"
    arguments = [*fit(dataset, tmp_path, QUIET), checkpoint, f"--config={tmp_path / 'c.yaml'}", "--model.lr=0.5"]
    assert main(arguments) == 0
    assert (seen[0]["lr"], seen[0]["weight_decay"], seen[0]["fpn_channels"]) == (0.5, 0.7, 16)
    announced = [line for line in capsys.readouterr().err.splitlines() if "replaces" in line]
    assert sorted(announced) == [
        "model.lr: 0.5 replaces the checkpoint's 0.0001",
        "model.weight_decay: 0.7 replaces the checkpoint's 0.05",
    ]


@pytest.mark.heavy
def test_predict__predictions_are_not_kept_in_memory(
    run: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    kept = DetectionCLI._prepare_subcommand_kwargs
    monkeypatch.setattr(DetectionCLI, "_run_subcommand", lambda self, name: seen.append(kept(self, name)))
    checkpoint = f"--ckpt_path={run / 'version_0' / 'checkpoints' / 'best.ckpt'}"
    arguments = ["predict", f"--data.predict={dataset / 'test'}", f"--output.folder={tmp_path}", checkpoint, *QUIET]
    assert main(arguments) == 0
    assert main([*arguments, "--return_predictions=true"]) == 0
    assert [options["return_predictions"] for options in seen] == [False, True]
