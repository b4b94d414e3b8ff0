"""Where an export goes: its format by the name of the path, and files that are replaced when it has succeeded."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from lightning_convnext_det.errors import ArgumentError

Format = Literal["onnx", "pt2", "compiled", "openvino", "weights"]
Precision = Literal["fp32", "fp16", "int8"]
_PRECISIONS: dict[Format, tuple[Precision, ...]] = {
    "onnx": ("fp32", "fp16"), "pt2": ("fp32",), "compiled": ("fp32",), "openvino": ("fp32", "fp16", "int8"),
    "weights": ("fp32",),
}  # fmt: skip
_SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "pt2": ".pt2", "compiled": ".pt2", "weights": ".safetensors"}


def choose_format(path: Path, kind: Format | None, precision: Precision) -> Format:
    """The format that is given, or that the name of the path tells.

    Raises:
        ArgumentError: if name, format and precision do not go together.
    """
    suffixes: dict[str, Format] = {suffix: name for name, suffix in _SUFFIXES.items() if name != "compiled"}
    by_name = "openvino" if path.name.endswith("_openvino") else suffixes.get(path.suffix)
    chosen = kind or by_name
    if chosen is None:
        raise ArgumentError(f"'{path}' must end in .onnx, .pt2, .safetensors or _openvino")
    if path.suffix != _SUFFIXES.get(chosen, path.suffix) or (chosen == "openvino" and path.suffix in suffixes):
        raise ArgumentError(f"'{path}' must end in {_SUFFIXES.get(chosen, '_openvino')} for format {chosen}")
    if precision not in _PRECISIONS[chosen]:
        raise ArgumentError(f"[LCD-X002] {chosen} has {', '.join(_PRECISIONS[chosen])}, not {precision}")
    return chosen


@contextmanager
def replacing(path: Path, kind: Format) -> Iterator[Path]:
    """A path to write to, in a folder of its own, whose files replace those at ``path`` if no error comes between.

    Raises:
        ArgumentError: if there is no folder for it, or something of another kind is there.
    """
    if not path.parent.is_dir():
        raise ArgumentError(f"'{path}': there is no such folder")
    if path.exists() and path.is_dir() != (kind == "openvino"):
        raise ArgumentError(f"'{path}' is a {'folder' if path.is_dir() else 'file'}; choose another name")
    beside = path.with_suffix(".json")
    if kind == "weights" and beside.exists() and not _is_card(beside):
        raise ArgumentError(
            f"'{beside}', where the card of the weights goes, holds something else; choose another name"
        )
    try:
        folder = tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent)
    except OSError as error:
        raise ArgumentError(f"'{path.parent}' cannot be written to ({error}); choose another folder") from error
    with folder:
        yield Path(folder.name) / path.name
        target = path.parent
        if kind == "openvino":  # the folder may hold files of the user's
            target = path
            target.mkdir(exist_ok=True)
        source = Path(folder.name) / path.name if kind == "openvino" else Path(folder.name)
        for file in sorted(source.iterdir()):
            os.replace(file, target / file.name)


def _is_card(path: Path) -> bool:
    try:
        return "source_sha256" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
