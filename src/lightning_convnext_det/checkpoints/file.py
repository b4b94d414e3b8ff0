"""Checkpoint files that are complete or absent, and that are read only if they hold the bytes that were written.

A file is what ``torch.save`` writes, a zip archive, with the SHA-256 of all bytes before it as the archive's comment.
So any program that reads torch's files reads these. Lightning 2.6 writes to ``$TMPDIR`` and copies, which leaves half a
file where that is another file system; here the bytes go into a file beside the target, which then takes its name.
"""

import errno
import hashlib
import os
import shutil
import socket
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from lightning.fabric.plugins.io import CheckpointIO

from lightning_convnext_det.checkpoints import remote
from lightning_convnext_det.checkpoints.content import readable
from lightning_convnext_det.checkpoints.torch_files import find_archive_fault, find_fault, is_archive, load_checked
from lightning_convnext_det.errors import CheckpointError, first_line

_MARK = b"lightning_convnext_det sha256 "
_COMMENT_LENGTH = len(_MARK) + 64
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STALE = 24 * 3600.0  # seconds after which another machine's temporary file is taken to be abandoned


class AtomicCheckpointIO(CheckpointIO):
    """Writes and reads a trainer's checkpoints by this file's functions; our modules bring it into their trainers."""

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: object | None = None
    ) -> None:
        """Write a checkpoint; see `write_checkpoint_file`."""
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options")
        write_checkpoint_file(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: object | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU, never running code in it; see `read_checkpoint_file`."""
        content = read_checkpoint_file(path)
        if not isinstance(content, dict):
            raise CheckpointError(f"[LCD-K001] {path} is not a checkpoint: it holds a {type(content).__name__}")
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint if it is there."""
        if remote.is_address(path):
            remote.remove(str(path))
        else:
            Path(path).unlink(missing_ok=True)


def write_checkpoint_file(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint that can be read again; whatever interrupts it, the file is the whole new one or the old one.

    Args:
        content: tensors and plain data; NumPy's numbers and paths become plain.
        path: a local file or an fsspec address such as ``s3://bucket/a.ckpt``.

    Raises:
        CheckpointError: if the file cannot be written, for want of space for example; the old one is kept. Or if
            something in it could not be read again.
    """
    content = readable(dict(content))
    if remote.is_address(path):
        with tempfile.TemporaryDirectory() as folder:
            _write(content, Path(folder, "sent.ckpt"))
            remote.send(Path(folder, "sent.ckpt"), str(path))
    else:
        _write(content, Path(path))


def _write(content: Mapping[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    size = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        with open(temporary, "wb") as file:
            writer = _HashingWriter(file)
            try:
                torch.save(content, cast(IO[bytes], writer))
            finally:
                size = writer.size
                if writer.error is not None:  # torch's own error about it says "unexpected pos"
                    raise writer.error
            _seal(file, writer.digest.hexdigest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        _discard(temporary)
        raise CheckpointError(_reason_not_written(path, error, size)) from None
    except BaseException:
        _discard(temporary)
        raise


# a checkpoint is any plain data; its readers check what they use
def read_checkpoint_file(path: str | Path) -> Any:
    """Read a checkpoint to the CPU without running code in it; it is hashed once.

    Args:
        path: a local file or an fsspec address, but for a web server's.

    Raises:
        CheckpointError: if it is missing, damaged, or holds more than tensors and plain data.
    """
    if remote.is_address(path):
        with remote.fetched(str(path)) as local:
            return _read(local, str(path), lambda _: "")
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"[LCD-K001] {path}: no such checkpoint file{_instead_of(path)}")
    return _read(path, str(path), _instead_of)


def _read(path: Path, name: str, instead: Callable[[Path], str]) -> Any:
    try:
        with open(path, "rb") as file:
            if damage := _damage(file):
                raise CheckpointError(f"[LCD-K003] {name} is damaged: {damage}{instead(path)}")
            if fault := find_fault(file):
                raise ValueError(fault)
            archived = is_archive(file)
        return load_checked(path, archived)
    except CheckpointError:
        raise
    except Exception as error:  # a crafted file makes the reader raise almost anything
        raise CheckpointError(f"[LCD-K001] {name} is not a checkpoint of this package: {first_line(error)}") from None


def find_damage(path: Path) -> str | None:
    """Say how a file differs from the one that was written; None if it does not.

    A file without this package's SHA-256, written by a trainer without `AtomicCheckpointIO`, is held to the CRC-32 that
    torch has stored of each record. A file that is not a zip archive is left to torch to judge.
    """
    try:
        with open(path, "rb") as file:
            return _damage(file)
    except OSError as error:
        return first_line(error)


def _damage(file: BinaryIO) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            if fault := find_archive_fault(archive, file):
                return fault
            if not archive.comment.startswith(_MARK):
                record = archive.testzip()
                return None if record is None else f"the CRC-32 of its record {record} is wrong"
            recorded = archive.comment[len(_MARK) :]
        return None if _digest(file).encode() == recorded else "its SHA-256 is not the one it was written with"
    except zipfile.BadZipFile as error:
        return first_line(error) if _begins_as_archive(file) else None
    except (OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return first_line(error)


def newest_intact(folder: Path, but: Path | None = None) -> Path | None:
    """The newest intact checkpoint of a folder; None if there is none."""
    files = [file for file in folder.glob("*.ckpt") if file != but and file.is_file()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        if zipfile.is_zipfile(file) and find_damage(file) is None:
            return file
    return None


class _HashingWriter:
    """A file for ``torch.save`` that keeps the SHA-256 of what it has taken, and the error that ended it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None
        self.size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        if self.error is None:
            try:
                self.file.write(data)
                self.digest.update(data)
            except OSError as error:
                self.error = error  # raised later: torch's writer cannot pass it on
        return len(data)

    def flush(self) -> None:
        if self.error is None:
            try:
                self.file.flush()
            except OSError as error:
                self.error = error


def _seal(file: BinaryIO, digest: str) -> None:
    """Append the digest as the archive's comment, whose length is the archive's last two bytes."""
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT_LENGTH.to_bytes(2, "little") + _MARK + digest.encode())


def _digest(file: BinaryIO) -> str:
    """SHA-256 of a sealed file as it was before it was sealed."""
    left = file.seek(0, os.SEEK_END) - _COMMENT_LENGTH - 2
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (block := file.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    digest.update(b"\0\0" if file.read(2) == _COMMENT_LENGTH.to_bytes(2, "little") else b"")
    return digest.hexdigest()


def _begins_as_archive(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(2) == b"PK"


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power failure, where folders can be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(file: Path) -> None:
    with suppress(OSError):
        file.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote this file."""
    host = socket.gethostname()
    for file in path.parent.glob(f".{path.name}.*.tmp"):
        name, _, process = file.name[len(path.name) + 2 : -len(".tmp")].rpartition("-")
        abandoned = not _is_running(int(process)) if name == host and process.isdigit() else False
        with suppress(OSError):  # another process may have removed it
            if abandoned or time.time() - file.stat().st_mtime > _STALE:
                _discard(file)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _reason_not_written(path: Path, error: OSError, size: int) -> str:
    if error.errno in _NO_SPACE:
        free = _free_space(path.parent)
        return (
            f"[LCD-K002] no space for {path}: it needs {max(1, size >> 20)} MB, {free >> 20} MB are free; "
            "the file that was there is kept"
        )
    return f"[LCD-K002] {path} cannot be written ({error.strerror or error}); the file that was there is kept"


def _free_space(folder: Path) -> int:
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _instead_of(path: Path) -> str:
    intact = newest_intact(path.parent, but=path) if path.parent.is_dir() else None
    return f"; the last intact one is {intact}" if intact else ""
