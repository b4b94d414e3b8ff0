"""Checkpoints at fsspec addresses, as Lightning reads and writes them."""

from collections.abc import Iterator
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_convnext_det import Predictor
from lightning_convnext_det.callbacks.best_checkpoint import BestCheckpoint
from lightning_convnext_det.checkpoints.file import AtomicCheckpointIO, read_checkpoint_file, write_checkpoint_file
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.modules import FasterRCNNModule, load_module
from lightning_convnext_det.modules.detection import Batch
from tests.training import create_module, create_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


def test_fit__writes_to_an_address_and_goes_on_from_there(loader: DataLoader[Batch], tmp_path: Path) -> None:
    trainer = create_trainer(tmp_path, callbacks=[ModelCheckpoint("memory://runs/a", "last")])
    trainer.fit(create_module(), loader)
    trainer.save_checkpoint("memory://runs/b.ckpt")
    assert fsspec.filesystem("memory").find("/runs") == ["/runs/a/last.ckpt", "/runs/b.ckpt"]
    assert not list(tmp_path.rglob("*.ckpt"))
    again = create_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    again.fit(create_module(), loader, ckpt_path="memory://runs/b.ckpt")
    assert again.global_step == 6
    for load in (load_module, FasterRCNNModule.load_from_checkpoint):
        assert load("memory://runs/a/last.ckpt").num_classes == 2
    assert Predictor.from_checkpoint("memory://runs/a/last.ckpt", device="cpu")


def test_fit__best_checkpoint_at_an_address(loader: DataLoader[Batch], tmp_path: Path) -> None:
    best = BestCheckpoint("memory://runs/c", "best", "val/map", mode="max", save_last=True)
    create_trainer(tmp_path, max_epochs=2, callbacks=[best]).fit(create_module(), loader, loader)
    assert {file.rpartition("/")[2] for file in fsspec.filesystem("memory").find("/runs/c")} >= {"last.ckpt"}
    assert read_checkpoint_file(best.last_model_path)["epoch"] == 1


def test_write_checkpoint_file__damage_at_an_address_is_found(tmp_path: Path) -> None:
    write_checkpoint_file({"a": torch.ones(9)}, "memory://runs/d.ckpt")
    assert torch.equal(read_checkpoint_file("memory://runs/d.ckpt")["a"], torch.ones(9))
    system = fsspec.filesystem("memory")
    raw = bytearray(system.cat("/runs/d.ckpt"))
    raw[len(raw) // 2] ^= 1
    system.pipe("/runs/d.ckpt", bytes(raw))
    with pytest.raises(CheckpointError, match=r"LCD-K003\] memory://runs/d.ckpt is damaged: its SHA-256"):
        read_checkpoint_file("memory://runs/d.ckpt")
    AtomicCheckpointIO().remove_checkpoint("memory://runs/d.ckpt")
    AtomicCheckpointIO().remove_checkpoint("memory://runs/d.ckpt")
    with pytest.raises(CheckpointError, match=r"LCD-K001\] memory://runs/d.ckpt: no such checkpoint file"):
        read_checkpoint_file("memory://runs/d.ckpt")


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/a.ckpt", "https://127.0.0.1:1/a.ckpt", "ftp://127.0.0.1/a.ckpt"]
)
def test_checkpoint_file__web_servers_are_refused(address: str) -> None:
    for use in (read_checkpoint_file, lambda a: write_checkpoint_file({}, a)):
        with pytest.raises(CheckpointError, match=r"LCD-S010\] \S+ is on a web server; fetch the file"):
            use(address)


def test_checkpoint_file__a_storage_that_is_not_known() -> None:
    with pytest.raises(CheckpointError, match=r"LCD-K004\] nowhere://a.ckpt cannot be reached: .*nowhere"):
        read_checkpoint_file("nowhere://a.ckpt")
