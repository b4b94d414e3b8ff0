"""Results of all images in one file: COCO results in JSON, and CSV; written by each rank, merged by one.

A rank writes a line per image: its id, a tab, and the COCO results in JSON, in ASCII, so that it holds any file name.
"""

import csv
import heapq
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from lightning_convnext_det.data.writers.annotations import COLUMNS, table_row
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.metrics.coco_results import CocoResult


def write_line(file: TextIO, image_id: int, records: Sequence[CocoResult]) -> None:
    """Write the results of an image to a rank's file; nothing if there are none."""
    if records:
        file.write(f"{image_id}\t{', '.join(json.dumps(record) for record in records)}\n")


def merge_to_json(parts: Sequence[Path], target: Path) -> None:
    """Write the results in all parts, each sorted by image id, as one JSON list; the target is complete or absent."""

    def write(lines: Iterator[str], out: TextIO) -> None:
        separator = "[\n"
        for line in lines:
            out.write(separator + line)
            separator = ",\n"
        out.write("\n]\n" if separator == ",\n" else "[]\n")

    _merge(parts, target, write)


def merge_to_csv(parts: Sequence[Path], target: Path) -> None:
    """Write the results in all parts, each sorted by image id, as one table; the target is complete or absent."""

    def write(lines: Iterator[str], out: TextIO) -> None:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(COLUMNS)
        for line in lines:
            table.writerows(table_row(record) for record in json.loads(f"[{line}]"))

    _merge(parts, target, write)


MERGED = {"coco": ("predictions.json", merge_to_json), "csv": ("predictions.csv", merge_to_csv)}
"""The name of a format's table, and what writes it."""


def remove_tables(folder: Path) -> int:
    """Remove the tables of an earlier prediction, and what ranks have written for them; tell how many there were."""
    tables = [path for name, _ in MERGED.values() if (path := folder / name).is_file() and _is_ours(path)]
    found = [*tables, *folder.glob(".predictions-*.part")]
    for path in found:
        path.unlink()
    return len(found)


def check_tables(folder: Path, formats: Collection[str]) -> None:
    """Refuse to replace a table that is not of an earlier prediction.

    Raises:
        ArgumentError: that names it.
    """
    for name in [name for key, (name, _) in MERGED.items() if key in formats]:
        if (folder / name).exists() and not _is_ours(folder / name):
            raise ArgumentError(
                f"'{folder / name}' is not of an earlier prediction, and would be replaced; move it, or choose "
                "another folder"
            )


def _is_ours(path: Path) -> bool:
    """Whether a file begins as the tables that are written here."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(200)
    return start == b"[]\n" or start.startswith((b'[\n{"image_id": ', ",".join(COLUMNS).encode() + b"\n"))


def _merge(parts: Sequence[Path], target: Path, write: Callable[[Iterator[str], TextIO], None]) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    with ExitStack() as files:
        lines = [files.enter_context(open(part)) for part in parts]
        out = files.enter_context(open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline=""))
        merged = heapq.merge(*lines, key=lambda line: int(line.partition("\t")[0]))
        write((line.partition("\t")[2].rstrip("\n") for line in merged), out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, target)
