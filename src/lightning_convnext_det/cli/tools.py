"""Commands beside the trainer's: check, models, import-weights, export, export-backbone, thresholds and demo.

Each imports what it needs when it runs: `check` takes no torch.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from lightning_convnext_det.cli import commands
from lightning_convnext_det.errors import ArgumentError, CheckpointError

Command = Callable[[Sequence[str]], int]
"""Takes the arguments of a command line, returns its exit status."""


def check(arguments: Sequence[str], run: Command) -> int:
    """List every invalid annotation of a dataset."""
    from lightning_convnext_det.data.annotations import Format
    from lightning_convnext_det.data.check import check_dataset, print_report, report_as_dict
    from lightning_convnext_det.data.formats.exif_frames import Exif
    from lightning_convnext_det.data.formats.problems import InvalidAnnotations
    from lightning_convnext_det.data.io.decode import MAX_PIXELS

    parser = _create_parser("check")
    parser.add_argument("root", help="folder with a COCO, VOC or YOLO dataset")
    parser.add_argument(
        "--format", default="auto", choices=("auto", *get_args(Format)), help="default: found from the files"
    )
    parser.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="larger images are refused")
    parser.add_argument("--decode", action="store_true", help="decode every image, not only its header")
    parser.add_argument(
        "--exif",
        default="auto",
        choices=get_args(Exif),
        help="frame of the boxes in images with an EXIF orientation; default: by the annotated sizes",
    )
    parser.add_argument(
        "--class_names",
        nargs="+",
        metavar="NAME",
        help="names of the classes in order of label; default: those of the dataset",
    )
    parser.add_argument(
        "--invalid_annotations",
        default="auto",
        choices=get_args(InvalidAnnotations),
        help="drop or refuse invalid annotations; default: harmless ones are dropped, others refused",
    )
    parser.add_argument("--json", action="store_true", help="print everything that is known, as one JSON object")
    options = vars(parser.parse_args(arguments))
    as_json = options.pop("json")
    report = check_dataset(options.pop("root"), **options)
    if as_json:
        sys.stdout.write(f"{json.dumps(report_as_dict(report), indent=2)}\n")
    else:
        print_report(report)
    return 0 if report.clean else 3


def plan(arguments: Sequence[str], run: Command) -> int:
    """Print what fit would set by itself for a dataset, and why."""
    from lightning_convnext_det.cli.plan import print_plan

    return print_plan(arguments)


def demo(arguments: Sequence[str], run: Command) -> int:
    """Train a detector on synthetic images and draw what it finds."""
    from lightning_convnext_det.cli.demo import run_demo

    return run_demo(arguments, run)


def thresholds(arguments: Sequence[str], run: Command) -> int:
    """Choose the score threshold of each class and store it."""
    from lightning_convnext_det.cli.thresholds import run_thresholds

    return run_thresholds(arguments)


def report(arguments: Sequence[str], run: Command) -> int:
    """Show what a detector does on a split: one HTML page."""
    from lightning_convnext_det.cli.report import run_report

    return run_report(arguments, commands.TOOLS["report"])


def compare(arguments: Sequence[str], run: Command) -> int:
    """Tell whether two detectors differ by more than the chance of the images."""
    from lightning_convnext_det.cli.compare import run_compare

    return run_compare(arguments, commands.TOOLS["compare"])


def import_weights_tool(arguments: Sequence[str], run: Command) -> int:
    """Convert third-party weights to a checkpoint."""
    parser = _create_parser("import-weights")
    parser.add_argument(
        "source",
        help="weights of Deformable DETR from birder, its authors or Hugging Face; of DINO from detrex or MMDetection; "
        "of Mask or Cascade Mask R-CNN from ConvNeXt's authors; of Faster R-CNN from torchvision",
    )
    parser.add_argument("destination", help="checkpoint to write")
    parser.add_argument("--backbone", help="timm name of the backbone, where the file does not name it")
    options = parser.parse_args(arguments)
    from lightning_convnext_det.convert.importer import import_weights
    from lightning_convnext_det.modules.registry import DETECTORS, save_module

    converted = import_weights(options.source, **({"backbone": options.backbone} if options.backbone else {}))
    slots = converted.report.slots
    names, ids = ([s.name for s in slots], [s.category_id for s in slots]) if slots else (None, None)
    hyper_parameters: dict[str, Any] = {**converted.arguments}
    module = DETECTORS[converted.module](class_names=names, category_ids=ids, **hyper_parameters)
    module.detector.load_state_dict(converted.state_dict)
    save_module(module, options.destination)
    sys.stdout.write(f"{converted.report}\nwritten: {options.destination}\n")
    return 0


def export(arguments: Sequence[str], run: Command) -> int:
    """Write a detector as a file that runs without this package."""
    from lightning_convnext_det.cli.export import export as export_checkpoint

    return export_checkpoint(arguments, run)


def export_backbone(arguments: Sequence[str], run: Command) -> int:
    """Save a detector's backbone as weights for timm."""
    parser = _create_parser("export-backbone")
    parser.add_argument("checkpoint", help="of a detector of this package")
    parser.add_argument("destination", help="file to write, ending in .safetensors")
    options = parser.parse_args(arguments)
    if not options.destination.endswith(".safetensors"):
        raise ArgumentError(f"'{options.destination}' must end in .safetensors")
    if not Path(options.destination).parent.is_dir():
        raise ArgumentError(f"'{options.destination}': there is no such folder")
    from safetensors.torch import save_file

    from lightning_convnext_det.models.backbone import TimmPyramid, backbone_state_dict
    from lightning_convnext_det.modules.registry import load_module

    module = load_module(options.checkpoint)
    pyramid = next((part for part in module.detector.modules() if isinstance(part, TimmPyramid)), None)
    if pyramid is None:
        raise CheckpointError(f"[LCD-K001] {options.checkpoint} has no timm backbone")
    tensors = backbone_state_dict(pyramid)
    save_file(tensors, options.destination, metadata={"architecture": pyramid.name})
    sys.stdout.write(
        f"{len(tensors)} tensors of '{pyramid.name}' written: {options.destination}\n"
        f"timm.create_model('{pyramid.name}', pretrained=True, num_classes=N, "
        f"pretrained_cfg_overlay={{'file': '{options.destination}'}}) loads them; N must not be the number of classes "
        "of timm's own weights, for the file has no classifier\n"
    )
    return 0


