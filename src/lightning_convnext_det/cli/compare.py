"""The command compare: is the difference between two detectors more than the chance of the images?"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_convnext_det.cli.commands import DATA_HELP, SPLITS

if TYPE_CHECKING:
    from lightning_convnext_det.report.evaluation import Evaluation


def run_compare(arguments: Sequence[str], description: str) -> int:
    """Evaluate two detectors on a split and print their metrics with intervals of the differences."""
    if list(arguments) in (["--help"], ["-h"]):  # those of the data would import torch
        add_arguments(
            parser := argparse.ArgumentParser("convnext-det compare", description=description, epilog=DATA_HELP)
        )
        parser.parse_args(arguments)
    from jsonargparse import ArgumentParser

    from lightning_convnext_det.data.datamodule import DetectionDataModule
    from lightning_convnext_det.report.comparison import compare, comparison_table
    from lightning_convnext_det.report.evaluation import evaluate_checkpoint, evaluate_predictions

    parser = ArgumentParser("convnext-det compare", description=description)
    add_arguments(parser)
    parser.add_class_arguments(DetectionDataModule, "data", skip={"datasets", "predict", "predict_split"})
    options = parser.parse_args(list(arguments))
    data = parser.instantiate_classes(options).data

    def evaluate(source: str) -> "Evaluation":
        if source.endswith(".json"):
            return evaluate_predictions(source, data, options.split)
        return evaluate_checkpoint(source, data, options.split, options.device)

    differences = compare(evaluate(options.a), evaluate(options.b))
    sys.stdout.write(f"A: {options.a}\nB: {options.b}\n{comparison_table(differences)}\n")
    if options.output is not None:
        numbers = {one.name: {**one._asdict(), "verdict": one.verdict} for one in differences}
        Path(options.output).write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments but those of the data."""
    for name in ("a", "b"):
        parser.add_argument(name, type=str, help="a checkpoint, or a .json file of COCO results of any detector")
    parser.add_argument("--split", choices=SPLITS, default="val", help="split of the dataset")
    parser.add_argument("--output", type=str, help="JSON file for the numbers")
    parser.add_argument("--device", type=str, default="auto", help="where to compute: auto, cpu, cuda")
