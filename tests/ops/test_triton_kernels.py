import importlib.util
import shutil
import sys

import pytest

from lightning_convnext_det.ops import triton_kernels
from lightning_convnext_det.ops.triton_kernels import has_triton


@pytest.fixture(autouse=True)
def _forget() -> None:
    triton_kernels._is_usable.cache_clear()


@pytest.mark.parametrize(
    ("installed", "compilers", "variables", "usable"),
    [
        (True, {"gcc"}, {}, True),
        (True, {"clang"}, {}, True),
        (True, set(), {"CC": "/opt/cc"}, True),
        (True, set(), {}, False),  # would end in Triton's "Failed to find C compiler"
        (False, {"gcc"}, {}, False),
        (True, {"gcc"}, {"DISABLE_CUSTOM_KERNELS": "1"}, False),
    ],
)
def test_has_triton__needs_it_and_a_compiler(
    installed: bool, compilers: set[str], variables: dict[str, str], usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CC", "DISABLE_CUSTOM_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in compilers else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert has_triton() is usable
    triton_kernels._is_usable.cache_clear()
