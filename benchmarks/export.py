"""mAP, latency and size of a trained detector's exported files beside the detector, in one run.

    python benchmarks/export.py CKPT DATASET [--images 30] [--formats onnx-fp32,onnx-fp16,openvino-fp32,...]

Latency is the median of one image at a time, images of the dataset at their own size, all files in turn for each image.
"""

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lightning_convnext_det import DetectionDataModule, load_module
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.errors import UserError
from lightning_convnext_det.inference.export.accuracy import as_detector, evaluate
from lightning_convnext_det.inference.export.export import export
from lightning_convnext_det.inference.export.runtimes import load_runner

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
    with tempfile.TemporaryDirectory() as folder:
        for name in options.formats.split(","):
            kind, _, precision = name.partition("-")
            path = (
                Path(folder) / {"onnx": f"{precision}.onnx", "openvino": f"{precision}_openvino", "pt2": "a.pt2"}[kind]
            )
            start = time.process_time()
            try:
                images = [annotated[i][0][0] for i in (0, 1)]
                report = export(module, path, precision=precision, calibration=calibration, images=images)
            except UserError as error:
                print(f"{name}: {error}", flush=True)
                continue
            print(f"{name}: {report.differences}; {time.process_time() - start:.0f} CPU s to export", flush=True)
            files = [path] if path.is_file() else path.iterdir()
            sizes[name] = sum(file.stat().st_size for file in files)
            detect[name] = as_detector(load_runner(path), module.detector, BOTH)
        seconds = {name: [] for name in detect}
        for images, _ in annotated[: options.images]:
            for name, run in detect.items():
                start = time.perf_counter()
                with torch.no_grad():
                    run(list(images))
                seconds[name].append(time.perf_counter() - start)
        print("\n| file | mAP | latency ms | size MB |\n|---|---|---|---|")
        for name, run in detect.items():
            found, _ = evaluate(run, annotated, module.class_names, module.detector if name == "eager" else None)
            milliseconds = 1000 * statistics.median(seconds[name])
            print(f"| {name} | {100 * found:.2f} | {milliseconds:.0f} | {sizes[name] / 1e6:.1f} |", flush=True)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
