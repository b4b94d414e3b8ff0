"""The command ``plan``: what ``fit`` would set by itself."""

import argparse
import sys
from collections.abc import Sequence


def print_plan(arguments: Sequence[str]) -> int:
    """Print the plan for a dataset and the arguments of ``fit`` that are given."""
    parser = argparse.ArgumentParser(
        "convnext-det plan",
        description="Print what fit would set by itself for a dataset, and why, without training.",
        epilog="Further arguments are those of fit; what they set stays as it is, and the rest of the plan adapts.",
    )
    parser.add_argument("root", nargs="?", help="folder with a COCO, VOC or YOLO dataset; else give --data.root")
    # the folder comes first: behind a flag it could be the flag's value
    first = 1 if arguments and (not arguments[0].startswith("-") or arguments[0] in ("-h", "--help")) else 0
    options, rest = parser.parse_args(arguments[:first]), arguments[first:]
    root = [] if options.root is None else [f"--data.root={options.root}"]
    from lightning_convnext_det.cli.planning import PlanPrintedError
    from lightning_convnext_det.cli.trainer import DetectionCLI

    try:
        DetectionCLI(["fit", *root, *rest], only_plan=True)
    except PlanPrintedError as printed:
        if refusal := str(printed):
            sys.stderr.write(f"fit would end here: {refusal}\n")
    return 0
