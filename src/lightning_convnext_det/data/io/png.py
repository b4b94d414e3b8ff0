"""The chunks of a PNG: checksums that Pillow does not verify, and EXIF where it does not look without decoding.

Pillow stops reading compressed pixels as soon as it has enough of them, so that of an image with a flipped bit neither
the checksum of the chunk nor that of the compressed data is ever compared: it may decode to other pixels without an
error (Pillow 13).

Reference:
    https://www.w3.org/TR/png-3/#5Chunk-layout
"""

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

_SIGNATURE_BYTES = 8
_MAX_EXIF_BYTES = 1 << 20


def check_chunks(file: BinaryIO) -> None:
    """Verify the checksums of the chunks that pixels depend on; the position in the file is kept.

    Raises:
        ValueError: if one differs, or the file ends before its last chunk.
    """
    with _position_kept(file):
        for kind, length in _chunk_heads(file):
            content, checksum = file.read(length), file.read(4)
            if len(checksum) < 4:
                break
            # a chunk whose name begins with a small letter is of no consequence for the pixels
            if kind[:1].isupper() and zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(checksum, "big"):
                raise ValueError(f"the checksum of chunk {kind.decode('latin-1')} is wrong")
            if kind == b"IEND":
                return
    raise ValueError("the file ends before its last chunk")


def find_late_exif(file: BinaryIO) -> bytes:
    """The EXIF block that stands behind the pixels, empty if there is none; the position in the file is kept.

    Pillow's own ``getexif`` decodes the whole image to get there; here only the chunk heads are read.
    """
    behind_pixels = False
    with _position_kept(file):
        for kind, length in _chunk_heads(file):
            behind_pixels = behind_pixels or kind == b"IDAT"
            if kind == b"eXIf" and behind_pixels:
                return file.read(min(length, _MAX_EXIF_BYTES))
            file.seek(length + 4, 1)  # content and checksum
    return b""


def _chunk_heads(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Kind and length of each chunk that is there as a whole; who asks for the next must have passed over this one."""
    end = file.seek(0, os.SEEK_END)
    file.seek(_SIGNATURE_BYTES)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if length > end - file.tell():  # reading 4 GB of a file of 400 bytes would ask for 4 GB first
            return
        yield kind, length


@contextmanager
def _position_kept(file: BinaryIO) -> Iterator[None]:
    position = file.tell()
    try:
        yield
    finally:
        file.seek(position)
