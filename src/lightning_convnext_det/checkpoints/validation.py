"""What a checkpoint says of its network, held against its tensors before any memory is taken for the network.

Numbers of channels, layers and classes come from a file that may be damaged, or made to fill the memory. So the network
is built twice: first on torch's device "meta", whose tensors have shapes and no memory, and only if these are exactly
the tensors that the file holds, for use.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_convnext_det.checkpoints.format import is_own

_MOST = 1000  # entries of one hyper-parameter; class names and ids may be as many as the file has room for
_LONG = ("class_names", "category_ids")
_WIDEST = 2**63  # of integers
# what a constructor builds one by one has at least one tensor each
_LAYERS = ("encoder_layers", "decoder_layers", "extra_levels")


# hyper-parameters and state dict are whatever plain data the file holds
def find_contradiction(
    build: type[nn.Module],
    parameters: Mapping[Any, Any],
    options: Mapping[str, Any],
    tensors: Mapping[Any, Any],
    size: int,
) -> str | None:
    """Say in what a checkpoint's hyper-parameters and tensors contradict each other or the file; None if they agree.

    Args:
        build: the module's class.
        parameters: its arguments as the file states them.
        options: further arguments, which are not checked.
        tensors: its state dict.
        size: length of the file in bytes.
    """
    return (
        _odd_parameter(parameters)
        or _odd_tensor(tensors, size)
        or _odd_count(parameters, tensors)
        or _other_network(build, {**options, **parameters}, tensors)
    )


def _odd_parameter(parameters: Mapping[Any, Any]) -> str | None:
    for name, value in parameters.items():
        if not isinstance(name, str) or not name.isidentifier():
            return "a hyper-parameter has no name"
        if name in _LONG and isinstance(value, list):
            if not all(isinstance(entry, int | str) for entry in value):
                return f"{name} holds more than names or numbers"
        elif _count(value, depth=2) > _MOST:
            return f"{name} is not a number, a word or a short list or mapping of them"
    return None


def _count(value: object, depth: int) -> int:
    """Entries of a value of the kinds that hyper-parameters have; too many if it is of another."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple) and depth and len(value) <= _MOST:
        total = 1
        for entry in value:  # one list may stand in many places
            total += _count(entry, depth - 1)
            if total > _MOST:
                break
        return total
    fits = (
        value is None
        or isinstance(value, float)
        or (isinstance(value, int) and abs(value) < _WIDEST)
        or (isinstance(value, str) and len(value) < _MOST)
    )
    return 1 if fits else _MOST + 1


def _odd_tensor(tensors: Mapping[Any, Any], size: int) -> str | None:
    stated = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            return f"'{str(name)[:80]}' is no tensor"
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            return f"'{name[:80]}' is no plain tensor"
        stated += tensor.numel() * tensor.element_size()
    # a view can repeat one number for ever
    return f"its tensors state {stated >> 20} MB, it holds {size >> 20}" if stated > size else None


def _odd_count(parameters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    largest = max((tensor.numel() for tensor in tensors.values()), default=0)
    limits = {"num_classes": largest, **dict.fromkeys(_LAYERS, len(tensors))}
    for name, limit in limits.items():
        value = parameters.get(name)
        if isinstance(value, int | float) and value > limit:
            return f"it states {name} {value}, for which it has too few tensors"
    return None


def _other_network(build: type[nn.Module], parameters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    # which parameters are frozen is found by a forward pass, not possible for every network there
    unfrozen = {name: 0 if name == "frozen_stages" else value for name, value in parameters.items()}
    try:
        with torch.device("meta"):
            expected = build(**unfrozen).state_dict()
    except Exception as error:  # a constructor raises almost anything where its arguments are of other kinds
        if isinstance(error, RuntimeError) and "meta" in str(error) and not is_own(build):
            return None  # a user's class may need numbers to be built
        return " ".join(str(error).split())[:300] or type(error).__name__
    for name, tensor in expected.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = list(tensors[name].shape) if name in tensors else "missing"
            return f"'{name}' is {found}, its hyper-parameters state {list(tensor.shape)}"
    left_over = next((name for name in tensors if name not in expected), None)
    return None if left_over is None else f"its hyper-parameters state a network without '{left_over[:80]}'"
