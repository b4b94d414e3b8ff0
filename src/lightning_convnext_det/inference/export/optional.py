"""Packages and tools that only some exports need."""

import importlib
import os
import shutil
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


def check_installed(kind: str, precision: str) -> None:
    """Refuse an export that lacks a package or tool, before minutes of work.

    Raises:
        ArgumentError: naming what to install.
    """
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript")}
    for name in needed.get(kind, ()):
        import_optional(name, "export")
    if kind == "openvino":
        import_optional("openvino", "openvino")
        if precision == "int8":
            import_optional("nncf", "openvino")
    if kind == "compiled" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise ArgumentError("[LCD-X003] AOTInductor needs a C++ compiler such as g++, which is not installed")
