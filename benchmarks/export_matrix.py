"""ONNX files of every detector with four backbones beside PyTorch: differences, seconds to export, size.

    python benchmarks/export_matrix.py IMAGES [--cells cascade/resnet50,...] [--rows rows.jsonl]

Weights are random, with heads that find many objects; images are small, since differences do not depend on their size
and the seconds of an export do not either. IMAGES is a folder of real images, resized to 20 shapes: odd ones, portrait
1:3, landscape 3:1. Two shapes also in batches of 2 and 5, and one image on which nothing is found. Each cell appends a
line to the rows, and the table of all rows is printed, so that cells can run one by one.
"""

import argparse
import datetime
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_convnext_det import CascadeRCNN, DeformableDETR, FasterRCNN
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.io.listing import walk_images
from lightning_convnext_det.inference.export.graph import ExportGraph, record
from lightning_convnext_det.inference.export.onnx_file import write_onnx
from lightning_convnext_det.inference.export.runtimes import Runner, load_runner
from lightning_convnext_det.inference.export.verify import Differences, Tolerance, compare
from lightning_convnext_det.models.tensor_detections import split_detections

DETECTORS = {"faster": FasterRCNN, "cascade": CascadeRCNN, "detr": DeformableDETR}
BACKBONES = ("convnext_tiny", "convnextv2_atto", "resnet50", "swin_tiny_patch4_window7_224")
SHAPES = [
    (160, 160), (161, 199), (240, 320), (320, 240), (375, 500), (333, 500), (427, 640), (480, 640), (97, 131), (131, 97),
    (150, 450), (450, 150), (201, 603), (603, 201), (127, 129), (255, 257), (512, 512), (640, 427), (181, 309), (224, 97),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images")
    parser.add_argument("--cells", default=",".join(f"{d}/{b}" for d in DETECTORS for b in BACKBONES))
    parser.add_argument("--rows", default="rows.jsonl")
    options = parser.parse_args()
    files = walk_images([Path(options.images)])
    real = [read_image(file) for file in files[:: max(1, len(files) // len(SHAPES))][: len(SHAPES)]]
    rows = Path(options.rows)
    for cell in filter(None, options.cells.split(",")):
        row = measure(*cell.split("/"), real)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
    print_table([json.loads(line) for line in rows.read_text().splitlines()])


def measure(detector_name: str, backbone: str, real: list[Tensor]) -> dict[str, object]:
    """Export one detector and compare it."""
    torch.manual_seed(0)
    detector = DETECTORS[detector_name](
        3, backbone=backbone, min_size=128, max_size=320, pretrained_backbone=False
    ).eval()
    spread(detector)
    given, empty = batches(real), choose_empty(detector, real)
    start = time.process_time()
    program = record(ExportGraph(detector), torch.zeros(3, 3, 640, 640, dtype=torch.uint8))
    recorded = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        write_onnx(program, path, {})
        seconds = time.process_time() - start
        run = load_runner(path)
        found = compare_all(run, detector, [*given, empty], Tolerance())
        objects = int(run(empty).count[0])
        megabytes = path.stat().st_size / 1e6
    return {
        "detector": detector_name, "backbone": backbone, "record_s": round(recorded), "export_s": round(seconds),
        "mb": round(megabytes, 1), "batches": len(found.shapes), "detections": found.detections,
        "boxes": found.boxes, "scores": found.scores, "unmatched": len(found.unmatched), "on_empty": objects,
        "date": str(datetime.date.today()), "cpu": processor(), "torch": torch.__version__,
    }  # fmt: skip


def choose_empty(detector: nn.Module, real: list[Tensor]) -> Tensor:
    """The image of one colour with the lowest scores, below which nothing is an object, if others have objects then."""
    plain = [torch.full((1, 3, 160, 200), grey, dtype=torch.uint8) for grey in (0, 114, 255)]
    with torch.no_grad():
        best = [float(detector(list(image))[0]["scores"].max()) for image in plain]
        threshold = min(best) + 1e-3
        scores = [detector([image])[0]["scores"] for image in real[:4]]
    if all((of_image > threshold).sum() > 3 for of_image in scores):
        detector.score_threshold = threshold
    return plain[best.index(min(best))]


def compare_all(run: Runner, detector: nn.Module, given: list[Tensor], tolerance: Tolerance) -> Differences:
    """What `verify` compares, without its limit."""
    differences = Differences()
    for images in given:
        differences.shapes.append("x".join(str(n) for n in (images.shape[0], *images.shape[2:])))
        with torch.no_grad():
            expected, found = detector(list(images)), split_detections(run(images))
        for ours, theirs in zip(found, expected, strict=True):
            compare(ours, theirs, tolerance, differences, differences.shapes[-1], detector.score_threshold, 100)
    return differences


def spread(detector: nn.Module) -> None:
    """Give random heads scores and boxes that differ, so that their order means something."""
    for name, parameter in detector.named_parameters():
        if "predictor" in name or "class_heads" in name or "box_heads" in name or "rpn.head" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)


def batches(real: list[Tensor]) -> list[Tensor]:
    """The real images in the 20 shapes; the first two also several at once, with their reflections and negatives."""
    resized = [
        F.interpolate(image[None].float(), shape, mode="bilinear").round().to(torch.uint8)
        for image, shape in zip(real, SHAPES, strict=True)
    ]
    several = [torch.cat([x, x.flip(-1), 255 - x, x.flip(-2), x.flip(-1, -2)]) for x in resized[:2]]
    return [*resized, *(x[:n] for x in several for n in (2, 5))]


def print_table(rows: list[dict[str, object]]) -> None:
    print("| detector | backbone | boxes, px | scores | detections | unmatched | export, CPU s | size, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            "| {detector} | {backbone} | {boxes:.1g} | {scores:.1g} | {detections} | {unmatched} | {export_s} | {mb} |".format(
                **row
            )
        )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
