"""Detectors as a ``.pt2`` file of ``torch.export``, or as a compiled package of AOTInductor."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_convnext_det.errors import ArgumentError, first_line


def write_torch(program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a recorded graph, which ``torch.export.load(path).module()`` runs without this package.

    A detector with NMS needs ``import torchvision`` before, whose NMS and RoIAlign it calls. The description is the
    file's entry ``metadata.json``: ``extra_files = {"metadata.json": ""}; torch.export.load(path,
    extra_files=extra_files)``.
    """
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    with warnings.catch_warnings():  # some constants are parts of one tensor; the file is compared after writing
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})


def write_compiled(program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    """Compile a recorded graph for this machine's processor; ``torch._inductor.aoti_load_package`` runs it.

    Raises:
        ArgumentError: if the graph cannot be compiled.
    """
    try:
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=os.fspath(path),
            inductor_configs={"aot_inductor.metadata": {k: json.dumps(v) for k, v in metadata.items()}},
        )
    except Exception as error:  # inductor and the compiler have errors of many kinds
        raise ArgumentError(f"[LCD-X002] AOTInductor cannot compile the detector: {first_line(error)}") from error
