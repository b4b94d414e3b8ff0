"""Trainings on two processes over gloo: every detector, resuming, signals, divergence, broken images.

One script imports everything once and forks the processes of all trainings from there.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_convnext_det.checkpoints.file import read_checkpoint_file
from lightning_convnext_det.modules.registry import DETECTORS, load_module
from tests.processes import run_script

# what a module needs to be small; a new detector gets its row here
SMALL: dict[str, dict[str, Any]] = {
    "FasterRCNNModule": {
        "fpn_channels": 16, "box_head_features": 16, "rpn_post_nms_top_n": (50, 50),
        "box_batch_size_per_image": 16,
    },
    "CascadeRCNNModule": {
        "fpn_channels": 16, "box_head_features": 16, "rpn_post_nms_top_n": (50, 50),
        "box_batch_size_per_image": 16,
    },
    "DINOModule": {
        "hidden_dim": 64, "num_queries": 12, "num_heads": 2, "feedforward_dim": 16, "encoder_layers": 1,
        "decoder_layers": 2, "denoising_queries": 4,
    },
    "DeformableDETRModule": {
        "hidden_dim": 32, "num_queries": 12, "num_heads": 2, "feedforward_dim": 16, "encoder_layers": 1,
        "decoder_layers": 2,
    },
}  # fmt: skip

SCRIPT = """
import json, logging, os, signal, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
logging.disable(logging.INFO)
import torch
import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning_convnext_det import DetectionDataModule
from lightning_convnext_det.callbacks.best_checkpoint import BestCheckpoint
from lightning_convnext_det.callbacks.prediction_writer import PredictionWriter
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.modules.registry import DETECTORS
from tests.processes import launch

folder, small, wanted = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
write_synthetic_coco(folder / "data", 9, 1, 5)  # one image to validate on: the second process has none
for file in sorted((folder / "data" / "test").iterdir())[3:]:
    file.write_bytes(b"no image")  # all of the second process's share, 2 of 5

class Watch(Callback):
    def __init__(self, rank, kill, nan, number):
        self.rank, self.kill, self.nan, self.number, self.ids = rank, kill, nan, number, []
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.ids.append([t["image_id"] for t in batch[1]])
        if self.kill and self.kill == (self.rank, trainer.global_step):
            os.kill(os.getpid(), self.number)
        if self.nan == (self.rank, trainer.global_step):
            inner = module.detector.forward
            module.detector.forward = lambda *a: {k: v * float("nan") for k, v in inner(*a).items()}

def fit(name, module, epochs=2, checkpoint=None, kill=None, nan=None, slurm=False):
    def run(rank, world_size):
        if slurm:
            del os.environ["TORCHELASTIC_RUN_ID"]
            numbers = {"NTASKS": world_size, "JOB_ID": 7, "LOCALID": rank, "PROCID": rank, "NODEID": 0,
                       "NTASKS_PER_NODE": world_size, "JOB_NAME": "train", "NODELIST": "127.0.0.1"}
            os.environ.update({f"SLURM_{key}": str(value) for key, value in numbers.items()})
            os.environ["PATH"] = f"{folder}/bin:{os.environ['PATH']}"
        torch.set_num_threads(1)
        torch.manual_seed(1)
        data = DetectionDataModule(str(folder / "data"), batch_size=2, num_workers=0)
        model = DETECTORS[module](5, backbone="test_convnext", min_size=64, max_size=96, **small[module])
        watch = Watch(rank, kill, nan, signal.SIGUSR1 if slurm else signal.SIGTERM)
        best = BestCheckpoint(folder / name, filename="best", monitor="val/map", mode="max", save_last=True,
                              enable_version_counter=False)
        trainer = pl.Trainer(accelerator="cpu", devices=world_size, strategy="ddp", max_epochs=epochs, logger=False,
                             enable_progress_bar=False, enable_model_summary=False, callbacks=[watch, best],
                             default_root_dir=folder / name,
                             plugins=[SLURMEnvironment(auto_requeue=True)] if slurm else None)
        try:
            trainer.fit(model, data, ckpt_path=checkpoint)
        finally:
            report = {"ids": watch.ids, "map": float(trainer.callback_metrics.get("val/map", -2))}
            (folder / f"{name}.{rank}.json").write_text(json.dumps(report))
            torch.save(model.state_dict(), folder / f"{name}.{rank}.pt")
    return run

