"""Open files of a dataset, which may contain pipes and devices."""

import errno
import os
from pathlib import Path
from typing import BinaryIO


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading bytes: a pipe would block for ever, a device like /dev/zero never end.

    Raises:
        OSError: if there is no such file, or the path is a folder, a pipe or a device.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        code = errno.EISDIR if os.path.isdir(path) else errno.EINVAL
        raise OSError(code, "Is a directory" if code == errno.EISDIR else "is not a regular file", str(path))
    return open(path, "rb")


def read_text(path: Path) -> str:
    """Read a regular file as UTF-8, with or without a byte order mark.

    Raises:
        OSError: if it cannot be read.
        UnicodeDecodeError: if it is not UTF-8.
    """
    with open_file(path) as file:
        return file.read().decode("utf-8-sig")
