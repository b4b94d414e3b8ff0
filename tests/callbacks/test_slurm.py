"""Jobs that SLURM asks to save themselves are requeued by ``scontrol`` and continued (two ranks: test_two_ranks.py)."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_convnext_det import DetectionDataModule
from lightning_convnext_det.callbacks.best_checkpoint import BestCheckpoint
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.modules.detection import Batch
from tests.callbacks.test_run_guard import Strike
from tests.training import create_module, create_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]
JOB = {
    "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0", "SLURM_PROCID": "0",
    "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1",
}  # fmt: skip


class Steps(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        self.steps.append(trainer.global_step)


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a job's ``scontrol`` was called with, and which checkpoints there were at that time."""
    folder, requests = tmp_path / "bin", tmp_path / "requests"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\n(echo "$@"; ls {tmp_path}/run) >> {requests}\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    return requests


def trainer(tmp_path: Path, number: signal.Signals | None, auto_requeue: bool = True) -> Trainer:
    best = BestCheckpoint(tmp_path / "run", "best", "val/map", mode="max", save_last=True, enable_version_counter=False)
    strike = [] if number is None else [Strike(number, "on_train_epoch_start")]
    return create_trainer(
        tmp_path, max_epochs=2, callbacks=[best, *strike], plugins=[SLURMEnvironment(auto_requeue=auto_requeue)]
    )


def test_fit__the_requeue_signal_saves_requeues_and_the_job_goes_on(
    tmp_path: Path, requests: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_synthetic_coco(tmp_path / "data", 6, 2, 1)

    def fit(trainer: Trainer, seed: int) -> tuple[list[int], dict[str, torch.Tensor]]:
        torch.manual_seed(seed)
        module, steps = create_module(5), Steps()
        trainer.callbacks.insert(0, steps)  # type: ignore[attr-defined]
        with suppress(SystemExit):
            trainer.fit(module, DetectionDataModule(str(tmp_path / "data"), batch_size=2, num_workers=0))
        return steps.steps, module.state_dict()

    assert fit(trainer(tmp_path, signal.SIGUSR1), 1)[0] == [0]
    assert requests.read_text().split() == ["requeue", "7", "last.ckpt"]  # after the save
    assert "job 7 is requeued" in caplog.text
    steps, weights = fit(trainer(tmp_path, None), 2)  # without ckpt_path
    assert steps == [1, 2, 3, 4, 5]
    assert not list(tmp_path.glob("hpc_ckpt*"))  # a job that is done leaves nothing to continue from
    whole = fit(create_trainer(tmp_path / "whole", max_epochs=2), 1)[1]
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(("number", "auto_requeue"), [(signal.SIGTERM, True), (signal.SIGUSR1, False)])
def test_fit__other_signals_do_not_requeue(
    loader: DataLoader[Batch], tmp_path: Path, requests: Path, number: signal.Signals, auto_requeue: bool
) -> None:
    with pytest.raises(SystemExit):
        trainer(tmp_path, number, auto_requeue).fit(create_module(), loader, loader)
    assert not requests.exists()
    assert (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}, "job 9_3 is requeued"),
        ({"SLURM_JOB_ID": "7; reboot"}, "not requeued: SLURM_JOB_ID is '7; reboot'"),
        ({"PATH": "/nowhere"}, "job 7 is not requeued: scontrol cannot be run"),
    ],
    ids=["array", "odd", "no scontrol"],
)
def test_fit__what_came_of_requeueing_is_said(
    loader: DataLoader[Batch], tmp_path: Path, requests: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, job: dict[str, str], said: str,
) -> None:  # fmt: skip
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        trainer(tmp_path, signal.SIGUSR1).fit(create_module(), loader, loader)
    assert said in caplog.text
