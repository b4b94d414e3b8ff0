"""Opening of a dataset's files, among which may be a pipe that nobody writes to, or a device without an end."""

import errno
import os
import stat
from pathlib import Path


def regular(path: str | Path, flags: int) -> int:
    """What ``open`` takes as ``opener`` so that it opens nothing but regular files, and waits for nobody.

    Raises:
        OSError: if the path leads to anything else.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    code = errno.EISDIR if os.path.isdir(path) else errno.EINVAL
    raise OSError(code, "Is a directory" if code == errno.EISDIR else "is no regular file", str(path))


def read_text(path: Path) -> str:
    """The content of a regular file, UTF-8 with or without a byte order mark.

    Raises:
        OSError: if it cannot be read.
        UnicodeDecodeError: if it is not UTF-8.
    """
    with open(path, encoding="utf-8-sig", opener=regular) as file:
        return file.read()
