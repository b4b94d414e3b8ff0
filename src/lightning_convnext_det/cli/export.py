"""The command ``export``: a checkpoint to a file that runs without this package, compared with the detector."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_convnext_det.cli.commands import TOOLS
from lightning_convnext_det.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_convnext_det.data.datamodule import DetectionDataModule


def export(arguments: Sequence[str], run: Callable[[Sequence[str]], int]) -> int:
    """Export a checkpoint."""
    options = _create_parser().parse_args(arguments)
    from lightning_convnext_det.inference.export.export import export as export_detector
    from lightning_convnext_det.inference.export.export import verify_file
    from lightning_convnext_det.inference.export.triton import write_triton
    from lightning_convnext_det.modules.registry import load_module

    images = _read_images(options.verify, options.verify_images) if options.verify else []
    module = load_module(options.checkpoint)
    if options.verify_only:
        sys.stdout.write(f"{verify_file(module, options.destination, images).differences}\n")
        return 0
    calibration: list[Tensor] = []
    annotated = None
    if options.precision == "int8":
        calibration, annotated = _calibrate_on(options.calibration, options.calibration_images, module.class_names)
    report = export_detector(
        module,
        options.destination,
        format=options.format,
        precision=options.precision,
        dynamic=_split(options.dynamic, ("batch", "height", "width"), "dynamic"),
        include=_split(options.include, ("resize", "normalise"), "include"),
        attention=options.attention,
        batch_size=options.batch_size,
        image_size=tuple(options.image_size),
        images=images,
        calibration=calibration,
        annotated=annotated,
        source=options.checkpoint,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    sys.stdout.write(f"{report}\n")
    if options.triton:
        sys.stdout.write(f"written: {write_triton(report.path, Path(options.triton))} (Triton's model repository)\n")
    return 0


def _create_parser() -> argparse.ArgumentParser:
    text = TOOLS["export"]
    parser = argparse.ArgumentParser("convnext-det export", description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("checkpoint", help="of a detector of this package")
    parser.add_argument("destination", help="OUT.onnx, OUT.pt2, OUT.safetensors or a folder OUT_openvino")
    parser.add_argument(
        "--format",
        choices=("onnx", "pt2", "compiled", "openvino", "weights"),
        help="compiled: AOTInductor, by a C++ compiler; weights: safetensors and a JSON card; default: by the name",
    )
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "int8"), help="int8: OpenVINO only")
    parser.add_argument("--dynamic", default="batch,height,width", help="axes that stay free; '' for none")
    parser.add_argument("--include", default="resize,normalise", help="what the file does itself; '' for neither")
    parser.add_argument(
        "--attention", default="gather", choices=("gather", "grid_sample"),
        help="operator of deformable attention; TensorRT computes GridSample wrongly",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=1, help="where batch is not dynamic")
    parser.add_argument(
        "--image_size", type=int, nargs=2, default=(640, 640), metavar=("HEIGHT", "WIDTH"), help="where not dynamic"
    )
    parser.add_argument("--verify", metavar="IMAGES", help="file or folder of images to compare on; default: synthetic")
    parser.add_argument("--verify_images", type=int, default=20, help="how many of them, evenly spread")
    parser.add_argument("--verify_only", action="store_true", help="compare an existing file, and write nothing")
    parser.add_argument(
        "--calibration",
        metavar="DIR",
        help="for int8: dataset (its validation split gives the mAP) or folder of images",
    )
    parser.add_argument("--calibration_images", type=int, default=300, help="how many of them")
    parser.add_argument("--triton", metavar="DIR", help="also write the ONNX file into a model repository of Triton")
    return parser


def _split(text: str, allowed: tuple[str, ...], name: str) -> list[Any]:  # of the allowed words
    words = [word for word in text.split(",") if word]
    for word in words:
        if word not in allowed:
            raise ArgumentError(f"{name}: '{word}' is none of {', '.join(allowed)}")
    return words


def _read_images(place: str, limit: int) -> "list[Tensor]":
    """Up to ``limit`` images of a file or folder, evenly spread."""
    from lightning_convnext_det.data.io.decode import read_image
    from lightning_convnext_det.data.io.listing import walk_images

    path = Path(place)
    files = [path] if path.is_file() else walk_images([path])
    if not files:
        raise DataError(f"[LCD-P001] {place}: there is no image")
    step = max(1, len(files) // limit)
    return [read_image(file) for file in files[::step][:limit]]


def _calibrate_on(
    folder: str | None, limit: int, class_names: list[str]
) -> "tuple[list[Tensor], Callable[[], Iterator[Any]] | None]":
    """Images to calibrate on, and, of a dataset, what makes the batches of its validation split."""
    from lightning_convnext_det.data.datamodule import DetectionDataModule

    if folder is None:
        raise ArgumentError(
            "int8 needs images to calibrate on; give --calibration DIR, a dataset or a folder of images"
        )
    data = DetectionDataModule(folder, batch_size=1, num_workers=0)
    try:
        names = data.class_names
    except DataError:  # no annotations
        return _read_images(folder, limit), None
    if names != class_names:
        raise DataError(f"[LCD-D120] {folder} has the classes {names}, the checkpoint {class_names}")
    table = data.annotations("train")
    assert table is not None  # a dataset has one
    step = max(1, len(table) // limit)
    paths = [table.path(index) for index in range(0, len(table), step)][:limit]
    from lightning_convnext_det.data.io.decode import read_image

    return [read_image(path) for path in paths], partial(_validation_batches, data)


def _validation_batches(data: "DetectionDataModule") -> Iterator[Any]:
    data.setup("validate")
    loader = data.val_dataloader()
    assert not isinstance(loader, list)  # only where validation is switched off
    for batch in loader:
        images, targets = batch[0], batch[1]
        yield images, targets
