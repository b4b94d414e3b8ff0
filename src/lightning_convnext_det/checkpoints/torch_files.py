"""Reading of files that ``torch.save`` wrote, or somebody who wants more than to be read.

``weights_only`` keeps their code from running, but torch trusts them about sizes: a kilobyte can ask for tensors of
many gigabytes, and torch 2.9 reads beyond the end of a record that is shorter than the file says.
"""

import mmap
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

# what torch's reader would call with any size that the file declares, for tensors that no network of ours has
_OF_ANY_SIZE = (
    b"_rebuild_device_tensor",
    b"_rebuild_meta_tensor",
    b"_rebuild_qtensor",
    b"_rebuild_sparse_tensor",
    b"_rebuild_wrapper_subclass",
    b"bytearray\n",
)
_NOT_PLAIN = "it holds tensors that are not plain; save them from the CPU"


# such a file holds any plain data; its readers check what they use
def load_plain(path: Path) -> Any:
    """Read tensors and plain data to the CPU, running no code and taking no more memory than the file is long.

    The tensors are views of the file, private to this process, until they are copied into a network.

    Raises:
        ValueError: if the file is an archive that torch would not write, or asks for what it does not hold.
        Exception: almost anything that torch's reader raises on a damaged file.
    """
    with open(path, "rb") as file:
        if fault := find_fault(file):
            raise ValueError(fault)
        archived = is_archive(file)
    return load_checked(path, archived)


def load_checked(path: Path, archived: bool) -> Any:
    """Read a file in which `find_fault` has found nothing; see `load_plain`."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archived)
    except pickle.UnpicklingError as error:  # torch's text begins with how to run the code nevertheless
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is not None:
            reason = f"it holds {named[1]}, which is neither a tensor nor plain data"
        else:
            reason = str(error).partition("Check the documentation")[0].rpartition("\n\n")[0].strip().splitlines()[-1]
        raise pickle.UnpicklingError(reason) from None


def find_fault(file: BinaryIO) -> str | None:
    """Say what shows that torch has not written a file, or that it may grow when it is read; None if nothing."""
    if not os.fstat(file.fileno()).st_size:
        return "it is empty"
    if is_archive(file):
        with zipfile.ZipFile(file) as archive:
            if fault := find_archive_fault(archive, file):
                return fault  # before anything is unpacked
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return _NOT_PLAIN if any(_asks_for_any_size(archive.read(name)) for name in names) else None
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _NOT_PLAIN if _asks_for_any_size(content) else None


def is_archive(file: BinaryIO) -> bool:
    """Whether torch takes a file for a zip archive."""
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"


def find_archive_fault(archive: zipfile.ZipFile, file: BinaryIO) -> str | None:
    """Say what shows that torch has not written an archive; None if nothing."""
    records = archive.infolist()
    if any(record.file_size > record.compress_size for record in records):
        return "it is compressed, which torch never does"
    if sum(record.file_size for record in records) > os.fstat(file.fileno()).st_size:
        return "its records overlap, which torch never does"
    return None


def _asks_for_any_size(content: bytes | mmap.mmap) -> bool:
    return any(content.find(name) >= 0 for name in _OF_ANY_SIZE)
