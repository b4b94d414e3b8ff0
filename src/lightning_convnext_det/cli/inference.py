"""Arguments of the trainer's commands for windows, test-time augmentation and ensembles."""

import sys
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_convnext_det.cli.commands import FLAGS
from lightning_convnext_det.data.transforms import CROP_SIZE
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.models.fused import FusedDetector, augment_detector
from lightning_convnext_det.modules.detection import DetectionModule
from lightning_convnext_det.modules.registry import load_members
from lightning_convnext_det.ops.window_merging import TileMerge

OVERLAP, MERGE = 0.2, "nmm"  # of windows by default


def add_inference_arguments(parser: LightningArgumentParser) -> None:
    """Add ``--tiles``, ``--tile_overlap``, ``--tile_merge``, ``--tta`` and ``--ensemble``."""
    add_flag(parser, "tiles", int | None, None)
    add_flag(parser, "tile_overlap", float, OVERLAP)
    add_flag(parser, "tile_merge", TileMerge, MERGE)
    add_flag(parser, "tta", str | None, None)
    add_flag(parser, "ensemble", str | list[str] | None, None)


def add_flag(parser: LightningArgumentParser, name: str, kind: Any, default: object) -> None:  # a type or a union
    """Add one of the arguments that `FLAGS` describes."""
    parser.add_argument(f"--{name}", type=kind, default=default, help=FLAGS[name])


def size_training_tiles(config: Mapping[str, Any]) -> None:
    """Make ``--tiles`` the size of the training windows.

    Raises:
        ArgumentError: if ``data.crop_size`` gives them another size.
    """
    options, tiles = config["data"].get("init_args", {}), config.get("tiles")
    if tiles is None or options.get("train_transforms") != "tiles":
        return
    if options["crop_size"] not in (CROP_SIZE, tiles):
        raise ArgumentError(f"--tiles is {tiles}, but data.crop_size is {options['crop_size']}; give one of them")
    options["crop_size"] = tiles


def add_to_inference(
    model: LightningModule, config: Mapping[str, Any], data: LightningDataModule, subcommand: str
) -> None:
    """Put the windows, views and further detectors that are asked for around a module's detector.

    Raises:
        ArgumentError: if they are not for this command or model.
    """
    members = config["ensemble"] or []
    paths = [path.strip() for path in members.split(",")] if isinstance(members, str) else list(members)
    asked = [name for name in ("tiles", "tta", "ensemble") if config[name] not in (None, "", [])]
    for name, usual in (("tile_overlap", OVERLAP), ("tile_merge", MERGE)):
        if "tiles" not in asked and config[name] != usual:
            sys.stderr.write(f"--{name} {config[name]} has no effect without --tiles\n")
    if not asked:
        return
    if not isinstance(model, DetectionModule):
        raise ArgumentError(f"--{asked[0]} is for detectors; {type(model).__name__} is none")
    if subcommand == "fit" and (config["tta"] or paths):
        raise ArgumentError(f"--{asked[-1]} is for validate, test and predict; fit validates what it trains")
    detector = model.detector
    if paths:
        detector = FusedDetector([detector, *load_members(paths, model)])
    batch_size = getattr(data, "batch_size", 8)
    model.use_for_inference(
        augment_detector(
            detector, config["tiles"], config["tile_overlap"], config["tile_merge"], config["tta"], batch_size
        )
    )
