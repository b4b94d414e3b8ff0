"""The command report: one HTML page that shows what a detector does on a split."""

import sys
from collections.abc import Sequence
from typing import get_args

from jsonargparse import ArgumentParser

from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.splits import Stage
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.report.create import create_report
from lightning_convnext_det.report.evaluation import evaluate_checkpoint, evaluate_predictions
from lightning_convnext_det.report.plots import check_matplotlib


def run_report(arguments: Sequence[str], description: str) -> int:
    """Evaluate a checkpoint, or take a file of predictions, and write its report."""
    parser = ArgumentParser("convnext-det report", description=description)
    parser.add_argument("checkpoint", nargs="?", type=str | None, help="of a detector of this package")
    parser.add_argument("--predictions", type=str | None, help="COCO results of any detector, instead of a checkpoint")
    parser.add_argument("--split", type=Stage, default="val", help=f"one of {', '.join(get_args(Stage))}")
    parser.add_argument(
        "--output", type=str, default="report.html", help="HTML file; the numbers go to .json beside it"
    )
    parser.add_argument("--device", type=str, default="auto", help="where to compute: auto, cpu, cuda")
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
