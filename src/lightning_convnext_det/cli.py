"""The command ``convnext-det``: LightningCLI for fit, validate, test and predict, and tools beside it."""

import argparse
import inspect
import logging
import platform
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_convnext_det import __version__
from lightning_convnext_det.callbacks import PredictionWriter
from lightning_convnext_det.checkpoints import import_weights
from lightning_convnext_det.data.check import check_dataset, print_report
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.pictures import Exif
from lightning_convnext_det.data.records import BadRecords
from lightning_convnext_det.demo import run_demo
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.models.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.deformable_detr import DeformableDETR
from lightning_convnext_det.models.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.suppression import Suppression
from lightning_convnext_det.models.zoo import suggest
from lightning_convnext_det.modules.checkpoint import MODULES, read_checkpoint, save_module
from lightning_convnext_det.modules.detection import FORMAT, DetectionModule

EXIT_STATUS = """exit status: 0 done, 2 usage or configuration, 3 data, 4 divergence, 5 weights unavailable,
6 checkpoint, 130 interrupted, 143 terminated"""


_LINKED = ("num_classes", "class_names", "category_ids")  # arguments of the model that the data set answers


_DETECTORS = (DetectionModule, CascadeRCNN, FasterRCNN, DeformableDETR)
_MODEL = [name for callee in _DETECTORS for name in inspect.signature(callee).parameters]


class _Parser(LightningArgumentParser):
    """LightningCLI's parser; an unknown argument gets the closest known one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and leave with status 2."""
        text = " ".join(str(message).split())
        known = [option for action in self._actions for option in action.option_strings]
        if unknown := re.search(r"nrecognized arguments: (--[\w.]+)", text):
            text += f"; {suggest(unknown.group(1), known)}"
        elif unknown := re.search(r"Option '(\w+)' is not accepted", text):
            text = f"--model.{unknown.group(1)} is not an argument of the model; {suggest(unknown.group(1), _MODEL)}"
        sys.stderr.write(f"error: {text}\n")
        raise SystemExit(2)


