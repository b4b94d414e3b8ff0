"""Count on the CPU where a GPU would make the host wait: tensors that call themselves a device's, and compute here.

A device hands over work and goes on; the host waits where it reads a value of the device, where the size of a result
depends on values (``nonzero``, boolean masks, ``unique``, NMS), and where memory that is not pinned is copied without
``non_blocking``. `Device.count` lists these calls with the line of this package that makes them. What
``torch.cuda.set_sync_debug_mode`` reports on a GPU is the reference.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

PACKAGE = "lightning_convnext_det"
# a device that torch lets us make tensors of without having it, and that the package does not treat on its own
DEVICE = torch.device("cuda", 0)
_VALUE_SIZED = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::_unique", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::bincount", "torchvision::nms",
}  # fmt: skip
_READING = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


class DeviceTensor(Tensor):
    """A tensor that says it is on the device, around one on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "DeviceTensor":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner.detach()
        return made

    def __repr__(self) -> str:
        return f"DeviceTensor({self.inner!r})"

    def tolist(self) -> Any:
        """Read all values; torch's own does not take subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})  # torch.as_tensor leaves modes out


class Device(TorchDispatchMode):
    """Computes on the CPU what is asked of the device, and notes each call that makes the host wait."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] | None = None

    def count(self, call: Callable[[], object]) -> list[str]:
        """Return the calls of the device that make the host wait, each with the line it comes from."""
        self.notes = []
        call()
        notes, self.notes = self.notes, None
        return notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.notes is not None and (reason := find_wait(func, args, kwargs)):
            self.notes.append(f"{reason} in {_find_line()}")
        return _compute(func, args, kwargs)


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    asked, from_device = _find_devices(args, kwargs)
    inner_args, inner = tree_map(lambda x: x.inner if isinstance(x, DeviceTensor) else x, (args, kwargs))
    if asked is not None:
        inner["device"] = torch.device("cpu")
    result = func(*inner_args, **inner)
    if func._schema.is_mutable and func._schema.name.endswith("_") and isinstance(args[0], Tensor):
        return args[0]
    if (asked is not None and asked.type == DEVICE.type) or (asked is None and from_device):
        return tree_map(lambda x: DeviceTensor(x) if type(x) is Tensor else x, result)
    return result


def _find_devices(args: Any, kwargs: Any) -> tuple[torch.device | None, bool]:
    """The device that a call asks for, and whether a tensor on the device is among its arguments."""
    asked = kwargs.get("device")
    from_device = any(isinstance(x, DeviceTensor) for x in tree_flatten((args, kwargs))[0])
    return None if asked is None else torch.device(asked), from_device


def find_wait(func: Any, args: Any, kwargs: Any) -> str | None:
    """Say why the host waits for a call; None if it does not."""
    name, (asked, from_device) = func._schema.name, _find_devices(args, kwargs)
    if name == "aten::_to_copy":
        moves = asked is not None and (asked.type == DEVICE.type) != from_device
        return f"copy to {asked.type}" if moves and not kwargs.get("non_blocking") else None
    if name == "aten::copy_":
        moves = isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor)
        return "copy_" if moves and not (kwargs.get("non_blocking") or args[2:3] == (True,)) else None
    if not from_device:
        return None
    if name in _VALUE_SIZED or name in _READING:
        return str(name)
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        return "repeat_interleave"
    if name == "aten::where" and any(isinstance(x, Tensor) and not isinstance(x, DeviceTensor) for x in args):
        return "where of the host's values"
    if name in _INDEXING:
        return _find_wait_of_index(name, args)
    return None


def _find_wait_of_index(name: str, args: Any) -> str | None:
    indices = [index for index in args[1] if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        # torch fills by the mask where one number of the host is assigned
        fills = "put" in name and args[2].numel() == 1 and not isinstance(args[2], DeviceTensor)
        return None if fills else f"{name} by a mask"
    return f"{name} by indices of the host" if any(not isinstance(i, DeviceTensor) for i in indices) else None


def _find_line() -> str:
    """The innermost line of this package, or of the test, that has made the call."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    own = [f for f in frames if f"/{PACKAGE}/" in f.filename]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"


@contextmanager
def pretended_device() -> Iterator[Device]:
    """Let tensors be made on the device, which is not there."""
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.backends.cudnn.enabled = False  # its operators have no CPU kernel
    try:
        with Device() as device:
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def to_device(values: Any) -> Any:
    """Move all tensors of a nested structure to the device."""
    return tree_map(lambda x: DeviceTensor(x) if isinstance(x, Tensor) else x, values)


def move_module(module: nn.Module) -> nn.Module:
    """Move parameters and buffers of a module to the device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(DeviceTensor(parameter.detach()), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = DeviceTensor(buffer)
    return module
