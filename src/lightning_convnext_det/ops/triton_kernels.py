"""Whether the kernels written in Triton can be used here."""

import importlib.util
import os
from functools import cache


def has_triton() -> bool:
    """Tell whether Triton is installed and ``DISABLE_CUSTOM_KERNELS=1`` does not turn its kernels off."""
    return os.environ.get("DISABLE_CUSTOM_KERNELS") != "1" and _is_installed()


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
