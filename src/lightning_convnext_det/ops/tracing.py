"""Whether an exporter or tracer records the operators that run."""

import torch


def is_recording() -> bool:
    """Tell whether ``torch.export`` or ``torch.jit.trace`` records the caller, so that only torch's operators fit."""
    # torch.jit's own function: torch.compile knows it, and would break the graph at torch._C._is_tracing
    return torch.compiler.is_exporting() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
