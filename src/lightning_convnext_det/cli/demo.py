"""The demonstration: a synthetic dataset, then the commands that users give for their own data."""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_convnext_det.errors import DataError

# a small network for small images, whatever the machine; what is not here, such as anchors, precision and learning
# rate, is up to the plan
NETWORK = [
    "--model.backbone=convnext_atto",
    "--model.pretrained_backbone=false",
    "--model.fpn_channels=64",
    "--model.box_head_features=256",
    "--model.box_batch_size_per_image=128",
    "--model.rpn_pre_nms_top_n=[500,1000]",
    "--model.rpn_post_nms_top_n=[300,1000]",
    "--model.min_size=144",
    "--model.max_size=192",
    "--model.nms_threshold=0.4",  # mAP50 0.854 instead of 0.847, and few objects have two boxes of a class
    "--data.batch_size=2",
    "--data.vertical_flip=true",
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
    # not a time: a busy machine would show what an untrained network finds
    parser.add_argument("--steps", type=int, default=1000, help="of the training, which is most of the demo")
    parser.add_argument("--epochs", type=int, help="passes over the training images, in place of steps")
    parser.add_argument("--images", type=int, default=400, help="training images; val and test: a fifth each")
    options = parser.parse_args(arguments)
    from PIL import Image

    from lightning_convnext_det.data.synthetic import write_synthetic_coco
    from lightning_convnext_det.visualization import contact_sheet

    folder, held_out = options.folder, max(2, options.images // 5)
    _make_room(folder)
    write_synthetic_coco(folder / "data", options.images, held_out, held_out)
    checkpoint = folder / "checkpoints" / "best.ckpt"
    data = f"--data.root={folder / 'data'}"
    runs = ["--trainer.default_root_dir", str(folder / "runs")]
    length = (
        f"--trainer.max_steps={options.steps}" if options.epochs is None else f"--trainer.max_epochs={options.epochs}"
    )
    # an epoch that is never reached validates only after the last step; in epochs, at least once
    every = 1000 if options.epochs is None else max(1, min(3, options.epochs))
    fit = [length, f"--checkpoint.dirpath={checkpoint.parent}", f"--trainer.check_val_every_n_epoch={every}"]
    trained = f"--ckpt_path={checkpoint}"
    images, output = f"--data.predict={folder / 'data' / 'test'}", f"--output.folder={folder / 'predictions'}"
    commands = [
        ["fit", data, *NETWORK, *runs, *fit],
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
