"""The command ``export``: a checkpoint to a file that runs without this package, compared with the detector."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning_convnext_det.cli.commands import TOOLS
from lightning_convnext_det.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_convnext_det.data.datamodule import DetectionDataModule
    from lightning_convnext_det.data.io.pixels import Channels
    from lightning_convnext_det.modules.detection import DetectionModule


def export(arguments: Sequence[str], run: Callable[[Sequence[str]], int]) -> int:
    """Export a checkpoint."""
    options = _create_parser().parse_args(arguments)
    from lightning_convnext_det.inference.export.export import export as export_detector
    from lightning_convnext_det.inference.export.export import verify_file
    from lightning_convnext_det.inference.export.triton import triton_folder, write_triton
    from lightning_convnext_det.modules.registry import load_module

    for name in ("verify_images", "calibration_images"):
        if getattr(options, name) < 1:
            raise ArgumentError(f"{name} is {getattr(options, name)}; it must be at least 1")
    if options.calibration and options.precision != "int8":
        raise ArgumentError("calibration is for int8; give --precision int8 with it")
    if options.triton and not options.verify_only:
        triton_folder(Path(options.destination), Path(options.triton))  # before the export, which may take minutes
    module = load_module(options.checkpoint)
    images = list(_ImageFiles(options.verify, options.verify_images, module)) if options.verify else []
    if options.verify_only:
        compared = verify_file(module, options.destination, images).differences
        sys.stdout.write(f"{compared or 'the weights are those of the checkpoint'}\n")
        return 0
    calibration: Sequence[Tensor] = []
    annotated = None
    if options.precision == "int8":
        calibration, annotated = _calibrate_on(options.calibration, options.calibration_images, module)
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
        "--attention", choices=("gather", "grid_sample"),
        help="operator of deformable attention; default: grid_sample for OpenVINO and .pt2, where it is faster, else "
        "gather, since TensorRT computes GridSample wrongly",
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


class _ImageFiles(Sequence["Tensor"]):
    """Up to ``limit`` images of a file, a folder or a list of files, evenly spread; read as the detector reads them."""

    def __init__(self, place: str | Sequence[Path], limit: int, module: "DetectionModule") -> None:
        from lightning_convnext_det.data.io.listing import walk_images

        files = [Path(place)] if isinstance(place, str) else place
        files = walk_images(files) if isinstance(place, str) and not files[0].is_file() else files
        if not files:
            raise DataError(f"[LCD-P001] {place}: there is no image")
        count = min(limit, len(files))
        self._files = [files[i * len(files) // count] for i in range(count)]
        self._channels, self._grey = cast("Channels", module.in_chans), module.grey_range

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:  # a number; slices are not needed
        from lightning_convnext_det.data.io.pixels import GreyRange
        from lightning_convnext_det.inference.images import PixelFormat, read_source

        grey = None if self._grey is None else GreyRange(*self._grey)
        return read_source(self._files[index], "", pixel_format=PixelFormat(self._channels, grey))


def _calibrate_on(
    folder: str | None, limit: int, module: "DetectionModule"
) -> "tuple[Sequence[Tensor], Callable[[], Iterator[Any]] | None]":
    """Images to calibrate on, and, of a dataset, what makes the batches of its validation split."""
    from lightning_convnext_det.data.datamodule import DetectionDataModule

    if folder is None:
        raise ArgumentError(
            "int8 needs images to calibrate on; give --calibration DIR, a dataset or a folder of images"
        )
    data = DetectionDataModule(folder, batch_size=1, num_workers=0, in_chans=cast("Channels", module.in_chans))
    if module.grey_range is not None:
        data.load_state_dict({"value_range": list(module.grey_range)})
    try:
        names = data.class_names
    except DataError as error:
        if not str(error).startswith("[LCD-L002]"):  # there are annotations, or no folder
            raise
        return _ImageFiles(folder, limit, module), None
    if names != module.class_names:
        raise DataError(f"[LCD-D120] {folder} has the classes {names}, the checkpoint {module.class_names}")
    table = data.annotations("train")
    assert table is not None  # a dataset has one
    paths = [table.path(index) for index in range(len(table))]
    return _ImageFiles(paths, limit, module), partial(_validation_batches, data)


def _validation_batches(data: "DetectionDataModule") -> Iterator[Any]:
    data.setup("validate")
    loader = data.val_dataloader()
    assert not isinstance(loader, list)  # only where validation is switched off
    for batch in loader:
        images, targets = batch[0], batch[1]
        yield images, targets
