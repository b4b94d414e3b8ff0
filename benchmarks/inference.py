"""AP with test-time augmentation and ensembles on BCCD's test split, and recall in a large image with and without tiles.

python benchmarks/inference.py BCCD a.ckpt b.ckpt c.ckpt

The checkpoints are of configs/bccd_faster_rcnn_convnext_atto.yaml with three seeds, trained on the train split alone.
The large image is 4000 x 2000 pixels of test images at 0.3 of their size, in which most cells are about 30 pixels wide.
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from lightning_convnext_det import DetectionDataModule, load_module
from lightning_convnext_det.metrics.coco_map import DetectionEvaluator
from lightning_convnext_det.metrics.matching import match_detections
from lightning_convnext_det.models.fused import FusedDetector, augment_detector
from lightning_convnext_det.models.views import View, ViewDetector, parse_views
from lightning_convnext_det.types import Detection, Target

Samples = list[tuple[Tensor, Target]]
SHRUNK = 0.3
WIDTH, HEIGHT = 4000, 2000
TILINGS = ((144, "nmm"), (144, "nms"), (144, "wbf"), (240, "nmm"))
VIEWS = parse_views("flip,scales=0.8:1.0:1.25")
FLIPS = parse_views("flip")


class Recorded(nn.Module):
    """Gives the detections of a view again, one image after the other, so that each is computed once."""

    def __init__(self, detections: list[Detection]) -> None:
        super().__init__()
        self.detections, self.position = detections, -1

    def forward(self, images: list[Tensor]) -> list[Detection]:
        self.position = (self.position + 1) % len(self.detections)
        return [self.detections[self.position]]


def metrics(detectors: list[nn.Module], samples: Samples, names: list[str]) -> str:
    evaluator, fused = DetectionEvaluator(names), FusedDetector(detectors)
    for image, target in samples:
        evaluator.update(fused([image]), [target])
    found = evaluator.compute()
    return " | ".join(f"{100 * found[name]:.2f}" for name in ("map", "map_50", "map_75"))


def compare(detectors: list[nn.Module], samples: Samples, names: list[str]) -> None:
    """Print the AP of each detector and of all together, in one view and in several."""
    seen: list[dict[View, Recorded]] = []
    print("| detector | AP | AP50 | AP75 |\n|---|---|---|---|")
    for number, detector in enumerate(detectors, 1):
        seen.append({})
        for view in VIEWS:
            looking = ViewDetector(detector, view)
            with torch.inference_mode():
                seen[-1][view] = Recorded([looking([image])[0] for image, _ in samples])
        for views in ([View()], FLIPS, VIEWS):
            row = metrics([seen[-1][view] for view in views], samples, names)
            print(f"| seed {number}, {len(views)} views | {row} |", flush=True)
    for views in ([View()], FLIPS, VIEWS):
        row = metrics([of_one[view] for of_one in seen for view in views], samples, names)
        print(f"| ensemble, {len(views)} views | {row} |", flush=True)


def canvas(samples: Samples) -> tuple[Tensor, Target]:
    """A large image of small ones, side by side."""
    image = torch.full((3, HEIGHT, WIDTH), 200, dtype=torch.uint8)
    boxes, labels, left, top, i = [], [], 0, 0, 0
    while top + 144 <= HEIGHT:
        pixels, target = samples[i % len(samples)]
        small = F.resize(pixels, [round(s * SHRUNK) for s in pixels.shape[-2:]], antialias=True)
        height, width = small.shape[-2:]
        if left + width > WIDTH:
            left, top = 0, top + height
            continue
        image[:, top : top + height, left : left + width] = small[:, : HEIGHT - top]
        boxes.append(target["boxes"] * SHRUNK + torch.tensor([left, top] * 2))
        labels.append(target["labels"])
        left, i = left + width, i + 1
    return image, Target(boxes=torch.cat(boxes), labels=torch.cat(labels))


def recall(found: Detection, target: Target, num_classes: int) -> str:
    kept = found["scores"] >= 0.3
    at = match_detections([{k: v[kept] for k, v in found.items()}], [target], num_classes, max_detections=100_000)
    right, total = int(at.is_true_positive.sum()), int(at.num_objects.sum())
    return f"{100 * right / total:.1f} | {100 * right / max(1, int(kept.sum())):.1f} | {int(kept.sum())}"


def draw(image: Tensor, found: Detection, path: Path) -> None:
    drawing = Image.fromarray(image.permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(drawing)
    for box, score, label in zip(found["boxes"].tolist(), found["scores"], found["labels"].tolist(), strict=True):
        if score >= 0.3:
            pen.rectangle(box, outline=("red", "lime", "blue")[label % 3], width=2)
    drawing.crop((0, 0, 1200, 800)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--images", type=int, default=None, help="test images to use (default: all)")
    parser.add_argument("--drawing", default=None, help="PNG of a part of the large image with boxes")
    parser.add_argument("--only_tiles", action="store_true", help="leave out the comparison of AP")
    given = parser.parse_args()
    modules = [load_module(path) for path in given.checkpoints]
    data = DetectionDataModule(given.root, num_workers=0, batch_size=1)
    samples = [(batch[0][0], batch[1][0]) for batch in data.test_dataloader()][: given.images]
    names, detectors = modules[0].class_names, [module.detector for module in modules]
    if not given.only_tiles:
        print(f"{len(samples)} test images\n")
        compare(detectors, samples, names)

    image, target = canvas(samples)
    print(f"\n{WIDTH} x {HEIGHT} pixels, {len(target['boxes'])} objects, scores from 0.3")
    print("\n| tiles | recall | precision | detections | seconds |\n|---|---|---|---|---|")
    tilings = [{"tiles": side, "tile_merge": merge} for side, merge in TILINGS]
    for options in [{}, *tilings]:
        start = time.perf_counter()
        with torch.inference_mode():
            found = augment_detector(detectors[0], **options, batch_size=16)([image])[0]
        figures = recall(found, target, len(names))
        print(f"| {options or 'none'} | {figures} | {time.perf_counter() - start:.0f} |", flush=True)
        if given.drawing and options.get("tile_merge") == "nmm" and options["tiles"] == 144:
            draw(image, found, Path(given.drawing))


if __name__ == "__main__":
    main()
