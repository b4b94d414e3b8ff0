"""Overfit eight images, as any detector must be able to.

Takes the first eight images of a COCO file without small objects or crowds, trains on them and evaluates on the same,
mAP / mAP50 every so many steps, for each detector in the same number of them. Images are made small (160 pixels on the
shorter side, if not given), so that it takes minutes on two cores; an object is small below an eighth of the side. The
transformers train from random weights and are small, too: two encoder and three decoder layers of 128 channels.

    python benchmarks/eight_images.py instances_val2017.json val2017 runs/eight --steps 150
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

from lightning_convnext_det.cli.main import main

TRANSFORMER = [
    "--model.strides=[8,16,32]", "--model.extra_levels=0", "--model.num_queries=100", "--model.hidden_dim=128",
    "--model.encoder_layers=2", "--model.decoder_layers=3", "--model.feedforward_dim=256",
    "--model.backbone_lr_factor=1",
]  # fmt: skip
DETECTORS = {
    "FasterRCNNModule": ["--model.box_head_features=256"],
    "CascadeRCNNModule": [
        "--model.box_head_features=256",
        "--model.box_head=two_fc",
        "--model.convention=torchvision",  # as Faster R-CNN
    ],
    "DeformableDETRModule": [*TRANSFORMER, "--model.two_stage=true", "--model.dropout=0"],
    "DINOModule": TRANSFORMER,
    "DINOModule, dense": [*TRANSFORMER, "--model.dense_proposals=true"],
}
SMALL = ["--model.backbone=convnext_atto", "--data.batch_size=8"]
PROPOSALS = ["--model.rpn_pre_nms_top_n=[500,1000]", "--model.rpn_post_nms_top_n=[300,1000]"]


def take_eight(annotations: Path, images: Path, root: Path) -> None:
    """Write a COCO folder whose training and validation images are the same eight."""
    content = json.loads(annotations.read_text())
    smallest = {image["id"]: min(image["height"], image["width"]) / 8 for image in content["images"]}
    has_boxes = {a["image_id"] for a in content["annotations"]}
    unfit = {
        a["image_id"] for a in content["annotations"] if a["iscrowd"] or min(a["bbox"][2:]) < smallest[a["image_id"]]
    }
    content["images"] = [i for i in content["images"] if i["id"] in has_boxes - unfit][:8]
    chosen = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        for image in content["images"]:
            shutil.copy(images / image["file_name"], root / split)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def learn(root: Path, out: Path, detector: str, options: argparse.Namespace, seed: int) -> list[str]:
    """Train, and return mAP / mAP50 after every ``options.every`` steps."""
    arguments = [*SMALL, *DETECTORS[detector], *(PROPOSALS if "RCNN" in detector else [])]
    arguments += [f"--model.min_size={options.min_size}", f"--model.max_size={options.min_size * 4 // 3 + 1}"]
    status = main(
        [
            "fit", "--plan=false", f"--model={detector.split(',')[0]}", *arguments, "--model.lr=1e-3",
            "--model.warmup_steps=20", "--model.schedule=cosine", f"--data.root={root}", "--data.num_workers=0", f"--data.seed={seed}",
            f"--seed_everything={seed}", f"--trainer.max_steps={options.steps}", "--trainer.max_epochs=-1",
            f"--trainer.check_val_every_n_epoch={options.every}", f"--trainer.default_root_dir={out}",
            "--trainer.enable_progress_bar=false", "--trainer.precision=bf16-mixed",
            "--trainer.gradient_clip_val=5.0",
        ]
    )  # fmt: skip
    assert status == 0
    with open(sorted(out.glob("version_*/metrics.csv"))[-1], newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/map")]
    return [" / ".join(f"{float(row[name]):.3f}" for name in ("val/map", "val/map_50")) for row in rows]


def compare() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="COCO's JSON")
    parser.add_argument("images", type=Path, help="the folder of its images")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=150, help="of all eight images")
    parser.add_argument("--min_size", type=int, default=160, help="shorter side of the images in pixels")
    parser.add_argument("--every", type=int, default=50, help="steps between two evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--detectors", nargs="+", choices=list(DETECTORS), default=list(DETECTORS))
    options = parser.parse_args()
    if not (options.out / "set").is_dir():
        take_eight(options.annotations, options.images, options.out / "set")
    steps = range(options.every, options.steps + 1, options.every)
    lines = [f"| detector | seed | {' | '.join(f'{n} steps' for n in steps)} |", "|---|---:|" + "---|" * len(steps)]
    for detector in options.detectors:
        for seed in options.seeds:
            folder = options.out / f"{detector.replace(', ', '_')}_{options.steps}_{seed}"
            found = learn(options.out / "set", folder, detector, options, seed)
            lines.append(f"| {detector} | {seed} | {' | '.join(found)} |")
            print(lines[-1], flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    compare()
