"""Checkpoints at fsspec addresses such as ``s3://bucket/best.ckpt``, by way of a local file.

A web server's address is refused: checkpoints come from storage that the user's own credentials open.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]  # 2026.10 has none

from lightning_convnext_det.errors import CheckpointError, first_line

_WEB = ("http", "https", "ftp")


def is_address(path: str | Path) -> bool:
    """Whether a path is an address, not a file of this machine."""
    return "://" in str(path)


@contextmanager
def fetched(address: str) -> Iterator[Path]:
    """A local copy of a remote file, for a while.

    Raises:
        CheckpointError: if it cannot be fetched, or is a web server's.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps files that are mapped
        local = Path(folder, "fetched.ckpt")
        with _errors(address), _open(address, "rb") as source, open(local, "wb") as target:
            shutil.copyfileobj(source, target)
        yield local


def send(local: Path, address: str) -> None:
    """Copy a local file to an address, complete or not at all where its storage can do so.

    Raises:
        CheckpointError: if it cannot be written, or is a web server's.
    """
    with _errors(address):
        system, path = _file_system(address)
        system.makedirs(system._parent(path), exist_ok=True)
        with system.transaction, open(local, "rb") as source, system.open(path, "wb") as target:
            shutil.copyfileobj(source, target)


def remove(address: str) -> None:
    """Remove a remote file if it is there."""
    with _errors(address):
        system, path = _file_system(address)
        if system.exists(path):
            system.rm(path)


def _file_system(address: str) -> tuple[Any, str]:  # fsspec has no types
    protocol = address.partition("://")[0]
    if protocol in _WEB:
        raise CheckpointError(f"[LCD-S010] {address} is on a web server; fetch the file and give its local path")
    system, path = fsspec.core.url_to_fs(address)
    return system, path


def _open(address: str, mode: str) -> Any:
    system, path = _file_system(address)
    return system.open(path, mode)


@contextmanager
def _errors(address: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"[LCD-K001] {address}: no such checkpoint file") from None
    except Exception as error:  # every storage has its own errors
        raise CheckpointError(f"[LCD-K004] {address} cannot be reached: {first_line(error)}") from None
