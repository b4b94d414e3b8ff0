"""What a checkpoint declares of its network, compared with the tensors that it holds."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_MOST = 1000  # entries of one hyper-parameter; class names and ids may be as many as the file has room for
_LONG = ("class_names", "category_ids")
_WIDEST = 2**63  # of integers
# what a constructor builds one by one has at least one tensor each
_LAYERS = ("encoder_layers", "decoder_layers", "extra_levels")


# hyper-parameters and state dict are whatever plain data the file holds
def find_contradiction(parameters: Mapping[Any, Any], tensors: Mapping[Any, Any]) -> str | None:
    """Say why no network can be built from a checkpoint's hyper-parameters and tensors; None if it may be tried.

    Args:
        parameters: the module's arguments as the file declares them.
        tensors: its state dict.
    """
    return _odd_parameter(parameters) or _odd_tensor(tensors) or _odd_count(parameters, tensors)


def find_misfit(module: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor that a network or a checkpoint lacks or that has another shape; None if all fit.

    Args:
        module: the network that the hyper-parameters declare; it need not have memory for its weights.
        tensors: the state dict that the checkpoint holds.
    """
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = list(tensors[name].shape) if name in tensors else "missing"
            return f"'{name}' is {found}, its hyper-parameters declare {list(tensor.shape)}"
    if left_over := next((name for name in tensors if name not in expected), None):
        return f"its hyper-parameters declare a network without '{left_over[:80]}'"
    # many tensors may be one in the file; a parameter that the network has in several places counts once
    needed = sum(x.numel() * tensors[k].element_size() for k, x in module.named_parameters() if k in tensors)
    held = bytes_held(tensors)
    return f"its weights take {needed >> 20} MB, it holds {held >> 20}" if needed > held else None


def bytes_held(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors, those that share their memory counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors.values()}
    return sum(storages.values())


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


def _odd_tensor(tensors: Mapping[Any, Any]) -> str | None:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            return f"'{str(name)[:80]}' is not a tensor"
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            return f"'{name[:80]}' is not a plain tensor"
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            return f"'{name[:80]}' repeats fewer numbers than it declares"  # a view can repeat one for ever
    return None


def _odd_count(parameters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    largest = max((tensor.numel() for tensor in tensors.values()), default=0)
    limits = {"num_classes": largest, "in_chans": largest, **dict.fromkeys(_LAYERS, len(tensors))}
    for name, limit in limits.items():
        value = parameters.get(name)
        if isinstance(value, int | float) and value > limit:
            return f"it declares {name} {value}, for which it has too few tensors"
    return None
