"""The examples in docstrings."""

import doctest
import importlib
import pkgutil
import tempfile
from pathlib import Path

import pytest
import torch

import lightning_convnext_det

# imported only with a GPU, or runs the command
SKIPPED = ("__main__", "_triton")
NAMES = sorted(
    info.name
    for info in pkgutil.walk_packages(lightning_convnext_det.__path__, "lightning_convnext_det.")
    if not info.name.endswith(SKIPPED)
)
FINDER = doctest.DocTestFinder()
WITH_EXAMPLES = [name for name in NAMES if any(test.examples for test in FINDER.find(importlib.import_module(name)))]


@pytest.mark.heavy
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstrings__examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the examples' mkdtemp creates folders
    torch.manual_seed(0)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    outcome = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert outcome.failed == 0
