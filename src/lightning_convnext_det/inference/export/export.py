"""Export of a trained detector to a file that runs without this package, and its comparison with the detector."""

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_convnext_det.arguments import Count, check_arguments
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.inference.export.accuracy import Accuracy, measure_map
from lightning_convnext_det.inference.export.destination import Format, Precision, choose_format, replacing
from lightning_convnext_det.inference.export.graph import Axis, ExportGraph, Part, record
from lightning_convnext_det.inference.export.metadata import (
    as_text,
    describe,
    name_classes,
    read_card,
    weights_of,
    write_card,
    write_weights,
)
from lightning_convnext_det.inference.export.onnx_file import write_onnx
from lightning_convnext_det.inference.export.openvino_folder import write_openvino
from lightning_convnext_det.inference.export.optional import check_installed
from lightning_convnext_det.inference.export.runtimes import load_runner
from lightning_convnext_det.inference.export.torch_file import write_compiled, write_torch
from lightning_convnext_det.inference.export.verify import (
    TOLERANCES,
    Differences,
    Tolerance,
    check_image,
    create_batches,
    verify,
    verify_weights,
)
from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.deformable_detr.detector import QueryDetector
from lightning_convnext_det.models.fused import FusedDetector
from lightning_convnext_det.models.tiling import TiledDetector
from lightning_convnext_det.ops.tracing import Attention

ALLOWED_LOSS = 0.01  # of mAP, in int8
_REASONS: dict[Attention, str] = {
    "gather": "every runtime computes it right, also in int8; grid_sample can be faster",
    "grid_sample": "this kind of file is faster with it than with gather",
}
_OPENVINO_PRECISION = (
    "OpenVINO computes in bfloat16 where the processor can, which moves boxes by pixels; the comparison sets "
    "INFERENCE_PRECISION_HINT to f32, which you can, too"
)


@dataclass
class ExportReport:
    """What was written, and how far it is from the detector."""

    path: Path
    format: Format
    differences: Differences | None = None
    """Greatest differences from the detector; None if it was not compared."""
    accuracy: Accuracy | None = None
    """mAP before and after quantisation."""
    precision: Precision = "fp32"
    """Of the file."""

    def __str__(self) -> str:
        size = sum(file.stat().st_size for file in ([self.path] if self.path.is_file() else self.path.iterdir()))
        lines = [f"written: {self.path} ({self.format}, {size / 1e6:.1f} MB)"]
        lines += [str(part) for part in (self.differences, self.accuracy) if part is not None]
        if self.precision == "int8" and self.accuracy is None:
            lines.append("its mAP was not measured: the calibration images have no annotations")
        return "\n".join(lines)


