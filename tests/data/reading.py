"""Reading of the data sets that the builders of ``conftest.py`` write."""

from collections.abc import Callable
from pathlib import Path

from lightning_convnext_det.data.formats.discovery import find_splits, read_split
from lightning_convnext_det.data.table import DetectionTable

WriteCoco = Callable[..., Path]
WriteXml = Callable[..., Path]
WritePicture = Callable[..., Path]
Annotate = Callable[..., dict[str, object]]


def read(path: Path, **options: object) -> DetectionTable:
    """The split that a COCO file in ``annotations`` states, its problems collected unless the options say otherwise."""
    return read_root(path.parents[1], **options)


def read_root(root: Path, name: str = "train", **options: object) -> DetectionTable:
    """A split of a folder, its problems collected unless the options say otherwise."""
    return read_split(find_splits(root)[name], **({"collect": True} | options))  # type: ignore[arg-type]


def found(table: DetectionTable) -> list[tuple[str, str]]:
    return [(problem.code, problem.action) for problem in table.problems]