def predict(rank, world_size):
    data = DetectionDataModule(predict=str(folder / "data" / "test"), batch_size=2, num_workers=0)
    model = DETECTORS["FasterRCNNModule"](5, backbone="test_convnext", min_size=64, max_size=96, score_threshold=0.0,
                                        **small["FasterRCNNModule"])
    trainer = pl.Trainer(accelerator="cpu", devices=world_size, strategy="ddp", logger=False,
                         enable_progress_bar=False, callbacks=[PredictionWriter(folder / "predictions", draw=False)])
    trainer.predict(model, data, return_predictions=False)

statuses = {}
def start(name, target):
    statuses[name] = launch(target, 2, folder / f"{name}.log")

first = "FasterRCNNModule"
if "detectors" in wanted:
    for module in DETECTORS:
        start(module, fit(module, module, epochs=1))
    start("predict", predict)
if "resume" in wanted:
    start("whole", fit("whole", first))
    for rank, step in ((0, 1), (1, 4)):
        name = f"signal to {rank}"
        start(name, fit(name, first, kill=(rank, step)))
        start(f"{name}, resumed", fit(f"{name}, resumed", first, checkpoint=str(folder / name / "last.ckpt")))
    start("nan", fit("nan", first, nan=(1, 4)))
if "slurm" in wanted:
    (folder / "bin").mkdir()
    (folder / "bin" / "scontrol").write_text(f'#!/bin/sh\\n(echo "$@"; ls {folder}/slurm) >> {folder}/requests\\n')
    (folder / "bin" / "scontrol").chmod(0o755)
    start("whole", fit("whole", first))
    start("slurm", fit("slurm", first, kill=(1, 1), slurm=True))
    (folder / "left").write_text(" ".join(file.name for file in (folder / "slurm").iterdir()))
    start("again", fit("slurm", first, slurm=True))
print(json.dumps(statuses))
"""


def run(folder: Path, wanted: str) -> dict[str, list[int]]:
    result = run_script(SCRIPT, folder, json.dumps(SMALL), wanted, timeout=900)
    assert result.returncode == 0, result.stderr
    statuses: dict[str, list[int]] = json.loads(result.stdout.splitlines()[-1])
    return statuses


def log(folder: Path, name: str) -> str:
    return "".join(f.read_text() for f in sorted(folder.glob(f"{name}.[0-9]")))


def report(folder: Path, name: str, rank: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text())
    return content


def equal_weights(a: Path, b: Path) -> bool:
    left, right = (torch.load(file, weights_only=True) for file in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("detectors")
    return folder, run(folder, "detectors")


@pytest.fixture(scope="module")
def resume(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("resume")
    return folder, run(folder, "resume")


@pytest.mark.heavy
@pytest.mark.parametrize("module", DETECTORS)
def test_fit__every_detector_on_two_processes(detectors: tuple[Path, dict[str, list[int]]], module: str) -> None:
    folder, statuses = detectors
    assert statuses[module] == [0, 0], log(folder, f"{module}.log")
    assert equal_weights(folder / f"{module}.0.pt", folder / f"{module}.1.pt")
    first, second = (report(folder, module, rank) for rank in (0, 1))
    assert first["map"] == second["map"] >= 0  # the second process had no image to validate on
    seen = [i for one in (first, second) for batch in one["ids"] for i in batch]
    assert sorted(seen) == list(range(1, 10))
    assert load_module(folder / module / "last.ckpt")


@pytest.mark.heavy
def test_predict__a_process_without_a_readable_image(detectors: tuple[Path, dict[str, list[int]]]) -> None:
    folder, statuses = detectors
    assert statuses["predict"] == [0, 0], log(folder, "predict.log")
    records = json.loads((folder / "predictions" / "predictions.json").read_text())
    assert {r["image_id"] for r in records} == {1, 2, 3}
    assert "none of the 2 images of this rank can be read" in (folder / "predict.log.1").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_fit__signal_to_one_process_ends_both_and_the_run_goes_on(
    resume: tuple[Path, dict[str, list[int]]], rank: int
) -> None:
    folder, statuses = resume
    name = f"signal to {rank}"
    assert statuses["whole"] == statuses[f"{name}, resumed"] == [0, 0], log(folder, f"{name}, resumed.log")
    assert statuses[name] == [143, 143], log(folder, f"{name}.log")
    for process in (0, 1):
        whole = report(folder, "whole", process)
        before, after = report(folder, name, process), report(folder, f"{name}, resumed", process)
        assert len(before["ids"]) == (2, 5)[rank]
        assert before["ids"] + after["ids"] == whole["ids"]
        assert after["map"] == whole["map"]
        assert equal_weights(folder / f"{name}, resumed.{process}.pt", folder / f"whole.{process}.pt")


@pytest.mark.slow
def test_fit__divergence_on_one_process_ends_both(resume: tuple[Path, dict[str, list[int]]]) -> None:
    folder, statuses = resume
    assert statuses["nan"] == [4, 4], log(folder, "nan.log")
    for process in (0, 1):
        text = (folder / f"nan.log.{process}").read_text()
        assert "[LCD-N001] loss_" in text
        assert "is nan at epoch 1, step 4, rank 1, images " in text
        assert f"the last checkpoint is {folder / 'nan' / 'last.ckpt'}" in text
    state = read_checkpoint_file(folder / "nan" / "last.ckpt")["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.slow
def test_fit__slurm_requeues_once_and_the_job_goes_on(tmp_path: Path) -> None:
    """One of two ranks gets the signal; the first rank requeues, and both continue without being told from where."""
    statuses = run(tmp_path, "slurm")
    assert statuses["slurm"] == [143, 143], log(tmp_path, "slurm.log")
    assert (tmp_path / "requests").read_text().split() == ["requeue", "7", "hpc_ckpt_1.ckpt", "last.ckpt"]
    assert sorted((tmp_path / "left").read_text().split()) == ["hpc_ckpt_1.ckpt", "last.ckpt"]
    assert statuses["again"] == [0, 0], log(tmp_path, "again.log")
    for rank in (0, 1):
        whole, again = (report(tmp_path, name, rank)["ids"] for name in ("whole", "slurm"))
        assert again == whole[2:]
        assert equal_weights(tmp_path / f"slurm.{rank}.pt", tmp_path / f"whole.{rank}.pt")
    assert not (tmp_path / "slurm" / "hpc_ckpt_1.ckpt").is_symlink()


LOSSES = """
import json, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
import torch
from lightning_convnext_det import DINO
from lightning_convnext_det.models.deformable_detr import denoising
from tests.processes import launch

