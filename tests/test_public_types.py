"""No constructor or function that a user or a configuration can reach takes a value of any type whatever.

jsonargparse imports and calls what a configuration names for a parameter of type Any, a bare Callable or a bare class.
"""

import ast
import collections.abc
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn

import lightning_convnext_det

# keywords of one callee, which checks their names: they are that callee's parameters, which have types
FORWARDED = {
    "DetectionModule": "detector",
    "FasterRCNNModule": "detector",
    "CascadeRCNNModule": "detector",
    "DeformableDETRModule": "detector",
    "DINOModule": "detector",
    "CascadeRCNN": "shared",
    "create_detector": "overrides",
    "load_module": "options",
    "start_module": "changes",
}


def public_names() -> list[str]:
    names = sorted(lightning_convnext_det.__all__)
    return [name for name in names if not typing.is_typeddict(getattr(lightning_convnext_det, name))]


def constructors() -> Iterator[tuple[str, type]]:
    """The public classes of all files: a configuration may name any of them."""
    for info in pkgutil.walk_packages(lightning_convnext_det.__path__, "lightning_convnext_det."):
        if info.name.endswith(("__main__", "_triton")):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == info.name and not name.startswith("_"):
                yield f"{info.name.removeprefix('lightning_convnext_det.')}.{name}", value


def is_own(kind: type) -> bool:
    return str(getattr(kind.__init__, "__module__", "")).startswith("lightning_convnext_det")  # type: ignore[misc]


def is_open(annotation: object) -> bool:
    """Whether a type lets anything callable or constructible through."""
    if annotation in (Any, object, inspect.Parameter.empty, type, typing.Callable, collections.abc.Callable, nn.Module):
        return True
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        if typing.get_origin(annotation) in (collections.abc.Callable, typing.Literal):
            return False
        return any(is_open(argument) for argument in typing.get_args(annotation) if argument is not Ellipsis)
    return False


def open_parameters(function: Any, owner: str) -> list[str]:
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    return [
        f"{name}: {hints.get(name)}"
        for name, parameter in inspect.signature(function).parameters.items()
        if not (parameter.kind is inspect.Parameter.VAR_KEYWORD and FORWARDED.get(owner) == name)
        if is_open(hints.get(name, inspect.Parameter.empty))
    ]


@pytest.mark.parametrize("name", public_names())
def test_public_names__take_no_value_of_any_type(name: str) -> None:
    value = getattr(lightning_convnext_det, name)
    if name in ("Predictor", "Prediction", "FusedDetector", "TiledDetector", "export"):
        return  # take a detector or an image, in Python only
    if callable(value):
        assert open_parameters(value, name) == []


def test_is_open__notices() -> None:
    for annotation in (Any, list[Any], dict[str, Any] | None, typing.Callable, type, nn.Module, nn.Module | None):
        assert is_open(annotation), annotation
    for annotation in (int, str | None, list[int], typing.Literal["a"], collections.abc.Callable[[int], int]):
        assert not is_open(annotation), annotation


def test_constructors__that_a_configuration_can_name_take_no_value_of_any_type() -> None:
    found = {
        name: wrong
        for name, kind in constructors()
        if issubclass(kind, Callback | LightningDataModule | LightningModule)
        if is_own(kind) and (wrong := open_parameters(kind, kind.__name__))
    }
    assert found == {}


def test_package__imports_lazily_what_it_declares_to_type_checkers() -> None:
    source = ast.parse(Path(lightning_convnext_det.__file__).read_text())
    guarded = next(node for node in source.body if isinstance(node, ast.If))
    declared = {
        alias.name: node.module.removeprefix("lightning_convnext_det.")
        for node in guarded.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    assert declared == lightning_convnext_det._HOMES
    assert sorted(declared) == sorted(lightning_convnext_det.__all__)
    for name in declared:
        assert getattr(lightning_convnext_det, name).__name__ == name


def test_package__dir_shows_the_public_names() -> None:
    assert {*lightning_convnext_det.__all__, "__version__"} <= set(dir(lightning_convnext_det))
    with pytest.raises(AttributeError, match="has no attribute 'Detektor'"):
        lightning_convnext_det.Detektor  # noqa: B018
