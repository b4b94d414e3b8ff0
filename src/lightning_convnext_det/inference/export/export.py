"""Export of a trained detector to a file that runs without this package, and its comparison with the detector."""

import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_convnext_det.arguments import Count, check_arguments
from lightning_convnext_det.errors import ArgumentError, ExportError
from lightning_convnext_det.inference.export.accuracy import Accuracy, measure_map
from lightning_convnext_det.inference.export.graph import Axis, ExportGraph, Part, record
from lightning_convnext_det.inference.export.metadata import as_text, describe, read_precision, write_weights
from lightning_convnext_det.inference.export.onnx_file import write_onnx
from lightning_convnext_det.inference.export.openvino_folder import write_openvino
from lightning_convnext_det.inference.export.runtimes import load_runner
from lightning_convnext_det.inference.export.torch_file import write_compiled, write_torch
from lightning_convnext_det.inference.export.verify import TOLERANCES, Differences, Tolerance, create_batches, verify
from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.deformable_detr.detector import QueryDetector
from lightning_convnext_det.ops.tracing import Attention

Format = Literal["onnx", "pt2", "compiled", "openvino", "weights"]
Precision = Literal["fp32", "fp16", "int8"]
_PRECISIONS: dict[Format, tuple[Precision, ...]] = {
    "onnx": ("fp32", "fp16"), "pt2": ("fp32",), "compiled": ("fp32",), "openvino": ("fp32", "fp16", "int8"),
    "weights": ("fp32",),
}  # fmt: skip
ALLOWED_LOSS = 0.01  # of mAP, in int8


@dataclass
class ExportReport:
    """What was written, and how far it is from the detector."""

    path: Path
    format: Format
    differences: Differences | None = None
    """Greatest differences from the detector; None if it was not compared."""
    accuracy: Accuracy | None = None
    """mAP before and after quantisation."""

    def __str__(self) -> str:
        size = sum(file.stat().st_size for file in ([self.path] if self.path.is_file() else self.path.iterdir()))
        lines = [f"written: {self.path} ({self.format}, {size / 1e6:.1f} MB)"]
        lines += [str(part) for part in (self.differences, self.accuracy) if part is not None]
        return "\n".join(lines)


def export(
    detector: nn.Module,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    format: Format | None = None,
    precision: Precision = "fp32",
    dynamic: Collection[Axis] = ("batch", "height", "width"),
    include: Collection[Part] = ("resize", "normalise"),
    attention: Attention = "gather",
    batch_size: Count = 1,
    image_size: tuple[Count, Count] = (640, 640),
    images: Sequence[Tensor] = (),
    tolerance: Tolerance | None = None,
    calibration: Sequence[Tensor] = (),
    annotated: Callable[[], Any] | None = None,
    source: str | Path | None = None,
    progress: Callable[[str], object] | None = None,
) -> ExportReport:
    """Write a detector to a file that runs without this package, load the file again, and compare it.

    The file takes images [B, C, H, W] of one size, uint8, as ``images``, and returns what `ExportGraph` does:
    ``boxes``, ``scores``, ``labels`` and ``count``.

    Args:
        detector: a detector of this package, or the module that holds one, whose class names are then the default.
        path: ``.onnx``, ``.pt2``, ``.safetensors``, or a folder whose name ends in ``_openvino``.
        class_names: in order of label, for the file's metadata.
        category_ids: the dataset's own ids, in order of label.
        format: ``onnx``, ``pt2``, ``compiled`` (AOTInductor), ``openvino`` or ``weights`` (default: by the path).
        precision: ``fp32``; ``fp16`` for ONNX and OpenVINO; ``int8`` for OpenVINO.
        dynamic: axes that stay free; others are fixed to ``batch_size`` and ``image_size``.
        include: ``resize`` and ``normalise`` are done by the file; what is left out is done before it.
        attention: deformable attention by ``gather``, or by ``grid_sample``, which TensorRT computes wrongly.
        batch_size: where ``batch`` is not dynamic.
        image_size: (height, width) in pixels, where they are not dynamic.
        images: uint8 [C, H, W], to compare on (default: synthetic ones).
        tolerance: greatest differences allowed (default: by the precision).
        calibration: uint8 images [C, H, W] for ``int8``; some hundred of the kind that the detector will see.
        annotated: makes an iterator of (images, targets), on which mAP is measured before and after ``int8``.
        source: the checkpoint, whose SHA-256 goes into the metadata.
        progress: called with a line before each stage, which may take a minute.

    Returns:
        The greatest differences.

    Raises:
        ArgumentError: if arguments do not go together, a package is missing, or the detector cannot be exported.
        ExportError: if the file differs from the detector by more than the tolerance; it is removed.

    Examples:
        >>> from tempfile import mkdtemp
        >>> from lightning_convnext_det import FasterRCNN
        >>> detector = FasterRCNN(2, "test_convnext", min_size=64, max_size=96)
        >>> report = export(detector, mkdtemp() + "/weights.safetensors", class_names=["cat", "dog"])
        >>> report.path.name, report.format
        ('weights.safetensors', 'weights')
    """
    check_arguments(export, locals())
    path = Path(path)
    kind = _choose_format(path, format, precision)
    network, names, ids = _unpack(detector, class_names, category_ids)
    order = [part for part in get_args(Part) if part in include]
    card = describe(
        network, names, ids, source, format=kind, precision=precision, include=order,
        dynamic=[axis for axis in get_args(Axis) if axis in dynamic],
    )  # fmt: skip
    if not path.parent.is_dir():
        raise ArgumentError(f"'{path}': there is no such folder")
    report = ExportReport(path, kind)
    if kind == "weights":
        write_weights(network.state_dict(), card, path)
        return report
    channels = next((part.in_chans for part in network.modules() if isinstance(part, TimmPyramid)), 3)
    fixed = tuple(None if axis in dynamic else side for axis, side in zip(("height", "width"), image_size, strict=True))
    counts = (1, 2, 5) if "batch" in dynamic else (batch_size,)
    graph = ExportGraph(network, order)
    example = next(
        create_batches([torch.zeros(channels, *image_size, dtype=torch.uint8)], [3 if len(counts) > 1 else batch_size])
    )
    say = progress or (lambda line: None)
    say("recording the detector: about a minute, with a large backbone some minutes")
    program = record(graph, example if "normalise" in order else example.float(), dynamic, attention)
    say(f"writing {kind}, {precision}")
    _write(program, path, kind, precision, card, calibration, isinstance(network, QueryDetector))
    say(f"comparing '{path}' with the detector")
    try:
        run = load_runner(path)
        if precision == "int8":
            report.accuracy = measure_map(run, network, names, annotated, order, ALLOWED_LOSS, path)
        else:
            batches = create_batches(images, counts, fixed, channels)  # type: ignore[arg-type]  # two sides
            limit = tolerance or TOLERANCES[precision]
            report.differences = verify(run, network, batches, order, limit, path, _resized_otherwise(kind, tolerance))
    except ExportError:
        _remove(path)
        raise
    return report


