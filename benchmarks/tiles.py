"""Recall and precision in large images with and without tiles, and of two ways to merge the same boxes.

    python benchmarks/tiles.py BCCD seed1.ckpt > benchmarks/results/cpu/tiles.md

The large image is a mosaic of test images at 0.3 of their size, in which most cells are about 30 pixels wide. The boxes
that the detector finds in windows and in the whole image are computed once, and merged by `merge_windows` and by
supervision's NMS and NMM (`InferenceSlicer`'s ways), with and without the boxes of the whole image. What the mosaic
itself costs shows one pass over all of it at the windows' scale, which only an image as small as this one allows.
"""

import argparse
import copy
import time

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

import inference
from lightning_convnext_det import DetectionDataModule, load_module
from lightning_convnext_det.metrics.matching import match_detections
from lightning_convnext_det.ops.window_merging import merge_windows
from lightning_convnext_det.ops.windows import Window, tile_windows
from lightning_convnext_det.types import Detection, Target

TILE, OVERLAP, SCORE, SHRUNK = 144, 0.2, 0.3, 0.3
LIKELY = 0.1  # score
WIDTH, HEIGHT = 3968, 1152


def evaluate(found: list[Detection], targets: list[Target], num_classes: int) -> str:
    """Recall, precision and number of boxes from a score of 0.3, and AP of all classes together, IoU 0.5."""
    at = match_detections(found, targets, num_classes, max_detections=100_000)
    order = np.argsort(-at.score, kind="stable")
    right, total = at.is_true_positive[0][order], int(at.num_objects.sum())
    recall, precision = right.cumsum() / total, right.cumsum() / np.arange(1, len(right) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    ap = float((np.diff(recall, prepend=0.0) * highest).sum())
    kept = int((at.score >= SCORE).sum())
    return f"{100 * recall[kept - 1]:.1f} | {100 * precision[kept - 1]:.1f} | {kept:,} | {100 * ap:.1f}"


def detect(detector: nn.Module, image: Tensor, windows: list[Window]) -> list[Detection]:
    found: list[Detection] = []
    for start in range(0, len(windows), 8):
        found += detector([image[:, w.top : w.bottom, w.left : w.right] for w in windows[start : start + 8]])
    return found


def detect_at_scale(detector: nn.Module, image: Tensor, windows: int) -> Detection:
    """Detect in the whole image as large as its windows are for the detector, with as many proposals as all of them."""
    large = copy.deepcopy(detector)
    factor = max(large.transform.min_sizes) / TILE
    large.transform.min_sizes, large.transform.max_size = [round(HEIGHT * factor)], round(WIDTH * factor)
    for limits in (large.rpn._pre_nms_top_n, large.rpn._post_nms_top_n):
        limits["testing"] *= windows
    large.roi_heads.detections_per_img *= windows
    return large([image])[0]


def supervise(boxes: Tensor, scores: Tensor, labels: Tensor, way: str) -> Detection:
    import supervision

    found = supervision.Detections(boxes.numpy(), confidence=scores.numpy(), class_id=labels.numpy())
    found = found.with_nms(0.5) if way == "NMS" else found.with_nmm(0.5)
    order = np.argsort(-found.confidence, kind="stable")
    parts = found.xyxy[order], found.confidence[order], found.class_id[order]
    corners, confidence, classes = (torch.from_numpy(np.asarray(part)) for part in parts)
    return Detection(boxes=corners.float(), labels=classes.long(), scores=confidence.float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("checkpoint")
    given = parser.parse_args()
    module = load_module(given.checkpoint)
    detector, num_classes = module.detector.eval(), len(module.class_names)
    data = DetectionDataModule(given.root, num_workers=0, batch_size=1)
    samples = [(images[0], targets[0]) for images, targets in data.test_dataloader()]
    inference.WIDTH, inference.HEIGHT = WIDTH, HEIGHT
    image, target = inference.canvas(samples)
    windows = tile_windows(HEIGHT, WIDTH, TILE, OVERLAP)
    with torch.inference_mode():
        whole = detector([image])[0]
        found = detect(detector, image, windows)
        one_pass = detect_at_scale(detector, image, WIDTH * HEIGHT // TILE**2)
        small = [F.resize(x, [round(s * SHRUNK) for s in x.shape[-2:]], antialias=True) for x, _ in samples]
        single = [detector([pixels])[0] for pixels in small]
    single_targets = [Target(boxes=t["boxes"] * SHRUNK, labels=t["labels"]) for _, t in samples]
    print_table(found, whole, one_pass, windows, target, list(zip(single, single_targets, strict=True)), num_classes)


def print_table(
    found: list[Detection],
    whole: Detection,
    one_pass: Detection,
    windows: list[Window],
    target: Target,
    single: list[tuple[Detection, Target]],
    num_classes: int,
) -> None:
    print("# Tiles\n")
    print(
        f"{time.strftime('%Y-%m-%d')}. {WIDTH} x {HEIGHT} pixels, {len(target['boxes']):,} objects, most of about 30 "
        f"pixels; {len(windows)} windows of {TILE} pixels, overlap {OVERLAP}. Recall and precision from a score of "
        f"{SCORE}, AP of all classes together, in percent, IoU 0.5.\n"
    )
    print("| `benchmarks/tiles.py` | recall | precision | boxes | AP |\n|---|---:|---:|---:|---:|")
    one_by_one = evaluate([d for d, _ in single], [t for _, t in single], num_classes)
    print(f"| test images of that size one by one: no windows | {one_by_one} |")
    print(f"| one pass at the windows' scale | {evaluate([one_pass], [target], num_classes)} |", flush=True)
    print(f"| no tiles | {evaluate([whole], [target], num_classes)} |", flush=True)
    frames = [*windows, Window(0, 0, WIDTH, HEIGHT)]
    for name, detections, own in (("tiles", found, windows), ("tiles and whole image", [*found, whole], frames)):
        boxes = torch.cat(
            [d["boxes"] + d["boxes"].new_tensor([w.left, w.top] * 2) for d, w in zip(detections, own, strict=True)]
        )
        scores, labels = (torch.cat([d[key] for d in detections]) for key in ("scores", "labels"))  # type: ignore[literal-required]
        sources = torch.cat([torch.full((len(d["scores"]),), i) for i, d in enumerate(detections)])
        for method in ("nmm", "nms", "wbf"):
            merged = merge_windows(boxes, scores, labels, sources, torch.tensor(own), method, margin=2.0)
            one = Detection(boxes=merged[0], labels=merged[2], scores=merged[1])
            print(f"| {name}, `{method}` | {evaluate([one], [target], num_classes)} |", flush=True)
        likely = scores >= LIKELY  # supervision compares all boxes with all: with every box, more memory than there is
        for way in ("NMS", "NMM"):
            row = evaluate([supervise(boxes[likely], scores[likely], labels[likely], way)], [target], num_classes)
            print(f"| {name}, supervision's {way} of boxes from a score of {LIKELY} | {row} |", flush=True)


if __name__ == "__main__":
    main()
