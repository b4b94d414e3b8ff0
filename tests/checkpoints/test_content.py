from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_convnext_det.checkpoints.content import readable
from lightning_convnext_det.checkpoints.file import read_checkpoint_file, write_checkpoint_file
from lightning_convnext_det.errors import CheckpointError


class Mode(StrEnum):
    MIN = "min"


@dataclass
class Score:
    value: float


CONTENTS: dict[str, tuple[object, object]] = {
    "plain": (
        {"a": [1, 2.5, "x", None, True, b"y", 1j, (3, {4})]},
        {"a": [1, 2.5, "x", None, True, b"y", 1j, (3, {4})]},
    ),
    "numbers": ([np.float64(0.5), np.float32(0.25), np.int64(3), np.bool_(True)], [0.5, 0.25, 3, True]),
    "array": (np.arange(3), torch.arange(3)),
    "path": (Path("a") / "b", "a/b"),
    "keys": ({np.int64(2): 1, 3: 4}, {2: 1, 3: 4}),
    "mappings": (OrderedDict(a=Counter("aab")), OrderedDict(a=Counter("aab"))),
    "default": (defaultdict(list, a=[1]), {"a": [1]}),
    "frozen": (frozenset({1}), {1}),
    "torch": (
        [torch.float16, torch.device("cpu"), torch.Size([2])],
        [torch.float16, torch.device("cpu"), torch.Size([2])],
    ),
    "parameter": (nn.Parameter(torch.ones(2)), torch.ones(2)),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_readable__what_is_written_is_read(tmp_path: Path, name: str) -> None:
    given, expected = CONTENTS[name]
    write_checkpoint_file({"a": given}, tmp_path / "a.ckpt")
    found = read_checkpoint_file(tmp_path / "a.ckpt")["a"]
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected
        assert type(found) is type(expected)


@pytest.mark.parametrize(
    "value", [Score(0.5), Mode.MIN, timedelta(1), nn.Linear(2, 2), lambda: 0, np.array(["a"]), bytearray(3)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_readable__what_could_not_be_read_is_named(value: Any) -> None:
    kind = type(value).__name__
    with pytest.raises(
        CheckpointError, match=rf"\[LCD-K019\] callbacks\.Mine\.states\.1 is an? {kind}, which could not"
    ):
        readable({"state_dict": {}, "callbacks": {"Mine": {"states": [0, value]}}})


def test_readable__tensors_are_not_copied() -> None:
    tensor = torch.ones(3)
    given = {"a": [tensor]}
    found = readable(given)
    assert found["a"][0] is tensor
    assert found is not given
