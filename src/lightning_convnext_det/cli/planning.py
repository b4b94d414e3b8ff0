"""The plan that ``fit`` follows: made when the arguments are parsed, and given to the parser as defaults."""

import sys
from collections.abc import Mapping
from typing import Any, get_type_hints

import jsonargparse
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only

from lightning_convnext_det.arguments import check_arguments
from lightning_convnext_det.cli.given import find_given
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.fingerprint import take_fingerprint
from lightning_convnext_det.data.splits import check_objects
from lightning_convnext_det.errors import WeightsError
from lightning_convnext_det.models.backbone_weights import missing_weights
from lightning_convnext_det.modules.deformable_detr import DeformableDETRModule
from lightning_convnext_det.modules.dino import DINOModule
from lightning_convnext_det.modules.registry import DETECTORS
from lightning_convnext_det.planning.draft import Plan, show
from lightning_convnext_det.planning.machine import find_machine
from lightning_convnext_det.planning.plan import plan


class PlanPrintedError(Exception):
    """Ends the command ``plan`` when the plan is printed, before anything is built for training."""


class TrainingPlanner:
    """Plans the trainings of a command line, and keeps the data module whose splits it has read.

    Args:
        only_plan: stop when the plan is printed.
    """

    def __init__(self, only_plan: bool = False) -> None:
        self.only_plan = only_plan
        self.data: DetectionDataModule | None = None
        self._data_arguments: dict[str, Any] = {}

    def plan(
        self, kind: type[LightningModule], config: jsonargparse.Namespace, names: set[str], start: str | None
    ) -> Plan | None:
        """Make and print the plan of a fit; None where there is none, as for a module or data of the user's own.

        Args:
            kind: class of the module.
            config: all arguments, parsed without a plan.
            names: the settings that the user has given, such as ``model.lr``.
            start: the checkpoint that the training starts from; its network counts as given.

        Raises:
            WeightsError: if the pretrained weights that are planned cannot be had.
        """
        arguments = config["data"].as_dict().get("init_args") or {}
        if (
            kind not in DETECTORS.values()
            or not has_own_data(config)
            or not (arguments.get("root") or arguments.get("train"))
            or arguments.get("datasets")
        ):
            return None
        everything = config.as_dict()
        if start is not None:
            names = names | {f"model.{name}" for name in everything["model"]["init_args"] if name not in _TRAINING}
        given = {**find_given(names, everything), "start_from": start, "tiles": everything.get("tiles")}
        detector = get_type_hints(DETECTORS[kind.__name__].build_detector)["return"]
        # but for the number of classes, which the data tell later
        options = {name.removeprefix("model."): value for name, value in given.items() if name != "model.num_classes"}
        check_arguments(detector.__init__, options)
        self.data, self._data_arguments = DetectionDataModule(**arguments), arguments
        made = self._make(kind, self.data, given, config["trainer"].as_dict())
        rank_zero_only(made.print)()
        if self.only_plan:
            raise PlanPrintedError(made.refusal or "")
        if made.refusal is not None:
            raise WeightsError(f"[LCD-W001] {made.refusal}")
        return made

    @staticmethod
    @rank_zero_only
    def say_kept(settings: Mapping[str, Any]) -> None:
        """Say which settings a resumed run has from the plan of its first part."""
        if settings:
            text = ", ".join(f"{name} {show(value)}" for name, value in settings.items())
            sys.stderr.write(f"the plan of the checkpoint: {text}\n")

    def share_splits(self, data: DetectionDataModule, arguments: Mapping[str, Any]) -> None:
        """Spare a data module of the same arguments reading the splits once more."""
        same = {name: value for name, value in self._data_arguments.items() if name in SPLITS}
        if self.data is not None and same == {name: value for name, value in arguments.items() if name in SPLITS}:
            data.take_splits(self.data)

    @staticmethod
    def _make(
        kind: type[LightningModule], data: DetectionDataModule, given: Mapping[str, Any], trainer: Mapping[str, Any]
    ) -> Plan:
        train, val = data.annotations("train"), data.annotations("val")
        assert train is not None
        check_objects(train)
        machine = find_machine(str(trainer["accelerator"]), trainer["devices"], int(trainer["num_nodes"]))
        return plan(
            take_fingerprint(train),
            machine,
            given,
            images_to_validate=0 if val is None or trainer.get("limit_val_batches") == 0 else len(val),
            kind=next((name for base, name in _KINDS.items() if issubclass(kind, base)), "rcnn"),
            missing_weights=missing_weights,
        )


_KINDS = {DeformableDETRModule: "detr", DINOModule: "dino"}


def has_own_data(config: jsonargparse.Namespace) -> bool:
    """Whether the data module of a fit is this package's, by any of its import paths, not a user's of the same name."""
    package, _, name = str(config["data"]["class_path"]).partition(".")
    return package == __name__.partition(".")[0] and name.endswith(DetectionDataModule.__name__)


# arguments of a module that are of its training, not of its network
_TRAINING = ("lr", "warmup_steps", "schedule", "max_detections")
# the arguments that decide which annotations a data module reads
SPLITS = (
    "root", "format", "train", "val", "test", "train_images", "val_images", "test_images", "val_fraction", "seed",
    "class_names", "classes", "invalid_annotations", "max_pixels", "exif", "train_on_difficult",
)  # fmt: skip
