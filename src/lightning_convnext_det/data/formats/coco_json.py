"""COCO's JSON as lists of undecoded records, so that each is decoded, checked and named on its own.

msgspec maps the file and finds where each record starts and ends; a dict of the whole file of COCO's training
annotations would take 3 GB. Of a key that is repeated in one object the last value counts, as in Python's ``json``.

Reference:
    https://jcristharif.com/msgspec/api.html#msgspec.Raw
"""

import codecs
import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from msgspec import UNSET, DecodeError, Raw, Struct, UnsetType, ValidationError
from msgspec.json import Decoder

from lightning_convnext_det.data.annotations import UnreadableError
from lightning_convnext_det.data.io.files import open_file

_BOM = codecs.BOM_UTF8
_BLOCK = 1 << 20  # bytes whose encoding is checked at a time
_EXPECTED = "expected an object with 'images', 'annotations', 'categories'"


class CocoFile(Struct):
    """The lists of a COCO file, each record as the JSON text it is written in."""

    images: list[Raw] | UnsetType = UNSET
    annotations: list[Raw] | UnsetType = UNSET
    categories: list[Raw] | UnsetType = UNSET


_decode = Decoder(CocoFile).decode


def read_coco_file(path: Path) -> CocoFile:
    """Split a COCO file into its records.

    Args:
        path: UTF-8, with or without a byte order mark. NaN and Infinity, which are not JSON, are accepted.

    Raises:
        UnreadableError: a DataError, if the file is missing, not UTF-8, or not JSON (names line and column), nested too
            deep, or not an object, or if one of the lists is something else.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        text = memoryview(content)[len(_BOM) if content[: len(_BOM)] == _BOM else 0 :]
        _check_encoding(text)
        return _decode(text)
    except OSError as error:
        raise UnreadableError.of("LCD-D004", path, f"cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UnreadableError.of(
            "LCD-D004", path, f"the file is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    except RecursionError as error:
        raise UnreadableError.of("LCD-D004", path, "no JSON: objects or lists are nested too deep") from error
    except ValidationError as error:
        raise _wrong_type(path, str(error)) from error
    except DecodeError:
        return _read_strictly(path, bytes(text))


def decode_json(record: Raw, path: Path) -> object:
    """A record as Python objects: for those that do not have the usual types.

    Raises:
        UnreadableError: a DataError, if it has an integer of thousands of digits.
    """
    try:
        return json.loads(bytes(record))
    except ValueError as error:
        raise UnreadableError.of("LCD-D004", path, f"no JSON: a number is too long ({error})") from error


def kind_of(value: object) -> str:
    """What a value is called in JSON, for a message."""
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value), f"{value!r}")


def _check_encoding(text: memoryview) -> None:
    """Raise UnicodeDecodeError if a text is not UTF-8; msgspec does not look into what it passes over."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), _BLOCK):
        decoder.decode(text[start : start + _BLOCK])
    decoder.decode(b"", final=True)


def _read_strictly(path: Path, text: bytes) -> CocoFile:
    """Read what msgspec refuses with Python's ``json``: it accepts NaN and names the line of an error."""
    reason = ""
    if not text.strip():
        reason, at = "the file is empty", len(text)
    elif not text.rstrip().endswith((b"}", b"]")):  # a download that was cut short; no need for all of it in memory
        reason, at = "the file ends too early", len(text)
    else:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            reason, at = error.msg[0].lower() + error.msg[1:], len(error.doc[: error.pos].encode())
        except (ValueError, RecursionError) as error:
            raise UnreadableError.of("LCD-D004", path, f"no JSON: {error}") from error
    if reason:
        line, column = text.count(b"\n", 0, at) + 1, at - text.rfind(b"\n", 0, at)
        raise UnreadableError.of("LCD-D004", path, f"no JSON: {reason}", f"line {line} column {column}")
    if not isinstance(content, dict):
        raise UnreadableError.of("LCD-D001", path, f"{_EXPECTED}; found {kind_of(content)}")
    lists = {}
    for key in set(content) & set(CocoFile.__struct_fields__):
        if not isinstance(content[key], list):
            raise UnreadableError.of("LCD-D001", path, f"expected a list, found {kind_of(content[key])}", key)
        lists[key] = [Raw(json.dumps(record).encode()) for record in content[key]]
    return CocoFile(**lists)


def _wrong_type(path: Path, message: str) -> UnreadableError:
    """The error for msgspec's "Expected `array`, got `object` - at `$.images`"."""
    found = message.partition("got `")[2].partition("`")[0]
    found = {"object": "an object", "array": "a list", "str": "a string", "int": "an integer"}.get(found, found)
    key = message.partition("`$.")[2].rstrip("`")
    if not key:
        return UnreadableError.of("LCD-D001", path, f"{_EXPECTED}; found {found}")
    return UnreadableError.of("LCD-D001", path, f"expected a list, found {found}", key)


def missing_lists(file: CocoFile, required: Sequence[str]) -> list[str]:
    """Those of the required lists that the file does not have."""
    return [key for key in required if getattr(file, key) is UNSET]
