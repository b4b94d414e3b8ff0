"""Detectors from random weights at equal CPU seconds: ours, a plain torchvision loop, and ultralytics' smallest YOLO.

The same images, the same evaluator (COCO's mAP, maxDets 100), one thread, each detector trained until its process has
used the given CPU seconds, reading of images included, evaluation not; ours also validates in that time. Datasets:
blood cells (BCCD), the ten commonest classes of a folder in COCO's layout, and two that are drawn: ``small``, shapes of
8 to 12 pixels, and ``bars``, shapes six times as long as wide, ten in an image of 480 x 480 pixels, of which COCO's
anchors cover few. ultralytics is optional and no dependency of the package: its runs are left out without it.

- ``ours``: ``convnext-det fit --data.root DIR --time SECONDS`` with ``convnext_atto`` from random weights; whatever is
  not given is chosen from the data.
- ``untouched``: the same without the plan: 800 to 1,333 pixels, COCO's anchors, a pyramid of 256 channels.
- ``torchvision``: FasterRCNN with the same backbone and torchvision's FPN, 240 to 320 pixels, batches of 4, AdamW at
  1e-3 with a cosine schedule, horizontal flips, bfloat16.
- ``yolo``: the smallest network of the newest series, built from its YAML file, 320 pixels, batches of 4, else its
  own defaults.

    python benchmarks/equal_budget.py runs/equal_budget --bccd BCCD --coco COCO --seconds 200 --seeds 1 2 3
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_convnext_det.callbacks import time_budget
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.annotations import DetectionAnnotations
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.metrics.coco_map import DetectionEvaluator

OURS = [
    "--model.backbone=convnext_atto",
    "--model.pretrained_backbone=false",
    "--data.num_workers=0",
    "--trainer.enable_progress_bar=false",
]


def write_common_classes(root: Path, out: Path, number: int = 10) -> Path:
    """Write COCO annotations of the commonest classes, with the images of ``val`` as test split."""
    data = DetectionDataModule(str(root))
    found = {"train": data.annotations("train"), "test": data.annotations("val")}
    assert found["train"] is not None
    counts = Counter(found["train"].labels[~found["train"].crowd].tolist())
    kept = [label for label, _ in counts.most_common(number)]
    (out / "annotations").mkdir(parents=True)
    for split, table in found.items():
        assert table is not None
        _write_split(table, kept, out, split)
    return out


def _write_split(table: DetectionAnnotations, kept: list[int], out: Path, split: str) -> None:
    (out / split).mkdir()
    content: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    content["categories"] = [{"id": i + 1, "name": table.class_names[label]} for i, label in enumerate(kept)]
    for index in range(len(table)):
        path = table.path(index)
        (out / split / path.name).symlink_to(path.resolve())
        height, width = (int(side) for side in table.sizes[index])
        content["images"].append({"id": index + 1, "file_name": path.name, "height": height, "width": width})
        rows = table.rows(index)
        for box, label, crowd, area in zip(
            table.boxes[rows].tolist(), table.labels[rows].tolist(), table.crowd[rows].tolist(),
            table.area[rows].tolist(), strict=True,
        ):  # fmt: skip
            if label in kept:
                x1, y1, x2, y2 = box
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": index + 1, "category_id": kept.index(label) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": int(crowd),
                })  # fmt: skip
    (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def write_shapes(out: Path, sides: tuple[int, int], ratio: float, counts: dict[str, int]) -> Path:
    """Write a COCO dataset of ellipses, rectangles and triangles on noise, ten in an image of 480 x 480 pixels.

    Args:
        out: folder to create.
        sides: range of the geometric mean of width and height in pixels.
        ratio: of the longer to the shorter side; half of the shapes lie, half stand.
        counts: number of images by split.
    """
    draw = {"ellipse": ImageDraw.ImageDraw.ellipse, "rectangle": ImageDraw.ImageDraw.rectangle}
    classes = ["ellipse", "rectangle", "triangle"]
    (out / "annotations").mkdir(parents=True)
    for number, (split, count) in enumerate(counts.items()):
        (out / split).mkdir()
        content: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
        for index in range(count):
            random = np.random.default_rng((3, number, index))
            noise = random.integers(60, 130, (60, 60, 3), dtype=np.uint8)
            sheet = Image.fromarray(noise).resize((480, 480), Image.Resampling.BICUBIC)
            canvas = ImageDraw.Draw(sheet)
            content["images"].append({"id": index + 1, "file_name": f"{index}.jpg", "height": 480, "width": 480})
            taken: list[tuple[float, float, float, float]] = []
            while len(taken) < 10:
                side, tilt = random.uniform(*sides), ratio ** random.choice([-0.5, 0.5])
                width, height = round(side * tilt), round(side / tilt)
                x1, y1 = (int(random.integers(0, 480 - length)) for length in (width, height))
                box = (x1, y1, x1 + width, y1 + height)
                if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                    continue
                taken.append(box)
                kind, colour = int(random.integers(3)), tuple(random.integers(150, 256, 3).tolist())
                if kind < 2:
                    draw[classes[kind]](canvas, (x1, y1, box[2] - 1, box[3] - 1), fill=colour)
                else:
                    corners = [(x1 + width / 2, y1), (box[2] - 1, box[3] - 1), (x1, box[3] - 1)]
                    canvas.polygon(corners, fill=colour)
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": index + 1, "category_id": kind + 1,
                    "bbox": [x1, y1, width, height], "area": width * height, "iscrowd": 0,
                })  # fmt: skip
            sheet.save(out / split / f"{index}.jpg", quality=92)
        (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return out


def evaluate(data: DetectionDataModule, detect: Any) -> list[float]:
    """Compute mAP, mAP50 and mAP75 of the test split."""
    evaluator = DetectionEvaluator(data.class_names)
    for images, targets in data.test_dataloader():
        evaluator.update(detect(images), targets)
    metrics = evaluator.compute()
    return [metrics["map"], metrics["map_50"], metrics["map_75"]]


# ---- ours


def train_ours(root: Path, out: Path, seconds: float, seed: int, planned: bool = True) -> list[float]:
    time_budget.time = _count_cpu_seconds(time_budget.time)  # type: ignore[attr-defined]
    common = [f"--data.root={root}", f"--seed_everything={seed}", f"--trainer.default_root_dir={out}", *OURS]
    length = [f"--time={seconds:g}"] if planned else ["--plan=false", f"--time={seconds:g}", "--trainer.max_epochs=-1"]
    start = time.process_time()
    assert main(["fit", *common, *length]) == 0
    print(f"ours: {time.process_time() - start:.0f} s with the start", flush=True)
    checkpoint = max(out.glob("version_*/checkpoints/best.ckpt"), key=lambda path: path.stat().st_mtime)
    assert main(["test", f"--ckpt_path={checkpoint}", *common]) == 0
    for file in sorted(out.glob("version_*/metrics.csv"), reverse=True):
        with open(file, newline="") as rows:
            for row in csv.DictReader(rows):
                if row.get("test/map"):
                    return [float(row[name]) for name in ("test/map", "test/map_50", "test/map_75")]
    raise AssertionError("no metrics")


def _count_cpu_seconds(module: Any) -> Any:
    """A module ``time`` whose clocks count the seconds that this process has computed."""
    clock: Any = SimpleNamespace(**{name: getattr(module, name) for name in dir(module) if not name.startswith("_")})
    clock.time = clock.monotonic = time.process_time
    return clock


# ---- a plain torchvision loop


def train_torchvision(root: Path, seconds: float, seed: int) -> list[float]:
    import timm
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

    torch.manual_seed(seed)

    class Pyramid(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = timm.create_model("convnext_atto", features_only=True)
            self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 64, LastLevelMaxPool())
            self.out_channels = 64

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return self.fpn({str(i): maps for i, maps in enumerate(self.body(x))})

    data = DetectionDataModule(str(root), train_transforms="flip", num_workers=0, seed=seed, val_fraction=0.0)
    detector = FasterRCNN(
        Pyramid(), min_size=240, max_size=320, box_head=TwoMLPHead(64 * 49, 256),
        box_predictor=FastRCNNPredictor(256, data.num_classes + 1), box_batch_size_per_image=128,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3, weight_decay=0.05)
    loader = data.train_dataloader()
    start, step, epoch = time.process_time(), 0, 0
    while (used := time.process_time() - start) < seconds:
        loader.sampler.set_epoch(epoch)
        for images, targets in loader:
            used = time.process_time() - start
            if used >= seconds:
                break
            factor = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * used / seconds))
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * factor
            shifted = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]
            with torch.autocast("cpu", torch.bfloat16):
                losses = detector([image / 255 for image in images], shifted)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
            optimizer.step()
            step += 1
        epoch += 1
    detector.eval()
    print(f"torchvision: {step} steps, {time.process_time() - start:.0f} s", flush=True)

    @torch.no_grad()
    def detect(images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = detector([image / 255 for image in images])
        return [{**d, "labels": d["labels"] - 1} for d in found]

    return evaluate(data, detect)


# ---- ultralytics


def write_yolo(root: Path, out: Path) -> Path:
    """Write the images as links and the labels in YOLO's format; the path of the data file."""
    data = DetectionDataModule(str(root), val_fraction=0.0)
    for split in ("train", "test"):
        table = data.annotations(split)  # type: ignore[arg-type]
        assert table is not None
        for kind in ("images", "labels"):
            (out / kind / split).mkdir(parents=True)
        for index in range(len(table)):
            path, rows = table.path(index), table.rows(index)
            (out / "images" / split / path.name).symlink_to(path.resolve())
            height, width = table.sizes[index]
            lines = []
            for (x1, y1, x2, y2), label in zip(table.boxes[rows].tolist(), table.labels[rows].tolist(), strict=True):
                centre = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
                lines.append(
                    f"{label} {centre[0]:.6f} {centre[1]:.6f} {(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}"
                )
            (out / "labels" / split / f"{path.stem}.txt").write_text("\n".join(lines))
    names = dict(enumerate(data.class_names))
    file = out / "data.yaml"
    file.write_text(
        json.dumps({"path": str(out.resolve()), "train": "images/train", "val": "images/test", "names": names})
    )
    return file


