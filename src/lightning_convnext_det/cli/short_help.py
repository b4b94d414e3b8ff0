"""The help of fit, validate, test and predict: the arguments that are used most, printed without importing a library.

``--help all`` has all arguments, hundreds of them, which only the trainer's parser knows.
"""

import textwrap
from collections.abc import Iterator, Mapping

from lightning_convnext_det.cli.commands import EXIT_STATUS, FLAGS, TRAINER

_TRAINING = {
    "--data.root DIR": "dataset in COCO, Pascal VOC or YOLO format, which is found from the files",
    "--data.batch_size N": "images per batch on each device (default: by the plan)",
    "--data.train_transforms NAME": "augmentation: none, flip, multiscale, lsj, tiles or mosaic",
    "--model CLASS": "FasterRCNNModule (default), CascadeRCNNModule, DeformableDETRModule, DINOModule or "
    "ClassifierModule",
    "--model.backbone NAME": "any timm backbone with strides 4, 8, 16 and 32, see convnext-det models",
    "--model.pretrained_backbone BOOL": "start from timm's weights, which are downloaded",
    "--model.lr RATE": "learning rate after the warm-up (default: by the plan)",
    "--trainer.max_epochs N": "length of the training (default: by the plan)",
    "--trainer.devices N": "GPUs of this machine (default: all)",
    "--trainer.precision NAME": "32-true, bf16-mixed or 16-mixed (default: by the plan)",
    "--trainer.default_root_dir DIR": "where runs are written (default: runs)",
    "--ckpt_path FILE": "checkpoint to go on from, e.g. runs/version_0/checkpoints/last.ckpt",
}
_EVALUATION = {
    "--ckpt_path FILE": "checkpoint, e.g. runs/version_0/checkpoints/best.ckpt",
    "--data.root DIR": "dataset in COCO, Pascal VOC or YOLO format, which is found from the files",
    "--data.batch_size N": "images per batch on each device",
    "--trainer.devices N": "GPUs of this machine (default: all)",
}
_PREDICTION = {
    "--ckpt_path FILE": "checkpoint, e.g. runs/version_0/checkpoints/best.ckpt",
    "--data.predict IMAGES": "image, folder, pattern, .txt list or video, or a list of these",
    "--data.predict_recursive BOOL": "also what is below the folders",
    "--output.folder DIR": "where results are written",
    "--output.formats LIST": "coco, csv, parquet, yolo, voc, labelme, crops",
    "--output.score_threshold T": "of drawings, crops and annotation files; best: that of each class in the checkpoint",
    "--data.batch_size N": "images per batch on each device",
    "--trainer.devices N": "GPUs of this machine (default: all)",
}
_VALUES = {
    "nms": "KIND", "start_from": "FILE", "plan": "BOOL", "time": "1h30m", "early_stopping": "N", "ema": "BOOL",
    "lr_find": "BOOL", "batch_size_find": "BOOL", "log_images": "N", "report": "BOOL", "tiles": "SIDE",
    "tile_overlap": "SHARE", "tile_merge": "RULE", "tta": "VIEWS", "ensemble": "FILES",
}  # fmt: skip
MAIN: Mapping[str, Mapping[str, str]] = {
    "fit": _TRAINING, "validate": _EVALUATION, "test": _EVALUATION, "predict": _PREDICTION,
}  # fmt: skip
"""Arguments with their values, and what they do, by command."""


def short_help(command: str) -> str:
    """The help of one of the trainer's commands."""
    text = TRAINER[command]
    lines = [f"usage: convnext-det {command} [--config FILE] [arguments]", "", f"{text[0].upper()}{text[1:]}.", ""]
    lines += [*_table(MAIN[command]), "", "options of convnext-det:", *_table(_flags(command)), ""]
    lines += [
        f"convnext-det {command} --help all has every argument, also of Lightning's trainer",
        f"convnext-det {command} --model.help CLASS has those of a detector; --data.help CLASS those of the data",
        EXIT_STATUS,
    ]
    return "\n".join(lines) + "\n"


def _flags(command: str) -> dict[str, str]:
    """This package's own arguments of a command; the text of some begins with the commands that they are for."""
    found = {}
    for name, text in FLAGS.items():
        commands, colon, rest = text.partition(": ")
        if not colon or not set(commands.split(", ")) <= TRAINER.keys():
            found[f"--{name} {_VALUES[name]}"] = text
        elif command in commands.split(", "):
            found[f"--{name} {_VALUES[name]}"] = rest
    return found


def _table(entries: Mapping[str, str]) -> Iterator[str]:
    for name, text in entries.items():
        first, *rest = textwrap.wrap(text, 84)
        yield f"  {name:<33} {first}" if len(name) <= 33 else f"  {name}\n{'':<36}{first}"
        yield from (f"{'':<36}{line}" for line in rest)