def models(arguments: Sequence[str], run: Command) -> int:
    """Print size, cost and published accuracy of backbones and detectors."""
    parser = _create_parser(
        "models",
        "Print parameters (M), multiply-adds (G; backbones at 224x224, detectors at 800x1333), channels, strides and "
        "published ImageNet-1k top-1 of backbones and detectors, and the licence of the backbone's pretrained weights.",
    )
    parser.add_argument("pattern", nargs="?", default="*", help="such as '*convnext_tiny*'; also any timm name")
    options = parser.parse_args(arguments)
    from lightning_convnext_det.models.model_stats import list_facts

    line = "{:<44} {:>9} {:>8}  {:<20} {:<12} {:>5}  {:<20} {}\n"
    sys.stdout.write(line.format("model", "params M", "GFLOPs", "channels", "strides", "top-1", "weights", "licence"))
    for facts in list_facts(options.pattern):
        channels, strides = (" ".join(map(str, values)) for values in (facts.channels, facts.strides))
        numbers = f"{facts.parameters / 1e6:.2f}", f"{facts.gflops:.2f}"
        top1 = "-" if facts.top1 is None else f"{facts.top1:.1f}"
        weights, licence = facts.weights or "-", facts.licence or "-"
        sys.stdout.write(line.format(facts.name, *numbers, channels, strides, top1, weights, licence))
    return 0


def _create_parser(command: str, description: str | None = None) -> argparse.ArgumentParser:
    text = commands.TOOLS[command]
    return argparse.ArgumentParser(
        f"convnext-det {command}", description=description or f"{text[0].upper()}{text[1:]}."
    )


TOOLS: dict[str, Callable[[Sequence[str], Command], int]] = {
    "check": check,
    "plan": plan,
    "models": models,
    "import-weights": import_weights_tool,
    "export": export,
    "export-backbone": export_backbone,
    "thresholds": thresholds,
    "report": report,
    "compare": compare,
    "demo": demo,
}
