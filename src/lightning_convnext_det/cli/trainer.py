"""LightningCLI for detectors and classifiers: fit, validate, test and predict."""

import difflib
import inspect
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_convnext_det import __version__
from lightning_convnext_det.callbacks.best_checkpoint import BestCheckpoint
from lightning_convnext_det.callbacks.classification_writer import ClassificationWriter
from lightning_convnext_det.callbacks.prediction_writer import PredictionWriter
from lightning_convnext_det.checkpoints.build_module import read_checkpoint, take_weights
from lightning_convnext_det.checkpoints.format import FORMAT
from lightning_convnext_det.cli.tools import TOOLS
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.image_folder import ImageFolderDataModule
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.modules.classification import ClassifierModule
from lightning_convnext_det.modules.detection import DetectionModule
from lightning_convnext_det.modules.faster_rcnn import FasterRCNNModule
from lightning_convnext_det.modules.optimization import TrainableModule
from lightning_convnext_det.modules.registry import MODULES
from lightning_convnext_det.ops.nms import NMSMethod
from lightning_convnext_det.suggestions import suggest

EXIT_STATUS = """exit status: 0 done, 2 usage or configuration, 3 data, 4 divergence, 5 weights unavailable,
6 checkpoint, 130 interrupted, 143 terminated"""

_DESCRIPTION = (
    "Object detection on any timm backbone. Beside the commands of the trainer: "
    + "; ".join(f"{name} - {text}" for name, (_, text) in TOOLS.items())
    + f". {EXIT_STATUS}"
)

_LINKED = ("num_classes", "class_names", "category_ids")  # arguments of the model that the dataset answers
_DETECTORS = (DetectionModule, CascadeRCNN, FasterRCNN, DeformableDETR, ClassifierModule)
_MODEL = [name for callee in _DETECTORS for name in inspect.signature(callee).parameters]
_DATA = [name for kind in (DetectionDataModule, ImageFolderDataModule) for name in inspect.signature(kind).parameters]


def _suggest_option(word: str) -> str:
    """Say which argument of model or data a misspelt one may mean."""
    options = {name: f"--model.{name}" for name in _MODEL} | {name: f"--data.{name}" for name in _DATA}
    close = [options[name] for name in difflib.get_close_matches(word, options, n=2, cutoff=0.5)]
    return f"did you mean {' or '.join(close)}?" if close else "see --model.help and --data.help"


class _Parser(LightningArgumentParser):
    """LightningCLI's parser; an unknown argument gets the closest known one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and leave with status 2."""
        text = " ".join(str(message).split())
        known = [option for action in self._actions for option in action.option_strings]
        if unknown := re.search(r"nrecognized arguments: (--[\w.]+)", text):
            text += f"; {suggest(unknown.group(1), known)}"
        elif unknown := re.search(r"Option '(\w+)' is not accepted", text):
            text = f"'{unknown.group(1)}' is no argument of the model or the data; {_suggest_option(unknown.group(1))}"
        sys.stderr.write(f"error: {text}\n")
        raise SystemExit(2)


