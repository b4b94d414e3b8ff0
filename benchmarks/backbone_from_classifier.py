"""What a classifier trained on the same objects is worth to a detector, and the recipe for small data to blood cells.

Cuts the boxes of BCCD's training pictures into an ImageFolder of three classes, trains ``convnext_atto`` on them,
and trains the same detector from random weights, from the classifier, and from the classifier with a tenth of the
learning rate in the backbone; then the recipe ``small_data`` on the same network. Every training sees the same number
of pictures; figures are those of the test split.

    python benchmarks/backbone_from_classifier.py BCCD runs/from_classifier --seeds 3
"""

import argparse
import csv
import time
from pathlib import Path

from PIL import Image

from lightning_convnext_det.cli import main
from lightning_convnext_det.data.datamodule import DetectionDataModule

CONFIGS = Path(__file__).parents[1] / "configs"
PLAIN = CONFIGS / "bccd_faster_rcnn_convnext_atto.yaml"
MARGIN = 0.15  # of the longer side, around a box


def cut_boxes(root: Path, out: Path) -> None:
    """Write the boxes of ``trainval`` as ``out/{train,val}/CLASS/*.png``; every sixth picture is for validation."""
    data = DetectionDataModule(str(root), train="trainval", val_fraction=0.0)
    table = data.table("train")
    assert table is not None
    for i in range(len(table)):
        image = Image.open(table.path(i)).convert("RGB")
        for row in range(table.offsets[i], table.offsets[i + 1]):
            x1, y1, x2, y2 = (float(v) for v in table.boxes[row])
            margin = MARGIN * max(x2 - x1, y2 - y1)
            box = (
                max(0, x1 - margin),
                max(0, y1 - margin),
                min(image.width, x2 + margin),
                min(image.height, y2 + margin),
            )
            folder = out / ("train" if i % 6 else "val") / data.class_names[int(table.labels[row])]
            folder.mkdir(parents=True, exist_ok=True)
            image.crop(box).save(folder / f"{i}_{row}.png")


def figures(folder: Path, name: str) -> list[float]:
    """All values of a figure in the metrics of a folder; none if it has not been measured."""
    found: list[float] = []
    for file in sorted(folder.glob("version_*/metrics.csv")):
        with open(file, newline="") as rows:
            found += [float(row[name]) for row in csv.DictReader(rows) if row.get(name)]
    return found


def train_classifier(crops: Path, out: Path, epochs: int) -> Path:
    checkpoint = out / "version_0" / "checkpoints" / "last.ckpt"
    if checkpoint.is_file():  # a comparison that was cut short goes on where it was
        return checkpoint
    arguments = [
        "--model=ClassifierModule", "--model.backbone=convnext_atto", "--model.lr=1e-3", "--model.warmup_steps=50",
        f"--data.root={crops}", "--data.image_size=48", "--data.batch_size=32", "--data.vertical_flip=0.5",
        "--data.scale=[0.5,1.0]", f"--trainer.max_epochs={epochs}", f"--trainer.default_root_dir={out}",
        "--trainer.enable_progress_bar=false", "--data.num_workers=0",
    ]  # fmt: skip
    assert main(["fit", *arguments]) == 0
    print("classifier", [round(v, 4) for v in figures(out, "val/top1")], flush=True)
    return checkpoint


def train_detector(root: Path, out: Path, seed: int, config: Path, arguments: list[str]) -> tuple[float, float]:
    common = [f"--data.root={root}", f"--trainer.default_root_dir={out}", "--trainer.enable_progress_bar=false"]
    common += ["--data.num_workers=0", f"--seed_everything={seed}"]
    if measured := figures(out, "test/map"):
        return measured[-1], figures(out, "test/map_50")[-1]
    start = time.process_time()
    assert main(["fit", f"--config={config}", f"--data.seed={seed}", *common, *arguments]) == 0
    spent = time.process_time() - start
    checkpoint = out / "version_0" / "checkpoints" / "last.ckpt"
    assert main(["test", f"--ckpt_path={checkpoint}", *common]) == 0
    found = figures(out, "test/map")[-1], figures(out, "test/map_50")[-1]
    print(f"{out.name} seed {seed}: map {found[0]:.4f} map_50 {found[1]:.4f} ({spent:.0f} s of CPU)", flush=True)
    return found


def compare() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6, help="of the detector")
    parser.add_argument("--classifier_epochs", type=int, default=4)
    parser.add_argument("--min_size", type=int, default=240)
    options = parser.parse_args()
    if not (options.out / "crops").is_dir():
        cut_boxes(options.root, options.out / "crops")
    weights = train_classifier(options.out / "crops", options.out / "classifier", options.classifier_epochs)
    budget = [f"--trainer.max_epochs={options.epochs}", f"--model.min_size={options.min_size}"]
    budget += [f"--model.max_size={options.min_size * 4 // 3}"]
    small = [
        "--model.backbone=convnext_atto", "--model.pretrained_backbone=false", "--model.layer_decay=null",
        "--model.drop_path_rate=0", "--model.fpn_channels=64", "--model.box_head_features=256",
        "--model.rpn_pre_nms_top_n_train=500", "--model.rpn_post_nms_top_n_train=300", "--data.train=trainval",
        "--data.val_fraction=0", "--data.vertical_flip=true", "--trainer.limit_val_batches=0",
    ]  # fmt: skip
    given = [f"--model.backbone_weights={weights}"]
    recipes: dict[str, tuple[Path, list[str]]] = {
        "random": (PLAIN, []),
        "classifier": (PLAIN, given),
        "classifier x0.1": (PLAIN, [*given, "--model.backbone_lr_factor=0.1"]),
        "small_data": (CONFIGS / "small_data.yaml", small),
    }
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in recipes}
    for seed in range(1, options.seeds + 1):
        for name, (config, arguments) in recipes.items():
            folder = options.out / f"{name.replace(' ', '_')}_{seed}"
            rows[name].append(train_detector(options.root, folder, seed, config, [*arguments, *budget]))
        for name, found in rows.items():
            print(f"| {name} | {' '.join(f'{m:.4f}/{m50:.4f}' for m, m50 in found)} |", flush=True)


if __name__ == "__main__":
    compare()
