"""Recipes on blood cells (BCCD), side by side: the same network and the same number of passes over the images.

- ``faster``: ``bccd_faster_rcnn_convnext_atto.yaml``, from random weights.
- ``cascade``: ``bccd_cascade_rcnn_convnext_atto.yaml``, the same with three stages.
- ``classifier``: ``convnext_atto`` is trained as a classifier on crops of the training boxes, an ImageFolder of three
  classes, and becomes the backbone that the detector starts with.
- ``classifier_x0.1``: the same with a tenth of the learning rate in the backbone.
- ``small_data``: ``small_data.yaml`` with that network, from random weights.
- ``deformable_detr``: ``bccd_deformable_detr_convnext_atto.yaml``.
- ``dino``: ``small_data_dino.yaml``.

With ``--seconds`` every recipe gets the same processor time instead of the same passes, its schedule finished.

Prints mAP / mAP50 / mAP75 of the test split. Results of an earlier call are read, not measured again.

    python benchmarks/blood_cells.py BCCD runs/blood_cells --recipes faster cascade --seeds 1 2 3
    python benchmarks/blood_cells.py BCCD runs/seconds --recipes faster deformable_detr dino --seconds 180 --batch_size 2
"""

import argparse
import csv
import time
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from lightning_convnext_det.callbacks import time_budget
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.datamodule import DetectionDataModule

CONFIGS = Path(__file__).parents[1] / "configs"
PLAIN = CONFIGS / "bccd_faster_rcnn_convnext_atto.yaml"
METRICS = ("test/map", "test/map_50", "test/map_75")
MARGIN = 0.15  # of the longer side, around a box


def crop_boxes(root: Path, out: Path) -> None:
    """Write crops of the boxes of ``trainval`` as ``out/{train,val}/CLASS/*.png``; every sixth image is for validation."""
    data = DetectionDataModule(str(root), train="trainval", val_fraction=0.0)
    annotations = data.annotations("train")
    assert annotations is not None
    for i in range(len(annotations)):
        image = Image.open(annotations.path(i)).convert("RGB")
        for row in range(annotations.offsets[i], annotations.offsets[i + 1]):
            x1, y1, x2, y2 = (float(v) for v in annotations.boxes[row])
            margin = MARGIN * max(x2 - x1, y2 - y1)
            box = (
                max(0, x1 - margin),
                max(0, y1 - margin),
                min(image.width, x2 + margin),
                min(image.height, y2 + margin),
            )
            folder = out / ("train" if i % 6 else "val") / data.class_names[int(annotations.labels[row])]
            folder.mkdir(parents=True, exist_ok=True)
            image.crop(box).save(folder / f"{i}_{row}.png")


def read_metric(folder: Path, name: str) -> list[float]:
    """All values of a metric in the logs of a folder; none if it has not been measured."""
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
    assert main(["fit", "--plan=false", *arguments]) == 0
    print("classifier", [round(v, 4) for v in read_metric(out, "val/top1")], flush=True)
    return checkpoint


def train_detector(root: Path, out: Path, seed: int, config: Path, arguments: list[str]) -> list[float]:
    common = [f"--data.root={root}", f"--trainer.default_root_dir={out}", "--trainer.enable_progress_bar=false"]
    common += ["--data.num_workers=0", f"--seed_everything={seed}"]
    if not read_metric(out, METRICS[0]):
        start = time.process_time()
        assert main(["fit", "--plan=false", f"--config={config}", f"--data.seed={seed}", *common, *arguments]) == 0
        print(f"{out.name}: {time.process_time() - start:.0f} s of CPU for the training", flush=True)
        assert main(["test", f"--ckpt_path={out / 'version_0' / 'checkpoints' / 'last.ckpt'}", *common]) == 0
    return [read_metric(out, name)[-1] for name in METRICS]


def create_recipes(options: argparse.Namespace) -> dict[str, tuple[Path, list[str]]]:
    """Configuration and arguments of each recipe that is asked for."""
    small = [
        "--model.backbone=convnext_atto", "--model.pretrained_backbone=false", "--model.layer_decay=null",
        "--model.drop_path_rate=0", "--model.fpn_channels=64", "--model.box_head_features=256",
        "--model.rpn_pre_nms_top_n=[500,1000]", "--model.rpn_post_nms_top_n=[300,1000]", "--data.train=trainval",
        "--data.val_fraction=0", "--data.vertical_flip=true", "--trainer.limit_val_batches=0",
    ]  # fmt: skip
    recipes: dict[str, tuple[Path, list[str]]] = {
        "faster": (PLAIN, []),
        "cascade": (CONFIGS / "bccd_cascade_rcnn_convnext_atto.yaml", []),
        "small_data": (CONFIGS / "small_data.yaml", small),
        "deformable_detr": (CONFIGS / "bccd_deformable_detr_convnext_atto.yaml", []),
        "dino": (
            CONFIGS / "small_data_dino.yaml",
            [
                "--data.train=trainval",
                "--data.val_fraction=0",
                "--trainer.limit_val_batches=0",
            ],
        ),
    }
    if any(name.startswith("classifier") for name in options.recipes):
        if not (options.out / "crops").is_dir():
            crop_boxes(options.root, options.out / "crops")
        weights = train_classifier(options.out / "crops", options.out / "weights", options.classifier_epochs)
        given = [f"--model.backbone_weights={weights}"]
        recipes["classifier"] = PLAIN, given
        recipes["classifier_x0.1"] = PLAIN, [*given, "--model.backbone_lr_factor=0.1"]
    length = [f"--trainer.max_epochs={options.epochs}"]
    if options.seconds:
        length = ["--trainer.max_epochs=-1", f"--time={options.seconds}s"]
        time_budget.time = SimpleNamespace(monotonic=time.process_time)  # type: ignore[assignment]
    budget = [*length, f"--model.min_size={options.min_size}"]
    budget += [f"--data.batch_size={options.batch_size}"] if options.batch_size else []
    budget += [f"--model.max_size={options.min_size * 4 // 3}"]
    return {name: (recipes[name][0], [*recipes[name][1], *budget]) for name in options.recipes}


def compare() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--recipes", nargs="+", default=["faster", "cascade", "classifier", "classifier_x0.1", "small_data"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=6, help="of the detector")
    parser.add_argument("--seconds", type=int, help="of the detector's training, of this process, instead of epochs")
    parser.add_argument("--classifier_epochs", type=int, default=4)
    parser.add_argument("--min_size", type=int, default=240)
    parser.add_argument("--batch_size", type=int, help="of every recipe, instead of its own")
    options = parser.parse_args()
    recipes = create_recipes(options)
    lines = [f"| recipe | {' | '.join(f'seed {seed}' for seed in options.seeds)} | mean |"]
    lines.append("|---" * (len(options.seeds) + 2) + "|")
    for name, (config, arguments) in recipes.items():
        found = [
            train_detector(options.root, options.out / f"{name}_{seed}", seed, config, arguments)
            for seed in options.seeds
        ]
        found.append([sum(values) / len(values) for values in zip(*found, strict=True)])
        lines.append(f"| {name} | {' | '.join(' / '.join(f'{v:.3f}' for v in values) for values in found)} |")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    compare()