class DetectionCLI(LightningCLI):
    """LightningCLI for detectors and classifiers and their data, with defaults that need no configuration.

    The command line wins over configuration files, which win over the checkpoint given with ``--ckpt_path``.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._start = _named_start(arguments)
        self._checkpoint = (
            _named_checkpoint(arguments) if self._start is None else read_checkpoint(self._start, MODULES)
        )
        self._named_model = _option(arguments, ("--model", "--model.class_path")) or _configured_model(arguments)
        super().__init__(
            TrainableModule,
            LightningDataModule,
            args=list(arguments),
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # no class paths in checkpoints: they would be imported on loading
            seed_everything_default=1,
            trainer_defaults={"max_epochs": 24, "default_root_dir": "runs", "log_every_n_steps": 10},
            parser_class=_Parser,
            parser_kwargs={"prog": "convnext-det", "description": _DESCRIPTION, "version": __version__},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add checkpointing and output, link the classes of the data to the model, and set the defaults."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
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
            type=NMSMethod | None,
            default=None,
            help="what happens to overlapping detections of a class (default: as the model or its checkpoint says)",
        )
        parser.add_argument(
            "--start_from",
            type=str | None,
            default=None,
            help="fit: begin with the network and the weights of this checkpoint, whatever its classes",
        )
        for name in _LINKED:  # a link makes it no required argument; the value is given in instantiate_classes
            parser.link_arguments("data", f"model.init_args.{name}", apply_on="instantiate")
        parser.set_defaults({"model": self._default_model(), "data": {"class_path": self._default_data()}})

    def _default_data(self) -> str:
        """The data module that belongs to the model."""
        module = self._checkpoint[FORMAT]["module"] if self._checkpoint else self._named_model
        data = ImageFolderDataModule if "Classifier" in module else DetectionDataModule
        return f"{data.__module__}.{data.__name__}"

    def _default_model(self) -> dict[str, Any]:
        if self._checkpoint is None:
            # the class that is asked for, or else arguments of the default class would leak into it
            module = MODULES.get(self._named_model.rpartition(".")[2], FasterRCNNModule)
            return {"class_path": f"{module.__module__}.{module.__name__}"}
        module = MODULES[self._checkpoint[FORMAT]["module"]]
        options = {k: v for k, v in self._checkpoint["hyper_parameters"].items() if k not in _LINKED}
        return {"class_path": f"{module.__module__}.{module.__name__}", "init_args": options}

    def _classes(self, name: str, module: type[TrainableModule]) -> int | list[int] | list[str] | None:
        is_classifier = issubclass(module, ClassifierModule)
        if self._checkpoint is not None and (self.subcommand == "predict" or is_classifier):
            value: int | list[int] | list[str] | None = self._checkpoint["hyper_parameters"][name]
            return value
        if is_classifier and self.subcommand != "fit":
            return None  # those of the pretrained weights, among which the folder's are found
        return cast(int | list[int] | list[str], getattr(self.datamodule, name))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments given, whatever ``sys.argv`` holds."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it is: the checkpoint's values are the parser's defaults already."""
        subcommand = self.config["subcommand"]
        if self._start is not None and (
            subcommand != "fit"
            or self.config[subcommand].get("ckpt_path")
            or "Classifier" in str(self._default_model())
        ):
            raise ValueError("--start_from begins the training of a detector: it is for fit, without --ckpt_path")
        if self._checkpoint is None:
            chosen = self.config[subcommand]["model"].get("init_args", {})
            released = chosen.get("pretrained_backbone") or chosen.get("backbone_weights")
            if subcommand != "fit" and not (released and "Classifier" in self._named_model):
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
        module = MODULES[model.class_path.rpartition(".")[2]]
        arguments = vars(model.init_args) | {name: self._classes(name, module) for name in _LINKED}
        if nms := config[self.subcommand].nms:
            arguments["nms"] = nms
        self.model = module(**arguments)
        if self._start is not None and self._checkpoint is not None and isinstance(self.model, DetectionModule):
            new = take_weights(self.model, self._checkpoint, self._start)
            kept = len(self.model.state_dict()) - len(new)
            sys.stderr.write(f"{self._start}: {kept} tensors kept, {len(new)} begin anew for other classes\n")
        self.trainer = self.instantiate_trainer()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """The arguments of the trainer's method; predictions are written as they come, not kept in memory."""
        arguments: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if "return_predictions" in arguments and arguments["return_predictions"] is None:
            arguments["return_predictions"] = False
        return arguments

    def after_fit(self) -> None:
        """Say where the result is."""
        if path := getattr(self.trainer.checkpoint_callback, "best_model_path", ""):
            rank_zero_info(f"the best checkpoint is '{os.path.relpath(path)}'")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        fit, predict = self.subcommand == "fit", self.subcommand == "predict"
        if config.get("precision") == "bf16-mixed" and _emulates_bfloat16(str(config["accelerator"])):
            sys.stderr.write("trainer.precision: 32-true replaces bf16-mixed, which this device only emulates\n")
            config["precision"] = "32-true"
        kinds = (ModelCheckpoint,) if fit else (PredictionWriter,) if predict else ()
        own: list[Callback] = [c for c in callbacks if isinstance(c, kinds)]
        if isinstance(self.model, ClassifierModule):
            own = [ClassificationWriter(c.folder) if isinstance(c, PredictionWriter) else c for c in own]
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
            if isinstance(callback, ModelCheckpoint) and not self._validates(config):
                callback.monitor = None  # nothing is measured: the last checkpoint is the best one
            elif isinstance(callback, ModelCheckpoint) and callback.monitor == TrainableModule.monitor:
                callback.monitor = cast(TrainableModule, self.model).monitor
        return super()._instantiate_trainer(config, own)

    def _validates(self, config: dict[str, Any]) -> bool:
        if isinstance(self.datamodule, DetectionDataModule) and not self.datamodule.validates:
            return False
        return config.get("limit_val_batches") != 0


def run_trainer(arguments: Sequence[str]) -> None:
    """Run one of the trainer's commands, or print the help.

    Raises:
        ValueError: if the trainer cannot be set up as asked.
    """
    try:
        DetectionCLI(arguments)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error


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
    path = _configuration(arguments).get("ckpt_path") if path is None else path
    if not isinstance(path, str) or path in ("null", "best", "last", "hpc", "registry"):  # Lightning's own words
        return None
    return read_checkpoint(path, MODULES)


def _named_start(arguments: Sequence[str]) -> str | None:
    """The checkpoint to begin with that the command line names, or a configuration file for a training's first part."""
    path = _option(arguments, ("--start_from",))
    content = _configuration(arguments)
    continues = _option(arguments, ("--ckpt_path",)) or content.get("ckpt_path")
    if path is None and arguments[:1] == ["fit"] and not continues:
        path = content.get("start_from")
    return path if isinstance(path, str) and path != "null" else None


def _configured_model(arguments: Sequence[str]) -> str:
    """The class of the model that a configuration file names; empty if it names none."""
    model = _configuration(arguments).get("model")
    return str(model.get("class_path", "")) if isinstance(model, dict) else ""


def _configuration(arguments: Sequence[str]) -> dict[str, Any]:
    """The content of the configuration file given; empty if it cannot be read, of which the parser will say why."""
    config = _option(arguments, ("--config", "-c"))
    if config is None or not Path(config).is_file():
        return {}
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _option(arguments: Sequence[str], names: Sequence[str]) -> str | None:
    found = None
    for i, argument in enumerate(arguments):
        for name in names:
            if argument == name and i + 1 < len(arguments):
                found = arguments[i + 1]
            elif argument.startswith(f"{name}="):
                found = argument.partition("=")[2]
    return found
