"""What a checkpoint may hold: tensors and plain data, which are read again without running code."""

from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_convnext_det.errors import CheckpointError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


# a state is whatever callbacks, optimizers and users put into it
def readable(value: Any, where: str = "the checkpoint") -> Any:
    """A copy of a state in which everything can be read again; tensors and plain data stay what they are.

    NumPy's numbers and arrays become Python's numbers and tensors, paths become text.

    Args:
        value: a state, with mappings and lists to any depth.
        where: what it is called in messages.

    Raises:
        CheckpointError: if something in it can be written, but not read again; it is named.

    Examples:
        >>> readable({"best": np.float64(0.5), "folder": Path("runs")})
        {'best': 0.5, 'folder': 'runs'}
        >>> readable({"callbacks": {"Mine": {"model": object()}}})
        Traceback (most recent call last):
        lightning_convnext_det.errors.CheckpointError: [LCD-K019] callbacks.Mine.model is an object, which could not \
be read again; keep numbers, text, tensors and lists or mappings of them in the state
    """
    kind = type(value)
    if isinstance(value, Tensor) or kind in _PLAIN:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value))
    if isinstance(value, Path):
        return str(value)
    prefix = "" if where == "the checkpoint" else f"{where}."
    if isinstance(value, dict):
        entries = {readable(k, f"{prefix}key"): readable(v, f"{prefix}{k}") for k, v in value.items()}
        return kind(entries) if kind in (OrderedDict, Counter) else entries
    if kind in (list, tuple, set, frozenset):
        whole = [readable(entry, f"{prefix}{i}") for i, entry in enumerate(value)]
        return whole if kind is list else tuple(whole) if kind is tuple else set(whole)
    raise CheckpointError(
        f"[LCD-K019] {where} is {_article(kind.__name__)}, which could not be read again; keep numbers, text, tensors "
        "and lists or mappings of them in the state"
    )


def _article(name: str) -> str:
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"
