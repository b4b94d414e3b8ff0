"""The demonstration: a synthetic dataset, then the commands that users give for their own data."""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import DataError
from lightning_convnext_det.visualization import contact_sheet

# a small network for small images; on a larger machine the defaults of the package are the better choice
NETWORK = [
    "--model.backbone=convnext_atto",
    "--model.fpn_channels=64",
    "--model.box_head_features=256",
    "--model.box_batch_size_per_image=128",
    "--model.rpn_pre_nms_top_n=[500,1000]",
    "--model.rpn_post_nms_top_n=[300,1000]",
    "--model.anchor_sizes=[[16],[32],[64],[96],[128]]",
    "--model.min_size=192",
    "--model.max_size=288",
]
TRAINING = [
    "--model.lr=1e-3",
    "--model.warmup_steps=100",
    "--data.batch_size=4",
    "--data.vertical_flip=true",
    "--trainer.gradient_clip_val=5",
]


def run_demo(arguments: Sequence[str], run: Callable[[Sequence[str]], int]) -> int:
    """Write a synthetic dataset, then train, test and predict on it.

    Args:
        arguments: of the command line, see ``--help``.
        run: the command ``convnext-det``: takes its arguments, returns its exit status.

    Returns:
        The exit status of the first command that failed, or 0.
    """
    parser = argparse.ArgumentParser(
        "convnext-det demo", description="Train a detector on synthetic images and draw what it detects."
    )
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="output folder; replaces an older demo")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training images")
    parser.add_argument("--images", type=int, default=400, help="training images; val and test: a fifth each")
    options = parser.parse_args(arguments)
    folder, held_out = options.folder, max(2, options.images // 5)
    _make_room(folder)
    write_synthetic_coco(folder / "data", options.images, held_out, held_out)
    checkpoint = folder / "checkpoints" / "best.ckpt"
    data = f"--data.root={folder / 'data'}"
    runs = ["--trainer.default_root_dir", str(folder / "runs"), "--trainer.precision=bf16-mixed"]
    fit = [f"--trainer.max_epochs={options.epochs}", f"--checkpoint.dirpath={checkpoint.parent}"]
    fit.append(f"--trainer.check_val_every_n_epoch={max(1, min(3, options.epochs))}")  # at least once: best.ckpt
    trained = f"--ckpt_path={checkpoint}"
    images, output = f"--data.predict={folder / 'data' / 'test'}", f"--output.folder={folder / 'predictions'}"
    commands = [
        ["fit", "--plan=false", data, *NETWORK, *TRAINING, *runs, *fit],
        ["test", data, trained, *runs],
        ["predict", images, trained, output, *runs],
    ]
    for command in commands:
        sys.stdout.write(f"\n$ convnext-det {' '.join(command)}\n")
        status = run(command)
        if status:
            return status
    sheet = folder / "contact_sheet.png"
    drawn = sorted((folder / "predictions").glob("*.jpg"))[:20]
    contact_sheet([Image.open(file) for file in drawn], columns=5).save(sheet)
    sys.stdout.write(f"\ndrawn predictions: {sheet}\n")
    return 0


def _make_room(folder: Path) -> None:
    if not folder.exists():
        return
    if not (folder / "data" / "annotations").is_dir():
        raise DataError(f"[LCD-D010] {folder} exists and is not an older demo; choose another --folder")
    shutil.rmtree(folder)
