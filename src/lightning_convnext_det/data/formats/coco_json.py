"""The members of a JSON file of any size, one at a time.

COCO's training annotations are 450 MB, of which detection needs a tenth; read as a whole they take 2.4 GB. Here a
window of a megabyte moves over the file, and each annotation is gone when the next is read.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lightning_convnext_det.data.annotations import UnreadableError
from lightning_convnext_det.data.io.files import regular

Member = tuple[str, int | None, object]
"""A key of the outermost object, and an element of its list with its index, or its value and None."""

_BLOCK = 1 << 20  # characters read at a time
_MARGIN = 8192  # characters that must follow a value's start, so that no number is cut at the window's end
_SPACE = re.compile(r"[ \t\n\r]*")


class _DuplicateKeyError(ValueError):
    pass


def iterate_members(path: Path, block: int = _BLOCK) -> Iterator[Member]:
    """Yield ``(key, index, element)`` for each element of the lists in the outermost object, in the file's order.

    A value that is no list is yielded as ``(key, None, value)``, an empty list as ``(key, None, [])``.

    Args:
        path: UTF-8, with or without a byte order mark.
        block: characters read at a time.

    Raises:
        UnreadableError: a DataError that names line and column, if the file is missing, not UTF-8, no JSON, nested too
            deep, has a key twice in one object, or holds something else than an object.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="", opener=regular) as file:
            yield from _Window(file, path, block).members()
    except UnicodeDecodeError as error:
        raise UnreadableError.of("LCD-D004", path, f"the file is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UnreadableError.of("LCD-D004", path, f"cannot be read ({error.strerror or error})") from error


class _Window:
    """A part of a file, and the place in it up to which it is read."""

    def __init__(self, file: TextIO, path: Path, block: int) -> None:
        self.file, self.path, self.block = file, path, block
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the window's start
        self.decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)

    def members(self) -> Iterator[Member]:
        """See :func:`iterate_members`."""
        self.expect_object()
        self.at += 1
        keys: set[str] = set()
        more = self.next() != "}"
        self.at += not more
        while more:
            key = self.value()
            if not isinstance(key, str):
                raise self.error("expected a name in quotation marks")
            if key in keys:
                raise self.error(f"the key {key!r} appears twice in one object")
            keys.add(key)
            if self.next() != ":":
                raise self.error("expected ':'")
            self.at += 1
            if self.next() == "[":
                yield from self.elements(key)
            else:
                yield key, None, self.value()
            more = self.goes_on("}")
        if self.next():
            raise self.error("text after the end of the outermost object")

    def elements(self, key: str) -> Iterator[Member]:
        """The elements of a list."""
        self.at += 1
        if self.next() == "]":
            self.at += 1
            yield key, None, []
            return
        index, more = 0, True
        while more:
            yield key, index, self.value()
            index, more = index + 1, self.goes_on("]")

    def goes_on(self, end: str) -> bool:
        """Pass over a comma, or over the end of a list or object."""
        character = self.next()
        if character not in (",", end):
            raise self.error(f"expected ',' or {end!r}")
        self.at += 1
        return character == ","

    def expect_object(self) -> None:
        """Refuse what is no object, saying what it is."""
        start = self.next()
        if not start:
            raise self.error("the file is empty")
        if start != "{":
            what = {"[": "a list", '"': "a string"}.get(start, "something else")
            reason = f"expected an object with 'images', 'annotations', 'categories'; found {what}"
            raise UnreadableError.of("LCD-D001", self.path, reason)

    def next(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            if self.at < len(self.text) and self.text[self.at] > " ":
                return self.text[self.at]
            found = _SPACE.match(self.text, self.at)
            assert found is not None  # it may match nothing, but it matches
            self.at = found.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.extend()

    def value(self) -> object:
        """The value that starts at the next character."""
        self.next()
        while len(self.text) - self.at < _MARGIN and not self.ended:
            self.extend()
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.error(error.msg, error.pos) from error
                self.extend()  # the value may be cut at the end of the window
            except RecursionError as error:
                raise self.error("objects or lists are nested too deep") from error
            except _DuplicateKeyError as error:
                raise self.error(f"the key {error} appears twice in one object") from error
            except ValueError as error:  # Python refuses to read integers of thousands of digits
                raise self.error(f"a number is too long ({error})") from error

    def extend(self) -> None:
        """Read on, and let go of what is behind."""
        gone = self.text[: self.at]
        breaks = gone.count("\n")
        self.column = len(gone) - gone.rfind("\n") if breaks else self.column + len(gone)
        self.line += breaks
        more = self.file.read(
            max(self.block, len(self.text) - self.at)
        )  # doubles, so that long values cost linear time
        self.ended = not more
        self.text, self.at = self.text[self.at :] + more, 0

    def error(self, reason: str, at: int | None = None) -> UnreadableError:
        """The error at a place of the window, by default where it is read."""
        before = self.text[: self.at if at is None else at]
        breaks = before.count("\n")
        column = len(before) - before.rfind("\n") if breaks else self.column + len(before)
        reason = reason[0].lower() + reason[1:]
        return UnreadableError.of(
            "LCD-D004", self.path, f"no JSON: {reason}", f"line {self.line + breaks} column {column}"
        )


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object, refused if a key appears twice: Python would take the last value without a word."""
    members = dict(pairs)
    if len(members) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _DuplicateKeyError(repr(counts.most_common(1)[0][0]))
    return members
