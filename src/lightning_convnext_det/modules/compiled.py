"""``torch.compile`` of the parts of a detector that have fixed arithmetic: backbone, pyramid, heads or transformer."""

import logging

from torch import nn

from lightning_convnext_det.errors import ArgumentError

_logger = logging.getLogger(__name__)


def compile_parts(detector: nn.Module, backend: str = "inductor") -> None:
    """Let ``torch.compile`` take each of ``detector.compiled_parts`` as one graph; state dicts keep their names.

    Parts are compiled when they are first called, and again for the second and the third size of images; the graphs
    of the third serve all sizes. Batches that differ in more, such as one without padding, get graphs of their own.

    Raises:
        ArgumentError: if the detector names no parts.
    """
    names: list[str] = getattr(detector, "compiled_parts", [])
    if not names:
        raise ArgumentError(
            f"compile is true, but {type(detector).__name__} has no compiled_parts; leave it false, or give the "
            "trainer torch.compile(module)"
        )
    _logger.info("compiling %s: the first steps of the first three image sizes take longer", ", ".join(names))
    for name in names:
        detector.get_submodule(name).compile(backend=backend)
