"""Numbers of the host on a device, without waiting for the device.

``torch.tensor(values, device="cuda")`` and ``new_tensor`` make the host wait until the device has done all that it was
given: a few hundred such waits per training step would leave a GPU idle for most of it.
"""

from typing import Any

import torch
from torch import Tensor


def send(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:  # Any: nested numbers
    """Make a tensor on a device from a few numbers of the host.

    >>> send([2, 3], torch.device("cpu"))
    tensor([2, 3])

    Args:
        values: numbers, nested sequences of them, or a tensor of the host.
        device: where the tensor is to be.
        dtype: of the tensor (default: as ``torch.as_tensor`` chooses).
    """
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)
