"""Packages that only some exports need."""

import importlib
from types import ModuleType

from lightning_convnext_det.errors import ArgumentError


def import_optional(name: str, extra: str) -> ModuleType:
    """Import a package, or say in one line how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ArgumentError(
            f"[LCD-X003] {package} is not installed; pip install 'lightning-convnext-det[{extra}]'"
        ) from None
