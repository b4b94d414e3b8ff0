from collections.abc import Sequence
from pathlib import Path

import pytest

from lightning_convnext_det.cli.demo import run_demo
from lightning_convnext_det.errors import DataError


@pytest.mark.parametrize(("epochs", "every"), [(1, 1), (2, 2), (6, 3)])
def test_run_demo__validates_at_least_once_and_hands_failures_on(tmp_path: Path, epochs: int, every: int) -> None:
    commands: list[Sequence[str]] = []

    def run(arguments: Sequence[str]) -> int:
        commands.append(arguments)
        return 7

    folder = tmp_path / "demo"
    assert run_demo(["--folder", str(folder), "--images=2", f"--epochs={epochs}"], run) == 7
    assert len(commands) == 1
    assert {f"--trainer.max_epochs={epochs}", f"--trainer.check_val_every_n_epoch={every}"} <= set(commands[0])


def test_run_demo__takes_steps_unless_epochs_are_given(tmp_path: Path) -> None:
    commands: list[Sequence[str]] = []

    def run(arguments: Sequence[str]) -> int:
        commands.append(arguments)
        return 7

    assert run_demo(["--folder", str(tmp_path / "demo"), "--images=2", "--steps=5"], run) == 7
    assert "--trainer.max_steps=5" in commands[0]
    assert not [argument for argument in commands[0] if "max_epochs" in argument]


def test_run_demo__leaves_a_foreign_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("my only copy")
    with pytest.raises(DataError, match="LCD-D010"):
        run_demo(["--folder", str(tmp_path)], lambda arguments: 0)
    assert (tmp_path / "thesis.txt").exists()
