"""The list of codes and the messages that use them."""

import re
from pathlib import Path

from lightning_convnext_det import errors

SOURCE = Path(errors.__file__).parent
CODE = re.compile(r"LCD-[A-Z]\d{3}")


def test_codes__are_those_that_the_sources_use() -> None:
    used = {
        code for file in SOURCE.rglob("*.py") if file.name != "errors.py" for code in CODE.findall(file.read_text())
    }
    assert sorted(used - set(errors.CODES)) == []
    assert sorted(set(errors.CODES) - used) == []


def test_codes__have_one_meaning_each() -> None:
    meanings = list(errors.CODES.values())
    assert all(CODE.fullmatch(code) for code in errors.CODES)
    assert len(set(meanings)) == len(meanings)
    text = Path(errors.__file__).read_text()
    assert len(re.findall(r'^ +"LCD-', text, re.MULTILINE)) == len(errors.CODES)  # none is overwritten


def test_codes__need_no_torch() -> None:
    assert "import torch" not in Path(errors.__file__).read_text()