class DetectionCLI(LightningCLI):
    """LightningCLI for `DetectionModule` and `DetectionDataModule`, with defaults that need no configuration.

    The command line wins over configuration files, which win over the checkpoint given with ``--ckpt_path``.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._checkpoint = _named_checkpoint(arguments)
        super().__init__(
            DetectionModule,
            DetectionDataModule,
            args=list(arguments),
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # no class paths in checkpoints: they would be imported on loading
            seed_everything_default=1,
            trainer_defaults={"max_epochs": 24, "default_root_dir": "runs", "log_every_n_steps": 10},
            parser_class=_Parser,
            parser_kwargs={"prog": "convnext-det", "description": _DESCRIPTION, "version": __version__},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add checkpointing and output, link the classes of the data to the model, and set the defaults."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/map",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                "checkpoint.save_last": True,
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.add_lightning_class_args(PredictionWriter, "output")
        parser.add_argument(
            "--nms",
            type=Suppression | None,
            default=None,
            help="what happens to overlapping detections of a class (default: as the model or its checkpoint says)",
        )
        for name in _LINKED:  # a link makes it no required argument; the value is given in instantiate_classes
            parser.link_arguments("data", f"model.init_args.{name}", apply_on="instantiate")
        parser.set_defaults({"model": self._default_model()})

    def _default_model(self) -> dict[str, Any]:
        if self._checkpoint is None:
            return {"class_path": "lightning_convnext_det.modules.FasterRCNNModule"}
        module = MODULES[self._checkpoint[FORMAT]["module"]]
        options = {k: v for k, v in self._checkpoint["hyper_parameters"].items() if k not in _LINKED}
        return {"class_path": f"{module.__module__}.{module.__name__}", "init_args": options}

    def _classes(self, name: str) -> int | list[int] | list[str]:
        if self.subcommand == "predict" and self._checkpoint is not None:
            value: int | list[int] | list[str] = self._checkpoint["hyper_parameters"][name]
            return value
        return cast(int | list[int] | list[str], getattr(self.datamodule, name))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments given, whatever ``sys.argv`` holds."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it is: the checkpoint's values are the parser's defaults already."""
        subcommand = self.config["subcommand"]
        if self._checkpoint is None:
            if subcommand != "fit":
                raise CheckpointError(f"[LCD-K001] {subcommand} needs trained weights: add --ckpt_path FILE")
            return
        chosen = self.config[subcommand]["model"].get("init_args", {})
        for name, trained in self._checkpoint["hyper_parameters"].items():
            value = chosen.get(name, trained)
            if name not in (*_LINKED, "pretrained_backbone", "backbone_weights") and _plain(value) != _plain(trained):
                sys.stderr.write(f"model.{name}: {value} replaces the checkpoint's {trained}\n")

    def instantiate_classes(self) -> None:
        """Build data, model and trainer."""
        if self.subcommand != "fit":
            self.save_config_callback = None
        config = self.config.clone()
        model = config[self.subcommand].pop("model")
        self.config_init = self.parser.instantiate(config)
        self.datamodule = self._get(self.config_init, "data")
        # not by the parser, which would wrap a constructor's error into a page about types
        arguments = vars(model.init_args) | {name: self._classes(name) for name in _LINKED}
        if nms := config[self.subcommand].nms:
            arguments["nms"] = nms
        module = MODULES[model.class_path.rpartition(".")[2]]
        self.model = module(**arguments)
        self.trainer = self.instantiate_trainer()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        fit, predict = self.subcommand == "fit", self.subcommand == "predict"
        if config.get("precision") == "bf16-mixed" and _emulates_bfloat16(str(config["accelerator"])):
            sys.stderr.write("trainer.precision: 32-true replaces bf16-mixed, which this device only emulates\n")
            config["precision"] = "32-true"
        kinds = (ModelCheckpoint,) if fit else (PredictionWriter,) if predict else ()
        own: list[Callback] = [c for c in callbacks if isinstance(c, kinds)]
        given = config.get("callbacks") or []
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in given):
            own.append(RichProgressBar())
        if config.get("fast_dev_run") or config.get("enable_checkpointing") is False:
            own = [c for c in own if not isinstance(c, ModelCheckpoint)]
        if config.get("logger") in (None, True):
            config["logger"] = _loggers(Path(config["default_root_dir"])) if not predict else False
        if fit and config["logger"] and not config.get("fast_dev_run"):
            own.append(LearningRateMonitor("step"))
        for callback in own:
            if isinstance(callback, ModelCheckpoint) and config.get("limit_val_batches") == 0:
                callback.monitor = None  # nothing is measured: the last checkpoint is the best one
        return super()._instantiate_trainer(config, own)


def _emulates_bfloat16(accelerator: str) -> bool:
    """Tell whether the device that Lightning would choose has no arithmetic of its own for bfloat16."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        # torch has no public name for this (2.15); without it a convolution takes up to 30 times as long
        return platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported()
    return False


def _loggers(folder: Path) -> list[Logger]:
    csv = CSVLogger(folder, name="")
    if find_spec("tensorboard") is None:
        return [csv]
    return [csv, TensorBoardLogger(folder, name="", version=csv.version)]


def _plain(value: Any) -> Any:  # any value of a configuration
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _named_checkpoint(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Read the checkpoint that the command line or a configuration file names."""
    path = _option(arguments, ("--ckpt_path",))
    config = _option(arguments, ("--config", "-c"))
    if path is None and config is not None and Path(config).is_file():
        content = yaml.safe_load(Path(config).read_text())
        path = content.get("ckpt_path") if isinstance(content, dict) else None
    if path is None or path in ("null", "best", "last", "hpc", "registry"):  # Lightning's own words
        return None
    return read_checkpoint(path)


def _option(arguments: Sequence[str], names: Sequence[str]) -> str | None:
    found = None
    for i, argument in enumerate(arguments):
        for name in names:
            if argument == name and i + 1 < len(arguments):
                found = arguments[i + 1]
            elif argument.startswith(f"{name}="):
                found = argument.partition("=")[2]
    return found


