"""What makes a difference in training from random weights at a small budget: one change at a time, several seeds.

Every variant is the recipe of blood cells (``bccd_faster_rcnn_convnext_atto.yaml``) with one setting changed, trained
for the same number of images. ``--min_size`` makes blood cells smaller, anchors and random sizes with them, and
``--epochs`` the training shorter. ``fpn_norm`` puts GroupNorm behind each convolution of the pyramid. Two datasets: blood cells (BCCD), and small objects, which are scenes of
`write_synthetic_coco` reduced to a third, nine in an image of 640 x 640 pixels. Prints mAP / mAP50 / mAP75 of the test
split and CPU seconds of the training. Results of an earlier call are read, not measured again.

    python benchmarks/from_scratch.py BCCD runs/from_scratch --datasets bccd small --seeds 1 2 3 --variants base batch2
    python benchmarks/from_scratch.py BCCD runs/from_scratch --datasets bccd --min_size 128 --epochs 3
"""

import argparse
import csv
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.synthetic import CLASS_NAMES, draw_scene
from lightning_convnext_det.models import fpn

RECIPE = Path(__file__).parents[1] / "configs" / "bccd_faster_rcnn_convnext_atto.yaml"
METRICS = ("test/map", "test/map_50", "test/map_75")
HALVED = "--model.anchor_sizes=[[16],[32],[64],[128],[256]]"
VARIANTS = {
    "base": [],
    "halved_anchors": [HALVED],
    "quartered_anchors": ["--model.anchor_sizes=[[8],[16],[32],[64],[128]]"],
    "batch2": ["--data.batch_size=2"],
    "batch2_halved": ["--data.batch_size=2", HALVED],
    "lr2": ["--model.lr=2e-3"],
    "no_warmup": ["--model.warmup_steps=0"],
    "giou": ["--model.convention={base: torchvision, box_loss: giou}"],
    "aligned": ["--model.convention={base: torchvision, roi_aligned: true}"],
    "random_scale": [],
    "color_jitter": ["--data.color_jitter=0.3"],
    "mosaic": ["--data.train_transforms=mosaic"],
    "ema": ["--ema=true"],
    "fpn_norm": [],
    "weight_decay_0.01": ["--model.weight_decay=0.01"],
}


def write_small_objects(folder: Path, counts: dict[str, int], grid: int = 3, side: int = 640) -> Path:
    """Write a COCO dataset whose images are ``grid`` x ``grid`` reduced scenes."""
    (folder / "annotations").mkdir(parents=True)
    for number, (split, count) in enumerate(counts.items()):
        (folder / split).mkdir()
        content: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)]
        for index in range(count):
            sheet = Image.new("RGB", (side, side))
            content["images"].append({"id": index + 1, "file_name": f"{index}.jpg", "height": side, "width": side})
            for cell in range(grid**2):
                scene = draw_scene(np.random.default_rng((7, number, index, cell)), 256, 256)
                step = side // grid
                left, top = cell % grid * step, cell // grid * step
                sheet.paste(Image.fromarray(scene.image).resize((step, step)), (left, top))
                for (x1, y1, x2, y2), label in zip(
                    (scene.boxes() * step / 256).tolist(), scene.labels.tolist(), strict=True
                ):
                    content["annotations"].append({
                        "id": len(content["annotations"]) + 1, "image_id": index + 1, "category_id": label + 1,
                        "bbox": [left + x1, top + y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0,
                    })  # fmt: skip
            sheet.save(folder / split / f"{index}.jpg", quality=92)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def resize(side: int) -> list[str]:
    """Arguments of blood cells with a shorter side of ``side`` pixels, which the recipe has at 240."""
    anchors = [[round(size * side / 240)] for size in (32, 64, 128, 256, 512)]
    return [f"--model.min_size={side}", f"--model.max_size={side * 4 // 3}", f"--model.anchor_sizes={anchors}"]


def add_norms(use: bool) -> None:
    """Put GroupNorm of eight groups behind each convolution of the pyramids that are built from now on, or do not."""
    norm = partial(nn.GroupNorm, 8) if use else None
    fpn.FeaturePyramidNetwork = partial(FeaturePyramidNetwork, norm_layer=norm)  # type: ignore[assignment, misc]


def read_metrics(folder: Path) -> list[float]:
    """The test metrics in the logs of a folder; none if they have not been measured."""
    for file in sorted(folder.glob("version_*/metrics.csv")):
        with open(file, newline="") as rows:
            for row in csv.DictReader(rows):
                if row.get(METRICS[0]):
                    return [float(row[name]) for name in METRICS]
    return []


def train(data: list[str], out: Path, seed: int, arguments: list[str]) -> list[float]:
    if not read_metrics(out):
        common = [f"--trainer.default_root_dir={out}", "--trainer.enable_progress_bar=false", "--data.num_workers=0"]
        common += [f"--seed_everything={seed}", f"--data.seed={seed}", *data]
        start = time.process_time()
        assert main(["fit", f"--config={RECIPE}", *common, *arguments]) == 0
        (out / "seconds").write_text(f"{time.process_time() - start:.0f}")
        checkpoint = max(out.glob("version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
        assert main(["test", f"--ckpt_path={checkpoint}", *common]) == 0
    return read_metrics(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bccd", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--datasets", nargs="+", default=["bccd", "small"], choices=["bccd", "small"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--min_size", type=int, default=240, help="of blood cells")
    options = parser.parse_args()
    sizes = [round(options.min_size * factor) for factor in (0.8, 0.9, 1.0, 1.1, 1.2, 1.0)]
    VARIANTS["random_scale"] = [f"--model.min_size={sizes}", f"--model.max_size={options.min_size * 8 // 5}"]
    for dataset in options.datasets:
        data = [f"--data.root={options.bccd}", *resize(options.min_size)]
        if dataset == "small":
            root = options.out / "small_objects"
            if not root.is_dir():
                write_small_objects(root, {"train": 240, "test": 80})
            data = [f"--data.root={root}", "--data.train=train", "--model.min_size=320", "--model.max_size=320"]
        for seed in options.seeds:
            for name in options.variants:
                out = options.out / dataset / f"{name}_{seed}"
                add_norms(name == "fpn_norm")
                metrics = train(data, out, seed, [f"--trainer.max_epochs={options.epochs}", *VARIANTS[name]])
                seconds = (out / "seconds").read_text()
                print(dataset, name, seed, " / ".join(f"{value:.4f}" for value in metrics), f"{seconds} s", flush=True)
