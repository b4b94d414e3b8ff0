"""Building a network without memory for its weights, which a checkpoint is about to give it.

What a checkpoint declares (channels, layers, classes) may be damaged, or made to fill the memory. So its network is
built with large parameters on torch's device "meta", where tensors have shapes and no memory; only if these are exactly
the tensors that the file holds do they get memory. Small parameters and all buffers are built as usual, so whatever no
checkpoint holds (indices, anchors, metrics) has its values. It also saves drawing random weights.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

SMALL = 2**16  # numbers in a parameter; timm copies the parameters of BatchNorms while it builds
_TENSOR_LIMIT = 2**20  # bytes that a constructor may ask for at once, if the checkpoint is shorter than that
_SIZED: tuple[Callable[..., Any], ...] = (
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randn, torch.zeros,
    Tensor.repeat,
)  # fmt: skip


@contextmanager
def without_weights(length: int, small: int = SMALL) -> Iterator[None]:
    """Build networks whose large parameters have no memory, in this thread only.

    Args:
        length: bytes of the checkpoint; what a constructor makes is no longer than that, or else has no memory either.
        small: numbers from which a parameter has no memory.
    """
    thread = threading.get_ident()

    def leave_out(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if thread != threading.get_ident() or parameter.numel() < small or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(leave_out)  # type: ignore[arg-type]  # it may return one
    try:
        with _Bounded(max(length, _TENSOR_LIMIT)):
            yield
    finally:
        hook.remove()


def allocate_weights(module: nn.Module) -> None:
    """Give the parameters of a network that was built `without_weights` memory, with arbitrary values."""
    allocated: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                if parameter not in allocated:  # one parameter may stand in several places
                    values = torch.empty_like(parameter, device="cpu")  # keeps the memory format
                    allocated[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                part.register_parameter(name, allocated[parameter])


class _Bounded(TorchFunctionMode):
    """Makes tensors that would be longer than a number of bytes on the device "meta"."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    # the functions are torch's own, with any arguments and results
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SIZED and kwargs.get("device") is None:
            where = {} if func is Tensor.repeat else {"device": "meta"}
            sketched = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
            sketch = func(*sketched, **{**kwargs, **where})
            if sketch.numel() * sketch.element_size() > self.limit:
                return sketch
        return func(*args, **kwargs)