def verify_file(
    detector: nn.Module, path: str | Path, images: Sequence[Tensor] = (), tolerance: Tolerance | None = None
) -> ExportReport:
    """Compare an existing exported file with a detector; the file stays.

    Raises:
        ExportError: if it differs by more than the tolerance, or cannot be loaded.
    """
    path = Path(path)
    network, _, _ = _unpack(detector, None, None)
    run = load_runner(path)
    report = ExportReport(path, _choose_format(path, None, "fp32"))
    report.differences = verify(
        run,
        network,
        create_batches(images, (1,)),
        ("resize", "normalise"),
        tolerance or TOLERANCES["fp32" if read_precision(path) == "fp32" else "fp16"],
        path,
        _resized_otherwise(report.format, tolerance),
    )
    return report


def _resized_otherwise(kind: Format, given: Tolerance | None) -> Tolerance | None:
    # OpenVINO computes in float32 what others compute in float64: of one size in ten a side becomes a pixel shorter
    return (given or TOLERANCES["fp16"]) if kind == "openvino" else None


def _write(
    program: torch.export.ExportedProgram,
    path: Path,
    kind: Format,
    precision: Precision,
    card: dict[str, Any],
    calibration: Sequence[Tensor],
    is_transformer: bool,
) -> None:
    if kind == "onnx":
        write_onnx(program, path, as_text(card), "fp16" if precision == "fp16" else "fp32")
    elif kind == "openvino":
        with tempfile.TemporaryDirectory() as folder:
            between = Path(folder) / "model.onnx"
            write_onnx(program, between, {})
            write_openvino(between, path, card, precision, (image[None] for image in calibration), is_transformer)
    else:
        (write_torch if kind == "pt2" else write_compiled)(program, path, card)


def _choose_format(path: Path, kind: Format | None, precision: Precision) -> Format:
    suffixes: dict[str, Format] = {".onnx": "onnx", ".pt2": "pt2", ".safetensors": "weights"}
    by_name = "openvino" if path.name.endswith("_openvino") else suffixes.get(path.suffix)
    chosen = kind or by_name
    if chosen is None:
        raise ArgumentError(f"'{path}' must end in .onnx, .pt2, .safetensors or _openvino")
    if precision not in _PRECISIONS[chosen]:
        raise ArgumentError(f"[LCD-X002] {chosen} has {', '.join(_PRECISIONS[chosen])}, not {precision}")
    return chosen


def _unpack(
    detector: nn.Module, class_names: Sequence[str] | None, category_ids: Sequence[int] | None
) -> tuple[nn.Module, list[str], list[int]]:
    """The network of a module with the names and ids of its classes."""
    network = getattr(detector, "detector", detector)
    count: int = network.num_classes  # type: ignore[assignment]  # every detector has it
    names = list(class_names or getattr(detector, "class_names", None) or [str(i) for i in range(count)])
    ids = list(category_ids or getattr(detector, "category_ids", None) or range(count))
    for what, values in (("class_names", names), ("category_ids", ids)):
        if len(values) != count:
            raise ArgumentError(f"{what} has {len(values)} entries, but the detector has {count} classes")
    return network, names, ids


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
