"""The command ``plan``: what ``fit`` would set by itself."""

import argparse
import sys
from collections.abc import Sequence

from lightning_convnext_det.errors import ArgumentError


def print_plan(arguments: Sequence[str]) -> int:
    """Print the plan for a dataset and the arguments of ``fit`` that are given."""
    parser = argparse.ArgumentParser(
        "convnext-det plan",
        description="Print what fit would set by itself for a dataset, and why, without training.",
        epilog="Further arguments are those of fit; what they set stays as it is, and the rest of the plan adapts.",
    )
    parser.add_argument("root", help="folder with a COCO, VOC or YOLO dataset")
    options, rest = parser.parse_known_args(arguments)
    from lightning_convnext_det.cli.planning import PlanPrintedError
    from lightning_convnext_det.cli.trainer import DetectionCLI

    try:
        DetectionCLI(["fit", f"--data.root={options.root}", *rest], only_plan=True)
    except PlanPrintedError as printed:
        if refusal := str(printed):
            sys.stderr.write(f"fit would end here: {refusal}\n")
        return 0
    raise ArgumentError("there is no plan for these arguments: plans are for this package's detectors and data")
