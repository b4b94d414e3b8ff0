"""The command compare: is the difference between two detectors more than the chance of the images?"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from jsonargparse import ArgumentParser

from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.splits import Stage
from lightning_convnext_det.report.comparison import compare, comparison_table
from lightning_convnext_det.report.evaluation import Evaluation, evaluate_checkpoint, evaluate_predictions


def run_compare(arguments: Sequence[str], description: str) -> int:
    """Evaluate two detectors on a split and print their metrics with intervals of the differences."""
    parser = ArgumentParser("convnext-det compare", description=description)
    for name in ("a", "b"):
        parser.add_argument(name, type=str, help="a checkpoint, or a .json file of COCO results of any detector")
    parser.add_argument("--split", type=Stage, default="val", help=f"one of {', '.join(get_args(Stage))}")
    parser.add_argument("--output", type=str | None, help="JSON file for the numbers")
    parser.add_argument("--device", type=str, default="auto", help="where to compute: auto, cpu, cuda")
    parser.add_class_arguments(DetectionDataModule, "data", skip={"datasets", "predict", "predict_split"})
    options = parser.parse_args(list(arguments))
    data = parser.instantiate_classes(options).data

    def evaluate(source: str) -> Evaluation:
        if source.endswith(".json"):
            return evaluate_predictions(source, data, options.split)
        return evaluate_checkpoint(source, data, options.split, options.device)

    differences = compare(evaluate(options.a), evaluate(options.b))
    sys.stdout.write(f"A: {options.a}\nB: {options.b}\n{comparison_table(differences)}\n")
    if options.output is not None:
        numbers = {one.name: {**one._asdict(), "verdict": one.verdict} for one in differences}
        Path(options.output).write_text(json.dumps(numbers, indent=1) + "\n")
    return 0
