"""The command report: one HTML page that shows what a detector does on a split."""

import argparse
import sys
from collections.abc import Sequence

from lightning_convnext_det.cli.commands import DATA_HELP, SPLITS
from lightning_convnext_det.errors import ArgumentError


def run_report(arguments: Sequence[str], description: str) -> int:
    """Evaluate a checkpoint, or take a file of predictions, and write its report."""
    if list(arguments) in (["--help"], ["-h"]):  # those of the data would import torch
        add_arguments(
            parser := argparse.ArgumentParser("convnext-det report", description=description, epilog=DATA_HELP)
        )
        parser.parse_args(arguments)
    from jsonargparse import ArgumentParser

    from lightning_convnext_det.data.datamodule import DetectionDataModule
    from lightning_convnext_det.report.create import create_report
    from lightning_convnext_det.report.evaluation import evaluate_checkpoint, evaluate_predictions
    from lightning_convnext_det.report.plots import check_matplotlib

    parser = ArgumentParser("convnext-det report", description=description)
    add_arguments(parser)
    parser.add_class_arguments(DetectionDataModule, "data", skip={"datasets", "predict", "predict_split"})
    options = parser.parse_args(list(arguments))
    if (options.checkpoint is None) == (options.predictions is None):
        raise ArgumentError("report needs a checkpoint or --predictions FILE, one of them")
    check_matplotlib()
    data = parser.instantiate_classes(options).data
    if options.checkpoint is not None:
        evaluation = evaluate_checkpoint(options.checkpoint, data, options.split, options.device)
    else:
        evaluation = evaluate_predictions(options.predictions, data, options.split)
    written = create_report(evaluation, data, options.split, options.output)
    low, high = written.analysis.intervals["map"]
    sys.stdout.write(
        f"mAP {100 * written.analysis.metrics['map']:.1f} (95 % interval {100 * low:.1f} to {100 * high:.1f}), "
        f"{len(written.label_errors)} likely label errors\n{written.page}\n{written.numbers}\n{written.plots}/\n"
    )
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments but those of the data."""
    parser.add_argument("checkpoint", nargs="?", type=str, help="of a detector of this package")
    parser.add_argument("--predictions", type=str, help="COCO results of any detector, instead of a checkpoint")
    parser.add_argument("--split", choices=SPLITS, default="val", help="split of the dataset")
    parser.add_argument(
        "--output", type=str, default="report.html", help="HTML file; the numbers go to .json beside it"
    )
    parser.add_argument("--device", type=str, default="auto", help="where to compute: auto, cpu, cuda")
