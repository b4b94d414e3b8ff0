"""Archives that torch would not have written, made to fill the memory or to be read beyond their end."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_convnext_det.checkpoints.build_module import read_checkpoint
from lightning_convnext_det.checkpoints.torch_files import load_plain
from lightning_convnext_det.convert.importer import import_weights
from lightning_convnext_det.errors import CheckpointError, WeightsError
from lightning_convnext_det.models.backbone_weights import read_state_dict
from lightning_convnext_det.modules.registry import MODULES
from tests.processes import run_script

READERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": lambda path: read_checkpoint(path, MODULES),
    "weights": read_state_dict,
    "import": import_weights,
}
LARGE = 10**11  # numbers: more than any memory here


class _Call:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def rewrite(source: Path, path: Path, change: Callable[[str, bytes], bytes], times: int = 1) -> None:
    """Copy an archive, changing its records; ``times`` their number, all of the same bytes of the file."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        records = list(new.filelist)
        for copy in range(1, times):
            for record in records:
                twin = zipfile.ZipInfo(f"{record.filename}.{copy}")
                for field in ("header_offset", "CRC", "compress_size", "file_size", "external_attr", "create_system"):
                    setattr(twin, field, getattr(record, field))
                new.filelist.append(twin)


def claims(path: Path) -> None:
    """A tensor of 100 numbers that says it has 100 million: torch 2.9 reads beyond them and is ended by a signal."""
    torch.save({"a": torch.zeros(100)}, path.with_suffix(".good"))
    rewrite(path.with_suffix(".good"), path, lambda _, data: data.replace(b"Kd", b"J" + (10**8).to_bytes(4, "little")))


def overlaps(path: Path) -> None:
    torch.save({"a": torch.zeros(10_000)}, path.with_suffix(".good"))
    rewrite(path.with_suffix(".good"), path, lambda _, data: data, times=3)


def converts(path: Path) -> None:
    one = torch.zeros(1).expand(LARGE)
    call = _Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, one, torch.float64, "cpu", False)
    torch.save({"a": call}, path)


def fills(path: Path) -> None:
    torch.save({"a": _Call(bytearray, LARGE)}, path)


def is_sparse(path: Path) -> None:
    torch.save(
        {
            "a": torch.sparse_coo_tensor(
                torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (LARGE,), check_invariants=True
            )
        },
        path,
    )


def is_empty(path: Path) -> None:
    path.write_bytes(b"")


FILES = {
    "claims": (claims, "resize storage|does not match expected size"),
    "overlaps": (overlaps, "its records overlap, which torch never does"),
    "converts": (converts, "it holds tensors that are not plain; save them from the CPU"),
    "fills": (fills, "it holds tensors that are not plain"),
    "sparse": (is_sparse, "it holds tensors that are not plain"),
    "empty": (is_empty, "it is empty"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("file", FILES)
def test_readers__what_torch_would_not_have_written(tmp_path: Path, reader: str, file: str) -> None:
    write, reason = FILES[file]
    write(tmp_path / "a.ckpt")
    with pytest.raises((CheckpointError, WeightsError), match=rf"^\[LCD-[A-Z]\d+\] \S*a\.ckpt .*({reason})") as caught:
        READERS[reader](tmp_path / "a.ckpt")
    assert "\n" not in str(caught.value)


def test_load_plain__the_old_format(tmp_path: Path) -> None:
    for content in ({"a": torch.arange(5)}, {"a": _Call(bytearray, LARGE)}):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        if isinstance(content["a"], torch.Tensor):
            assert torch.equal(load_plain(tmp_path / "a.pth")["a"], torch.arange(5))
        else:
            with pytest.raises(ValueError, match="not plain"):
                load_plain(tmp_path / "a.pth")


def test_load_plain__tensors_can_be_changed_and_the_file_is_not(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(5)}, tmp_path / "a.pth")
    content: dict[str, Any] = load_plain(tmp_path / "a.pth")
    content["a"] += 1
    assert content["a"].tolist() == [1, 2, 3, 4, 5]
    assert load_plain(tmp_path / "a.pth")["a"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.heavy
def test_load_plain__memory_is_bounded_by_the_file(tmp_path: Path) -> None:
    """A gigabyte of numbers out of a file of a kilobyte, read by torch's reader and by ours."""
    call = _Call(
        torch._utils._rebuild_device_tensor_from_cpu_tensor, torch.zeros(1).expand(2**27), torch.float64, "cpu", False
    )
    torch.save({"a": call}, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 3000
    script = """
import sys, pathlib, torch
from lightning_convnext_det.checkpoints.torch_files import load_plain
from lightning_convnext_det.modules.registry import MODULES
from tests.processes import forget_peak, peak_megabytes
read = {"ours": load_plain, "torch": lambda path: torch.load(path, weights_only=True)}[sys.argv[1]]
forget_peak()
before = peak_megabytes()
try:
    read(pathlib.Path(sys.argv[2]))
except ValueError:
    pass
print(peak_megabytes() - before)
"""
    grown = {reader: int(run_script(script, reader, tmp_path / "a.pth").stdout) for reader in ("ours", "torch")}
    assert grown["ours"] < 100
    assert grown["torch"] > 900  # the trap works