folder, small = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(5)
images = [torch.rand(3, 64, 96, generator=generator) for _ in range(4)]
targets = [{"boxes": torch.rand(n, 4, generator=generator) * 20 + torch.tensor([0, 0, 30, 30]),
            "labels": torch.randint(5, (n,), generator=generator)} for n in (7, 1, 0, 2)]
draw = denoising.draw_noise

def losses(places):
    torch.manual_seed(0)
    detector = DINO(5, "test_convnext", min_size=64, max_size=96, objects_multiple=8, **small)
    whole = draw(2, denoising.Objects(torch.zeros(4, 8, 4), torch.zeros(4, 8, dtype=torch.int64), [0] * 4), 5)
    denoising.draw_noise = lambda *_: denoising.Noise(*(x[:, places] for x in whole))
    return {name: float(x) for name, x in detector(images[places], targets[places]).items()}

def run(rank, world_size):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    (folder / f"losses.{rank}").write_text(json.dumps(losses(slice(2 * rank, 2 * rank + 2))))

print(json.dumps([launch(run, 2, folder / "log"), losses(slice(4))]))
"""


@pytest.mark.heavy
def test_dino__losses_of_two_ranks_are_those_of_one_with_both_batches(tmp_path: Path) -> None:
    result = run_script(LOSSES, tmp_path, json.dumps(SMALL["DINOModule"]))
    assert result.returncode == 0, result.stderr
    statuses, together = json.loads(result.stdout.splitlines()[-1])
    assert statuses == [0, 0], log(tmp_path, "log")
    ranks = [json.loads((tmp_path / f"losses.{rank}").read_text()) for rank in (0, 1)]  # of 8 and 2 objects
    # gradients are averaged over ranks, and so are the losses that they are of
    assert {name: (ranks[0][name] + ranks[1][name]) / 2 for name in together} == pytest.approx(together, rel=1e-5)
    assert together["loss_box_denoising"] > 0
