import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_convnext_det.checkpoints.file import (
    AtomicCheckpointIO,
    find_damage,
    newest_intact,
    read_checkpoint_file,
    write_checkpoint_file,
)
from lightning_convnext_det.errors import CheckpointError
from tests.processes import run_script


def content(value: float = 1.0, size: int = 1000) -> dict[str, object]:
    return {"state_dict": {"a": torch.full((size,), value)}, "epoch": 3, "names": ["x", None]}


def test_write_checkpoint_file__torch_reads_it(tmp_path: Path) -> None:
    write_checkpoint_file(content(), tmp_path / "new" / "a.ckpt")
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "new" / "a.ckpt", weights_only=True, mmap=mmap)
        assert torch.equal(loaded["state_dict"]["a"], torch.ones(1000))
    assert read_checkpoint_file(tmp_path / "new" / "a.ckpt")["names"] == ["x", None]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.ckpt"]


@pytest.mark.heavy
def test_find_damage__every_changed_byte_and_every_missing_end(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint_file(content(size=8), path)
    raw = path.read_bytes()
    mark = b"lightning_convnext_det sha256 "
    seal = raw.index(mark)
    unnoticed = set()
    for position in range(len(raw)):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        if find_damage(path) is None:
            unnoticed.add(position)
    # without the mark the CRC-32 of each record is checked instead, and what was saved is as it was
    assert unnoticed <= set(range(seal, seal + len(mark)))
    for length in range(3, seal, 7):
        path.write_bytes(raw[:length])
        assert find_damage(path), length
        with pytest.raises(CheckpointError, match=r"LCD-K003.*a\.ckpt is damaged"):
            read_checkpoint_file(path)


def test_read_checkpoint_file__damage_names_the_last_intact_one(tmp_path: Path) -> None:
    for age, name in enumerate(["last.ckpt", "best.ckpt", "older.ckpt", "half.ckpt"]):
        write_checkpoint_file(content(), tmp_path / name)
        os.utime(tmp_path / name, (time.time() - 60 * age,) * 2)
    os.truncate(tmp_path / "half.ckpt", 900)
    raw = bytearray((tmp_path / "last.ckpt").read_bytes())
    raw[len(raw) // 2] ^= 16
    (tmp_path / "last.ckpt").write_bytes(raw)
    with pytest.raises(
        CheckpointError, match=r"LCD-K003.*last\.ckpt is damaged: its SHA-256.*intact one is .*best\.ckpt"
    ):
        read_checkpoint_file(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"half\.ckpt is damaged: .*intact one is .*best\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(CheckpointError, match=r"no such checkpoint file; the last intact one is .*best\.ckpt"):
        read_checkpoint_file(tmp_path / "gone.ckpt")
    assert newest_intact(tmp_path) == tmp_path / "best.ckpt"


def test_find_damage__a_file_that_torch_wrote(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "a.ckpt")
    assert find_damage(tmp_path / "a.ckpt") is None
    raw = bytearray((tmp_path / "a.ckpt").read_bytes())
    raw[len(raw) // 2] ^= 1  # torch itself loads this
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    (tmp_path / "a.ckpt").write_bytes(raw)
    assert "CRC-32" in str(find_damage(tmp_path / "a.ckpt"))


def test_find_damage__compressed_records(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(CheckpointError, match="it is compressed, which torch never does"):
        read_checkpoint_file(tmp_path / "a.ckpt")


def test_write_checkpoint_file__a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")  # where a folder should be
    with pytest.raises(CheckpointError, match=r"LCD-K002.*a\.ckpt cannot be written"):
        write_checkpoint_file(content(), tmp_path / "file" / "a.ckpt")


def test_write_checkpoint_file__what_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    write_checkpoint_file(content(), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"LCD-K019\] b is a function"):
        write_checkpoint_file({"a": torch.zeros(9), "b": lambda: None}, tmp_path / "a.ckpt")
    assert read_checkpoint_file(tmp_path / "a.ckpt")["epoch"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.heavy
def test_write_checkpoint_file__full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    # a limit on the size of files ends a write as a full disk does: with an OSError half way
    script = """
import resource, signal, sys
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.checkpoints.file import write_checkpoint_file
import torch
write_checkpoint_file({"a": torch.ones(1000)}, sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
try:
    write_checkpoint_file({"a": torch.ones(2_000_000)}, sys.argv[1])
except CheckpointError as error:
    print(error)
"""
    path = tmp_path / "a.ckpt"
    run = run_script(script, path)
    assert f"[LCD-K002] no space for {path}: it needs 7 MB, " in run.stdout, run.stderr
    assert torch.equal(read_checkpoint_file(path)["a"], torch.ones(1000))
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_write_checkpoint_file__sweeps_what_killed_processes_left(tmp_path: Path) -> None:
    import socket

    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    host = socket.gethostname()
    dead, alive, elsewhere, old = (
        tmp_path / f".a.ckpt.{name}.tmp"
        for name in (f"{host}-{int(gone.stdout)}", f"{host}-{os.getppid()}", "other-1", "other-2")
    )
    for file in (dead, alive, elsewhere, old):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    write_checkpoint_file(content(), tmp_path / "a.ckpt")
    assert {p for p in (dead, alive, elsewhere, old) if p.exists()} == {alive, elsewhere}


KILLED = """
import os, random, signal, sys, time
import torch
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.checkpoints.file import read_checkpoint_file, write_checkpoint_file
path, kills, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
generator = random.Random(int(sys.argv[4]))
write_checkpoint_file({"a": torch.zeros(size)}, path)
began = time.perf_counter()
write_checkpoint_file({"a": torch.zeros(size)}, path)
lasts = time.perf_counter() - began
half = values = kill = 0
while kill < kills or (half == 0 and kill < 100):  # on a busy machine the first few may all miss a write
    child = os.fork()
    if child == 0:
        for i in range(10_000):
            write_checkpoint_file({"a": torch.full((size,), float(kill * 10_000 + i))}, path)
        os._exit(0)
    time.sleep(generator.uniform(0.2, 2.2) * lasts)
    half += any(name.endswith(".tmp") for name in os.listdir(os.path.dirname(path)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = read_checkpoint_file(path)["a"]
    assert loaded.shape == (size,) and (loaded == loaded[0]).all(), "half a checkpoint"
    values += float(loaded[0]) >= kill * 10_000
    kill += 1
print(kill, half, values, round(lasts, 3))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_write_checkpoint_file__killed_at_random_instants(tmp_path: Path, kills: int) -> None:
    other = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path  # TMPDIR on another file system
    size = 1_000_000 if kills < 20 else 10_000_000
    run = run_script(KILLED, tmp_path / "last.ckpt", kills, size, kills, timeout=300, TMPDIR=str(other))
    assert run.returncode == 0, run.stderr
    done, half, _, _ = run.stdout.split()
    assert int(done) >= kills
    assert int(half) > 0  # some were killed while they wrote
    # only the last process killed may have left something behind
    assert len(list(tmp_path.glob(".*.tmp"))) <= 1
    assert read_checkpoint_file(tmp_path / "last.ckpt")["a"].shape == (size,)
