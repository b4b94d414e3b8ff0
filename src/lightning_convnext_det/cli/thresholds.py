"""The command ``thresholds``: choose the score thresholds of a checkpoint's classes on a split, and store them."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, RichProgressBar

from lightning_convnext_det.checkpoints.file import read_checkpoint_file, write_checkpoint_file
from lightning_convnext_det.checkpoints.format import FORMAT
from lightning_convnext_det.checkpoints.remote import is_address
from lightning_convnext_det.cli.arguments import Parser
from lightning_convnext_det.cli.commands import TOOLS
from lightning_convnext_det.cli.inference import add_inference_arguments, add_to_inference
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.metrics.thresholds import ClassThreshold, choose_thresholds
from lightning_convnext_det.modules.detection import DetectionModule
from lightning_convnext_det.modules.registry import load_module
from lightning_convnext_det.visualization import SCORE_THRESHOLD


def run_thresholds(arguments: Sequence[str]) -> int:
    """Print the score threshold of each class and what it gives, and write it into the checkpoint.

    With test-time augmentation or an ensemble it is printed only: predictions without them have other scores.

    Args:
        arguments: of the command line, see ``--help``.

    Returns:
        The exit status 0.
    """
    options = _create_parser().parse_args(list(arguments))
    if options.precision is not None and options.recall is not None:
        raise ArgumentError("give --precision or --recall, not both")
    for name in ("precision", "recall"):
        wanted = options[name]
        if wanted is not None and not 0 < wanted <= 1:
            raise ArgumentError(f"--{name} is {wanted:g}; it must be above 0 and at most 1")
    module = load_module(options.checkpoint)
    data = DetectionDataModule(**options.data.as_dict())
    add_to_inference(module, options.as_dict(), data, "validate")
    module.evaluator.choose = partial(choose_thresholds, precision=options.precision, recall=options.recall)
    chosen = _evaluate(module, data, options.split, options.accelerator)
    goal = "highest F1" if options.precision is None else f"a precision of {options.precision:g}"
    goal = goal if options.recall is None else f"a recall of {options.recall:g}"
    sys.stdout.write(
        f"thresholds of {goal} at IoU 0.5, on the {options.split} split\n{format_table(module.class_names, chosen)}"
    )
    if options.dry_run or options.tta or options.ensemble:
        reason = "--dry_run" if options.dry_run else "fused scores are not those of the checkpoint alone"
        sys.stdout.write(f"nothing is written ({reason})\n")
    else:
        store_thresholds(options.checkpoint, chosen)
        sys.stdout.write(f"written: {options.checkpoint}\n")
    return 0


def store_thresholds(checkpoint: str | Path, chosen: Sequence[ClassThreshold]) -> None:
    """Write thresholds into a checkpoint; the file is the whole new one or the old one."""
    content = read_checkpoint_file(checkpoint)
    content[FORMAT]["score_thresholds"] = [one.threshold for one in chosen]
    target = checkpoint if is_address(checkpoint) else os.path.realpath(checkpoint)  # a link stays one
    write_checkpoint_file(content, target)


def format_table(names: Sequence[str], chosen: Sequence[ClassThreshold]) -> str:
    """A line for each class and notes on those that the split does not tell of, as text."""
    width = max(len("class"), *map(len, names))
    lines = [f"{'class':<{width}}  threshold  precision  recall     F1  objects"]
    for name, one in zip(names, chosen, strict=True):
        threshold = f"{SCORE_THRESHOLD:.3f}*" if one.threshold is None else f"{one.threshold:.3f} "
        metrics = f"{one.precision:>9.3f}  {one.recall:>6.3f}  {one.f1:>5.3f}"
        lines.append(f"{name:<{width}}  {threshold:>9}  {metrics}  {one.num_objects:>7}".replace("  nan", "    -"))
    unknown = [name for name, one in zip(names, chosen, strict=True) if one.threshold is None]
    missed = [name for name, one in zip(names, chosen, strict=True) if one.threshold is not None and not one.reached]
    if unknown:
        lines.append(
            f"* no object, or none found: nothing is stored, and {SCORE_THRESHOLD} is used: {', '.join(unknown)}"
        )
    if missed:
        lines.append(f"not reached by any threshold, the nearest is taken: {', '.join(missed)}")
    return "".join(f"{line}\n" for line in lines)


def _evaluate(
    module: DetectionModule, data: pl.LightningDataModule, split: str, accelerator: str
) -> list[ClassThreshold]:
    callbacks: list[Callback] = [RichProgressBar()] if sys.stderr.isatty() else []
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=bool(callbacks),
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    run = trainer.validate if split == "val" else trainer.test
    run(module, data, verbose=False)
    return module.evaluator.thresholds


def _create_parser() -> Parser:
    text = TOOLS["thresholds"]
    parser = Parser(prog="convnext-det thresholds", description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument(
        "checkpoint", type=str, help="of a detector of this package; the thresholds are written into it"
    )
    parser.add_class_arguments(DetectionDataModule, "data")
    parser.add_argument(
        "--split", choices=["val", "test"], default="val", help="split of the dataset to choose them on"
    )
    parser.add_argument(
        "--precision", type=float | None, default=None, help="choose the highest recall that has this precision"
    )
    parser.add_argument(
        "--recall", type=float | None, default=None, help="choose the highest precision that has this recall"
    )
    add_inference_arguments(parser)
    parser.add_argument("--accelerator", type=str, default="auto", help="device, as of Lightning's trainer")
    parser.add_argument("--dry_run", action="store_true", help="print, but do not write")
    return parser
