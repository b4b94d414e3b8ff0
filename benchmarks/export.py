"""mAP, latency and size of a trained detector's exported files beside the detector, in one run.

    python benchmarks/export.py CKPT DATASET [--images 30] [--formats onnx-fp32,onnx-fp16,openvino-fp32,...]

Latency is the median processor time of one image, images of the dataset at their own size, all files in turn for each;
with one thread (OMP_NUM_THREADS=1) it is the time on an idle machine.
"""

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from pathlib import Path

import onnx
import torch

from lightning_convnext_det import DetectionDataModule, load_module
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.inference.export.accuracy import as_detector, evaluate
from lightning_convnext_det.inference.export.graph import ExportGraph, record
from lightning_convnext_det.inference.export.onnx_file import halve, write_onnx
from lightning_convnext_det.inference.export.openvino_folder import write_openvino
from lightning_convnext_det.inference.export.runtimes import load_runner
from lightning_convnext_det.inference.export.torch_file import write_torch
from lightning_convnext_det.models.deformable_detr.detector import QueryDetector

BOTH = ("resize", "normalise")
ALL = "onnx-fp32,onnx-fp16,openvino-fp32,openvino-fp16,openvino-int8,pt2-fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("dataset")
    parser.add_argument("--images", type=int, default=30, help="to measure latency on")
    parser.add_argument("--calibration", type=int, default=100)
    parser.add_argument("--formats", default=ALL)
    options = parser.parse_args()
    module = load_module(options.checkpoint)
    module.requires_grad_(False)
    data = DetectionDataModule(options.dataset, batch_size=1, num_workers=0)
    data.setup("test")
    annotated = [(batch[0], batch[1]) for batch in data.test_dataloader()]
    table = data.annotations("train")
    step = max(1, len(table) // options.calibration)
    calibration = [read_image(table.path(i)) for i in range(0, len(table), step)][: options.calibration]
    print(f"{datetime.date.today()}, {processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print(
        f"{Path(options.checkpoint).name}, {len(annotated)} test images, {len(calibration)} calibration images",
        flush=True,
    )
    detect, sizes = {"eager": lambda images: module(images)}, {"eager": Path(options.checkpoint).stat().st_size}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start = time.process_time()
        example, is_transformer = (
            torch.zeros(3, 3, 640, 640, dtype=torch.uint8),
            isinstance(module.detector, QueryDetector),
        )
        program = record(ExportGraph(module.detector), example)
        print(f"recorded in {time.process_time() - start:.0f} CPU s", flush=True)
        write_onnx(program, folder / "fp32.onnx", {})
        other, other_onnx = program, folder / "fp32.onnx"  # of OpenVINO and .pt2, as `export` writes them
        if is_transformer:
            other, other_onnx = (
                record(ExportGraph(module.detector), example, attention="grid_sample"),
                folder / "other.onnx",
            )
            write_onnx(other, other_onnx, {})
        for name in options.formats.split(","):
            kind, _, precision = name.partition("-")
            start = time.process_time()
            if kind == "onnx":
                path = folder / f"{precision}.onnx"
                if precision == "fp16":  # what write_onnx does, without translating again
                    model = onnx.load(folder / "fp32.onnx")
                    halve(onnx, model)
                    onnx.save(model, path)
            elif kind == "openvino":
                path = folder / f"{precision}_openvino"
                images = [image[None] for image in calibration]
                source = folder / "fp32.onnx" if precision == "int8" else other_onnx
                write_openvino(source, path, {}, precision, images, is_transformer)
            else:
                path = folder / "fp32.pt2"
                write_torch(other, path, {})
            print(f"{name}: {time.process_time() - start:.0f} CPU s to write", flush=True)
            files = [path] if path.is_file() else path.iterdir()
            sizes[name] = sum(file.stat().st_size for file in files)
            detect[name] = as_detector(load_runner(path), lambda image: image)
        seconds = {name: [] for name in detect}
        for images, _ in annotated[: options.images]:
            for name, run in detect.items():
                start = time.process_time()
                with torch.no_grad():
                    run(list(images))
                seconds[name].append(time.process_time() - start)
        print("\n| file | mAP | CPU ms | size MB |\n|---|---|---|---|")
        for name, run in detect.items():
            found, _ = evaluate(run, annotated, module.class_names)
            milliseconds = 1000 * statistics.median(seconds[name])
            print(f"| {name} | {100 * found:.2f} | {milliseconds:.0f} | {sizes[name] / 1e6:.1f} |", flush=True)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
