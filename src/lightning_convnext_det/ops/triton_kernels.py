"""Whether the kernels written in Triton can be used here."""

import importlib.util
import os
import shutil
import sys
from functools import cache


def has_triton() -> bool:
    """Tell whether Triton can compile kernels here, and ``DISABLE_CUSTOM_KERNELS=1`` does not turn them off.

    On Linux it needs a C compiler to start them, which small images of containers lack.
    """
    return os.environ.get("DISABLE_CUSTOM_KERNELS") != "1" and _is_usable()


@cache
def _is_usable() -> bool:
    # triton/runtime/build.py: CC, gcc or clang; the build for Windows brings its own
    has_compiler = "CC" in os.environ or shutil.which("gcc") or shutil.which("clang") or sys.platform == "win32"
    return bool(has_compiler) and importlib.util.find_spec("triton") is not None
