"""Whether an exporter or tracer records the operators that run, and which deformable attention it is to record."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

Attention = Literal["gather", "grid_sample"]

_attention: ContextVar[Attention] = ContextVar("attention", default="grid_sample")


def is_recording() -> bool:
    """Tell whether ``torch.export`` or ``torch.jit.trace`` records the caller, so that only torch's operators fit."""
    # torch.jit's own function: torch.compile knows it, and would break the graph at torch._C._is_tracing
    return torch.compiler.is_exporting() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def recorded_attention() -> Attention:
    """Return the operator by which deformable attention is recorded."""
    return _attention.get()


@contextmanager
def record_attention(operator: Attention) -> Iterator[None]:
    """Record deformable attention by ``grid_sample``, or by ``gather`` for runtimes that compute the former wrongly."""
    token = _attention.set(operator)
    try:
        yield
    finally:
        _attention.reset(token)