@torch.inference_mode(False)  # whose tensors cannot be recorded
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
    attention: Attention | None = None,
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
    ``boxes``, ``scores``, ``labels`` and ``count``. What was at the path stays until the file has passed.

    Args:
        detector: a detector of this package, or the module that holds one, whose class names are then the default.
        path: ``.onnx``, ``.pt2``, ``.safetensors``, or a folder whose name ends in ``_openvino``.
        class_names: in order of label, for the file's metadata.
        category_ids: the dataset's own ids, in order of label.
        format: ``onnx``, ``pt2``, ``compiled`` (AOTInductor), ``openvino`` or ``weights`` (default: by the path).
        precision: ``fp32``; ``fp16`` for ONNX and OpenVINO; ``int8`` for OpenVINO.
        dynamic: axes that stay free; others are fixed to ``batch_size`` and ``image_size``.
        include: ``resize`` and ``normalise`` are done by the file; what is left out is done before it.
        attention: deformable attention by ``gather`` (default of ONNX and compiled files), or by ``grid_sample``
            (default of OpenVINO and ``.pt2``, faster there), which TensorRT computes wrongly; ``int8`` has gathers.
        batch_size: where ``batch`` is not dynamic.
        image_size: (height, width) in pixels, where they are not dynamic.
        images: uint8 [C, H, W], to compare on (default: synthetic ones); for ``int8`` differences are told only.
        tolerance: greatest differences allowed (default: by the precision).
        calibration: uint8 images [C, H, W] for ``int8``; some hundred of the kind that the detector will see.
        annotated: makes an iterator of (images, targets), on which mAP is measured before and after ``int8``.
        source: the checkpoint, whose SHA-256 goes into the metadata.
        progress: called with a line before each stage, which may take a minute.

    Returns:
        The greatest differences.

    Raises:
        ArgumentError: if arguments do not go together, a package is missing, or the detector cannot be exported.
        ExportError: if the file differs from the detector by more than the tolerance; nothing is written.

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
    kind = choose_format(path, format, precision)
    if precision == "int8" and not len(calibration):
        raise ArgumentError("int8 needs images to calibrate on; give some hundred as calibration")
    if len(image_size) != 2:
        raise ArgumentError(f"image_size is {image_size}; expected (height, width)")
    network, names, ids = _unpack(detector, class_names, category_ids)
    order, axes = _choose("include", include, get_args(Part)), _choose("dynamic", dynamic, get_args(Axis))
    lengths = [None if axis in axes else n for axis, n in zip(get_args(Axis), (batch_size, *image_size), strict=True)]
    fixed, counts = (lengths[1], lengths[2]), (1, 2, 5) if lengths[0] is None else (batch_size,)
    channels = _channels(network)
    card = describe(
        network, names, ids, source, format=kind, precision=precision, include=order, dynamic=axes,
        images=[lengths[0], channels, *fixed], score_thresholds=getattr(detector, "score_thresholds", None),
        grey_range=getattr(detector, "grey_range", None),
    )  # fmt: skip
    report = ExportReport(path, kind, precision=precision)
    if kind == "weights":
        with replacing(path, kind) as written:
            write_weights(weights_of(network), card, written)
        return report
    check_installed(kind, precision)
    for what, given in (("images", images), ("calibration", calibration)):
        if len(given):
            check_image(given[0], channels, what)
    say = progress or (lambda line: None)
    is_transformer = isinstance(network, QueryDetector)
    operator = _choose_attention(attention, kind, precision, say) if is_transformer else "gather"
    graph = ExportGraph(network, order)
    blank = torch.zeros(channels, *image_size, dtype=torch.uint8)
    example = next(create_batches([blank], [3 if len(counts) > 1 else batch_size], in_chans=channels))
    _tell_unused(batch_size, image_size, axes, say)
    say("recording the detector: about a minute, with a large backbone some minutes")
    prepare = partial(graph.leave_to_file, batch_size=lengths[0] or 1, size=fixed)
    with replacing(path, kind) as written:
        program = record(graph, example if "normalise" in order else example.float(), axes, operator)
        say(f"writing {kind}, {precision}")
        _write(program, written, kind, precision, card, _Prepared(calibration, prepare), is_transformer)
        say(f"comparing '{path}' with the detector")
        if kind == "openvino":
            say(_OPENVINO_PRECISION)
        run = load_runner(written)
        if precision == "int8":  # moves single boxes, so that mAP decides
            report.accuracy = measure_map(run, graph, names, annotated, prepare, ALLOWED_LOSS, path)
            if report.accuracy is not None:
                write_card({**card, "accuracy": asdict(report.accuracy)}, written / "metadata.json")
        if len(images) or precision != "int8":
            batches = create_batches(images, counts, fixed, channels)
            limit, others = tolerance or _tolerance(precision), _resized_otherwise(kind, tolerance)
            report.differences = verify(run, network, batches, order, limit, path, others, precision != "int8")
        del run  # which may hold the file open
    return report


