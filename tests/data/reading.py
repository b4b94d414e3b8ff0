"""Reading of the datasets that the builders of ``conftest.py`` write."""

from collections.abc import Callable
from pathlib import Path

from lightning_convnext_det.data.annotations import DetectionAnnotations
from lightning_convnext_det.data.formats.discovery import find_splits, read_split

WriteCoco = Callable[..., Path]
WriteXml = Callable[..., Path]
WriteImage = Callable[..., Path]
Annotate = Callable[..., dict[str, object]]


def read(path: Path, **options: object) -> DetectionAnnotations:
    """The split that a COCO file in ``annotations`` states, its problems collected unless the options say otherwise."""
    return read_root(path.parents[1], **options)


def read_root(root: Path, name: str = "train", **options: object) -> DetectionAnnotations:
    """A split of a folder, its problems collected unless the options say otherwise."""
    return read_split(find_splits(root)[name], **({"collect": True} | options))  # type: ignore[arg-type]


def found(table: DetectionAnnotations) -> list[tuple[str, str]]:
    return [(problem.code, problem.action) for problem in table.problems]