# ---- tools


def _check(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("convnext-det check", description="List every bad record of a data set.")
    parser.add_argument("root", help="folder with a COCO, VOC or YOLO data set")
    parser.add_argument(
        "--format", default="auto", choices=("auto", "coco", "voc", "yolo"), help="default: found by looking"
    )
    parser.add_argument("--decode", action="store_true", help="decode every picture, not only its header")
    parser.add_argument(
        "--exif",
        default="auto",
        choices=get_args(Exif),
        help="what boxes refer to in pictures with an EXIF orientation; default: their annotated size decides",
    )
    parser.add_argument("--class_names", nargs="+", metavar="NAME", help="the classes in order of label")
    parser.add_argument(
        "--bad_records",
        default="auto",
        choices=get_args(BadRecords),
        help="what is to become of records that cannot be used; default: harmless ones are dropped, others refused",
    )
    options = vars(parser.parse_args(arguments))
    report = check_dataset(options.pop("root"), **options)
    print_report(report)
    return 0 if report.clean else 3


def _demo(arguments: Sequence[str]) -> int:
    return run_demo(arguments, main)


def _import_weights(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "convnext-det import-weights", description="Turn weights from elsewhere into a checkpoint of this package."
    )
    parser.add_argument(
        "source",
        help="Deformable DETR of birder, its authors or Hugging Face; Mask or Cascade Mask R-CNN of ConvNeXt's authors",
    )
    parser.add_argument("destination", help="checkpoint to write")
    parser.add_argument("--backbone", help="timm name of the backbone, where the file does not tell")
    options = parser.parse_args(arguments)
    converted = import_weights(options.source, **({"backbone": options.backbone} if options.backbone else {}))
    slots = converted.report.slots
    names, ids = ([s.name for s in slots], [s.category_id for s in slots]) if slots else (None, None)
    hyper_parameters: dict[str, Any] = {**converted.arguments}
    module = MODULES[converted.module](class_names=names, category_ids=ids, **hyper_parameters)
    module.detector.load_state_dict(converted.state_dict)
    save_module(module, options.destination)
    sys.stdout.write(f"{converted.report}\nwritten: {options.destination}\n")
    return 0


_TOOLS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "check": (_check, "list every bad record of a data set"),
    "import-weights": (_import_weights, "turn weights from elsewhere into a checkpoint"),
    "demo": (_demo, "train and look at a detector on pictures made up on the spot"),
}
_DESCRIPTION = (
    "Object detection on any timm backbone. Beside the commands of the trainer: "
    + "; ".join(f"{name} - {text}" for name, (_, text) in _TOOLS.items())
    + f". {EXIT_STATUS}"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; a user's mistake ends in one line, without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _quieten()
    try:
        if arguments and arguments[0] in _TOOLS:
            return _TOOLS[arguments[0]][0](arguments[1:])
        DetectionCLI(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        cause = _cause(error)
        line = user_message(cause)
        if line is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        return int(getattr(cause, "exit_status", 2))
    return 0


def _quieten() -> None:
    """Leave out what a user can do nothing about: advertisements, and warnings that are Lightning's own affair."""
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "💡 Tip" not in record.getMessage()


def _cause(error: BaseException) -> BaseException:
    """The error of ours that another library has wrapped into its own, or the error itself."""
    cause: BaseException | None = error
    while cause is not None and not hasattr(cause, "exit_status"):
        cause = cause.__cause__
    return cause or error


def user_message(error: BaseException) -> str | None:
    """Say in one line what the user did wrong; None if the error is a defect of a program."""
    text = str(error).strip()
    if "Original Traceback" in text:  # raised in a worker of the data loader, which puts its traceback into the text
        text = text.splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split())
    if hasattr(error, "exit_status") or isinstance(error, MisconfigurationException):
        return text
    if isinstance(error, ValueError | TypeError | FileNotFoundError) and _raised_here(error):
        return text
    return None


def _raised_here(error: BaseException) -> bool:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    return str(traceback.tb_frame.f_globals.get("__name__", "")).startswith("lightning_convnext_det.")
