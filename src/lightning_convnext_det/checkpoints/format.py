"""What a checkpoint of this package holds beside Lightning's own entries."""

import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "lightning_convnext_det"  # the checkpoint's own section
NOTHING_TO_FETCH = {"pretrained_backbone": False, "backbone_weights": None}  # where the weights come from a checkpoint

_PACKAGE = __name__.partition(".")[0]


def class_difference(trained: list[str], given: list[str]) -> str:
    """Say how the classes of a dataset differ from those of a network."""
    way_out = "use the classes it was trained on, or name them by data.class_names"
    for i, (a, b) in enumerate(zip(trained, given, strict=False)):
        if a != b:
            return f"the network's class {i} is '{a}', the dataset's is '{b}'; {way_out}"
    return f"the network has {len(trained)} classes, the dataset {len(given)}; {way_out}"


def read_score_thresholds(section: object, num_classes: int) -> list[float | None] | None:
    """The score thresholds of the classes in a checkpoint's own section; None if it has none, or of other classes."""
    values = section.get("score_thresholds") if isinstance(section, dict) else None
    if not isinstance(values, list) or len(values) != num_classes:
        return None
    if not all(value is None or (isinstance(value, float) and 0 <= value <= 1) for value in values):
        return None
    return values


def read_grey_range(section: object) -> tuple[int, int, bool] | None:
    """The range of 16-bit grey values in a checkpoint's own section, and whether others are clipped."""
    values = section.get("grey_range") if isinstance(section, dict) else None
    if not isinstance(values, list) or [type(value) for value in values] != [int, int, bool]:
        return None
    return (values[0], values[1], values[2]) if 0 <= values[0] < values[1] <= 65535 else None


def is_own(kind: type) -> bool:
    """Whether a class is this package's, not a user's."""
    return is_own_name(kind.__module__)


def is_own_name(module: str) -> bool:
    """Whether a Python module is this package's, by its name."""
    return module.startswith(f"{_PACKAGE}.")


def own_base(kind: type) -> type:
    """This package's class that a class extends, or is."""
    return next(base for base in kind.__mro__ if is_own(base))


def describe_class(kind: type) -> dict[str, str]:
    """Name a class in a checkpoint: this package's, and the user's that extends it if it is one."""
    own = own_base(kind)
    return {"module": own.__name__} | ({} if own is kind else {"subclass": kind.__name__})


def accepted(kind: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that a class's constructor has; all of them if it takes any."""
    parameters = inspect.signature(kind).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


# what a user gives to a constructor, which may be anything
def plain(value: Any, what: str) -> Any:
    """A value of the kinds that checkpoints are read with: numbers, words, and lists and mappings of them."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        entries = [plain(entry, what) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(entry, what) for key, entry in value.items()}
    if is_dataclass(value) and is_own(type(value)):  # our constructors take such a mapping, too
        return {field.name: plain(getattr(value, field.name), what) for field in fields(value)}
    raise TypeError(f"{what} is a {type(value).__name__}, which a checkpoint cannot hold")