def train_yolo(root: Path, out: Path, seconds: float, seed: int, network: str) -> list[float]:
    os.environ["YOLO_CONFIG_DIR"] = str(out)
    import ultralytics.engine.trainer as engine
    from ultralytics import YOLO

    engine.time = _count_cpu_seconds(time)
    model = YOLO(network)
    start = time.process_time()
    model.train(
        data=str(write_yolo(root, out / "yolo")), time=seconds / 3600, epochs=1000, imgsz=320, workers=0, seed=seed,
        device="cpu", val=False, plots=False, project=str(out), name="run", exist_ok=True, verbose=False, amp=False,
        batch=4, nbs=4, cache=False,  # with its batch of 16 and nominal one of 64, a few minutes are some thirty steps
    )  # fmt: skip
    print(f"yolo: {time.process_time() - start:.0f} s", flush=True)
    best = YOLO(str(out / "run" / "weights" / "last.pt"))
    data = DetectionDataModule(str(root), num_workers=0)

    def detect(images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            pixels = image.permute(1, 2, 0).numpy()[..., ::-1].copy()  # it takes BGR
            boxes = best.predict(pixels, imgsz=320, conf=0.001, iou=0.7, max_det=100, verbose=False)[0].boxes
            found.append({"boxes": boxes.xyxy.cpu(), "scores": boxes.conf.cpu(), "labels": boxes.cls.cpu().long()})
        return found

    return evaluate(data, detect)


def _run(name: str, root: Path, out: Path, seconds: float, seed: int, network: str) -> list[float]:
    file = out / "result.json"
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        if name in ("ours", "untouched"):
            metrics = train_ours(root, out, seconds, seed, planned=name == "ours")
        elif name == "torchvision":
            metrics = train_torchvision(root, seconds, seed)
        else:
            metrics = train_yolo(root, out, seconds, seed, network)
        file.write_text(json.dumps(metrics))
    found: list[float] = json.loads(file.read_text())
    return found


def _find_dataset(name: str, options: argparse.Namespace) -> Path:
    if name == "bccd":
        return Path(options.bccd)
    out = Path(options.out) / f"{name}_data"
    if out.is_dir():
        return out
    if name == "coco":
        return write_common_classes(options.coco, out)
    counts = {"train": 200, "val": 20, "test": 60}
    return write_shapes(out, *{"small": ((8, 12), 1.0), "bars": ((25, 60), 6.0)}[name], counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bccd", type=Path)
    parser.add_argument("--coco", type=Path)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--who", nargs="+", default=["ours", "torchvision", "yolo"])
    parser.add_argument("--datasets", nargs="+", default=["bccd", "coco"])
    parser.add_argument("--yolo", default="yolo26n.yaml")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if importlib.util.find_spec("ultralytics") is None:
        options.who = [name for name in options.who if name != "yolo"]
        sys.stdout.write("ultralytics is not installed: yolo is left out\n")
    for dataset in options.datasets:
        root = _find_dataset(dataset, options)
        for seed in options.seeds:
            for name in options.who:
                out = options.out / dataset / f"{name}_{seed}"
                metrics = _run(name, root, out, options.seconds, seed, options.yolo)
                print(dataset, name, seed, " / ".join(f"{value:.4f}" for value in metrics), flush=True)
