"""Networks whose weights are not float32, after ``half()``, ``bfloat16()`` or ``double()``."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def weight_precision(weight: Tensor) -> AbstractContextManager[object]:
    """Compute as autocast does where weights are float16 or bfloat16: norms, softmax and losses in float32.

    Args:
        weight: one of the network's.
    """
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return nullcontext()
    return torch.autocast("cpu" if weight.is_meta else weight.device.type, weight.dtype)