def verify_file(
    detector: nn.Module, path: str | Path, images: Sequence[Tensor] = (), tolerance: Tolerance | None = None
) -> ExportReport:
    """Compare an existing exported file with a detector; the file stays. Weights are compared bit for bit.

    Raises:
        ExportError: if it differs by more than the tolerance, or cannot be loaded.
    """
    path = Path(path)
    network, _, _ = _unpack(detector, None, None)
    if path.suffix == ".safetensors" and path.is_file():
        verify_weights(path, weights_of(network))
        return ExportReport(path, "weights")
    path = path.parent if path.name == "model.xml" else path
    run = load_runner(path)
    card = read_card(path)
    report = ExportReport(path, "openvino" if path.is_dir() else choose_format(path, None, "fp32"))
    batch, channels, height, width = card.get("images", (None, _channels(network), None, None))
    report.differences = verify(
        run,
        network,
        create_batches(images, (batch or 1,), (height, width), channels),
        card.get("include", get_args(Part)),
        tolerance or _tolerance(card.get("precision", "fp32")),
        path,
        _resized_otherwise(report.format, tolerance),
    )
    return report


class _Prepared(Sequence[Tensor]):
    """Images as a file takes them, prepared when they are asked for: some hundred photos are gigabytes."""

    def __init__(self, images: Sequence[Tensor], prepare: Callable[[Tensor], Tensor]) -> None:
        self._images, self._prepare = images, prepare

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:  # a number; slices are not needed
        return self._prepare(self._images[index][None])


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
            write_openvino(between, path, card, precision, calibration, is_transformer)
    else:
        (write_torch if kind == "pt2" else write_compiled)(program, path, card)


def _unpack(
    detector: nn.Module, class_names: Sequence[str] | None, category_ids: Sequence[int] | None
) -> tuple[nn.Module, list[str], list[int]]:
    """The network of a module with the names and ids of its classes."""
    detector = _without_compiler(detector)
    network = detector if hasattr(detector, "forward_tensors") else getattr(detector, "detector", None)
    network = _without_compiler(network)
    around = isinstance(detector, FusedDetector | TiledDetector)
    if around or not isinstance(network, nn.Module) or not hasattr(network, "forward_tensors"):
        raise ArgumentError(
            f"[LCD-X002] {type(detector).__name__} cannot be exported; a file holds one detector of this package, "
            "without windows, further views or other detectors around it"
        )
    count: int = network.num_classes  # type: ignore[assignment]  # every detector has it
    return network, *name_classes(detector, count, class_names, category_ids)


def _tell_unused(
    batch_size: int, image_size: Sequence[int], free: Collection[Axis], say: Callable[[str], object]
) -> None:
    """Tell that lengths of free axes, other than the defaults, have no effect."""
    for name, unused in (
        ("batch_size", batch_size != 1 and "batch" in free),
        ("image_size", tuple(image_size) != (640, 640) and {"height", "width"} <= set(free)),
    ):
        if unused:
            say(f"{name} is not used, as the file takes any; leave its axes out of dynamic to fix them")


def _choose_attention(
    given: Attention | None, kind: Format, precision: Precision, say: Callable[[str], object]
) -> Attention:
    """The operator of deformable attention; one that was not given is told with its reason."""
    if given == "grid_sample" and precision == "int8":
        raise ArgumentError("int8 with grid_sample loses 6 points of mAP on blood cells; leave attention at gather")
    chosen = given or ("grid_sample" if kind in ("openvino", "pt2") and precision != "int8" else "gather")
    if given is None:
        say(f"attention={chosen}: {_REASONS[chosen]}")
    return chosen


def _tolerance(precision: Precision) -> Tolerance:
    return TOLERANCES["fp32" if precision == "fp32" else "fp16"]


def _without_compiler(detector: Any) -> Any:
    """The module that ``torch.compile`` has wrapped, if it has: its weights have other names."""
    return getattr(detector, "_orig_mod", detector)


def _channels(network: nn.Module) -> int:
    return next((part.in_chans for part in network.modules() if isinstance(part, TimmPyramid)), 3)


def _choose(name: str, given: Collection[str], known: Sequence[Any]) -> list[Any]:  # of the known words
    words = [given] if isinstance(given, str) else list(given)
    for word in words:
        if word not in known:
            raise ArgumentError(f"{name}: '{word}' is none of {', '.join(known)}")
    return [word for word in known if word in words]
