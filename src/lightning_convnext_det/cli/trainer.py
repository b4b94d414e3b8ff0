"""LightningCLI for detectors and classifiers: fit, validate, test and predict."""

import platform
import pydoc
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_convnext_det import __version__
from lightning_convnext_det.callbacks.best_checkpoint import BestCheckpoint
from lightning_convnext_det.callbacks.classification_writer import ClassificationWriter
from lightning_convnext_det.callbacks.prediction_writer import PredictionWriter
from lightning_convnext_det.callbacks.progress_bar import StepProgressBar
from lightning_convnext_det.callbacks.run_overview import RunOverview
from lightning_convnext_det.callbacks.stage_unfreezing import StageUnfreezing
from lightning_convnext_det.callbacks.weight_averaging import EMAWithWarmup
from lightning_convnext_det.checkpoints.build_module import check_writer, read_checkpoint, take_weights
from lightning_convnext_det.checkpoints.format import FORMAT, read_grey_range
from lightning_convnext_det.cli.arguments import Choices, Parser
from lightning_convnext_det.cli.commands import DESCRIPTION
from lightning_convnext_det.cli.given import find_given
from lightning_convnext_det.cli.inference import add_inference_arguments, add_to_inference, size_training_tiles
from lightning_convnext_det.cli.kept_plan import KeptPlan, read_kept_plan, settings_to_keep
from lightning_convnext_det.cli.messages import is_raised_in, one_line
from lightning_convnext_det.cli.planning import TrainingPlanner, has_own_data
from lightning_convnext_det.cli.run_options import add_run_arguments, create_run_callbacks, tune
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.image_folder import ImageFolderDataModule
from lightning_convnext_det.errors import ArgumentError, CheckpointError, UserError
from lightning_convnext_det.modules.classification import ClassifierModule
from lightning_convnext_det.modules.faster_rcnn import FasterRCNNModule
from lightning_convnext_det.modules.optimization import TrainableModule
from lightning_convnext_det.modules.registry import MODULES

CALLBACKS = (EMAWithWarmup, StageUnfreezing)  # known by their bare names in --trainer.callbacks+=NAME once imported
_LINKED = ("num_classes", "class_names", "category_ids")  # arguments of the model that the dataset answers
_DATA = {kind.__name__: kind for kind in (DetectionDataModule, ImageFolderDataModule)}
_LIGHTNING_WORDS = ("best", "last", "hpc", "registry")  # values of ckpt_path that Lightning looks up itself
_BEST_CHECKPOINT = {
    "checkpoint.monitor": "val/map",
    "checkpoint.mode": "max",
    "checkpoint.filename": "best",
    "checkpoint.save_last": True,
    "checkpoint.auto_insert_metric_name": False,
    "checkpoint.enable_version_counter": False,
}


class DetectionCLI(LightningCLI):
    """LightningCLI for detectors and classifiers and their data, with defaults that need no configuration.

    The command line wins over configuration files, which win over the checkpoint given by ``--ckpt_path``.
    """

    def __init__(self, arguments: Sequence[str], only_plan: bool = False) -> None:
        self._command = arguments[0] if arguments else ""
        self._planner = TrainingPlanner(only_plan)
        self._kept: dict[str, Any] = {}  # of the plan, in checkpoints
        self._start: str | None = None
        self._checkpoint: dict[str, Any] | None = None  # that of --ckpt_path or --start_from
        self._kind: type[LightningModule] = FasterRCNNModule
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
            parser_class=Parser,
            parser_kwargs={"prog": "convnext-det", "description": DESCRIPTION, "version": __version__},
        )

    # ---- arguments

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning, which asks self
        """The command that is given, so that its parser alone is built; all where a configuration file names it."""
        known = LightningCLI.subcommands()
        return {self._command: known[self._command]} if self._command in known else known

    def add_arguments_to_parser(self, parser: Parser) -> None:  # type: ignore[override]  # see parser_class
        """Add checkpointing and output, and link the classes of the data to the model."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.set_defaults(_BEST_CHECKPOINT)
        parser.add_lightning_class_args(PredictionWriter, "output")
        add_run_arguments(parser)
        add_inference_arguments(parser)
        for name in _LINKED:  # a linked argument is not required
            parser.link_arguments(
                "data", f"model.init_args.{name}", lambda data, name=name: self._classes(name, data), "instantiate"
            )
        for base in (TrainableModule, LightningDataModule):
            parser.add_instantiator(_construct, base)
        parser.set_defaults_by, parser.plan_by = self._set_defaults, self._plan
        self._set_class_defaults(parser, FasterRCNNModule, DetectionDataModule)

    def _set_defaults(self, parser: Parser, choices: Choices) -> None:
        """Make the model of the checkpoint, or the class that is chosen, the default of a subcommand."""
        kind = _find_class(choices.model, MODULES)
        path = choices.ckpt_path if choices.ckpt_path not in _LIGHTNING_WORDS else None
        self._start = self._checkpoint_to_start_from(str(parser.subcommand), choices)
        options: dict[str, Any] = {}
        if path := self._start or path:
            self._checkpoint = read_checkpoint(path, MODULES, kind)
            if parser.subcommand == "fit" and not self._start:
                check_writer(self._checkpoint, kind, path)
            options = {k: v for k, v in self._checkpoint["hyper_parameters"].items() if k not in _LINKED}
            kind = kind or MODULES[self._checkpoint[FORMAT]["module"]]
        self._kind = kind or FasterRCNNModule
        if self._start and issubclass(self._kind, ClassifierModule):
            raise ArgumentError(
                "--start_from is for detectors; a detector takes a classifier by --model.backbone_weights"
            )
        data = ImageFolderDataModule if issubclass(self._kind, ClassifierModule) else DetectionDataModule
        self._set_class_defaults(parser, self._kind, _find_class(choices.data, _DATA) or data, options)

    def _plan(self, parser: Parser, config: Namespace, names: set[str]) -> bool:
        """Make the plan of a fit the defaults of its parser, of a resumed one that of the checkpoint; False without."""
        if parser.subcommand != "fit" or not config["plan"]:
            return False
        options: dict[str, Any] = {}
        if config["ckpt_path"] is None:
            made = self._planner.plan(self._kind, config, names, self._start)
            if made is None:
                return False
            options, self._kept = made.chosen("model"), settings_to_keep(made)
        elif self._checkpoint is not None and has_own_data(config):
            given = find_given(names, config.as_dict())
            self._kept = read_kept_plan(self._checkpoint, given)
            self._planner.say_kept({name: value for name, value in self._kept.items() if name not in given})
        if not options and not self._kept:
            return False
        trained = {} if self._checkpoint is None else self._checkpoint["hyper_parameters"]
        options = {k: v for k, v in trained.items() if k not in _LINKED} | options
        data = {k.removeprefix("data."): v for k, v in self._kept.items() if k.startswith("data.")}
        self._set_class_defaults(parser, self._kind, DetectionDataModule, options, data)
        kept = {name: value for name, value in self._kept.items() if not name.startswith("data.")}
        parser.set_defaults(kept | ({"time": str(kept["time"])} if "time" in kept else {}))
        return True

    def _checkpoint_to_start_from(self, subcommand: str, choices: Choices) -> str | None:
        """The checkpoint of ``--start_from``; one in a configuration file counts for the first part of a training."""
        continues = subcommand != "fit" or choices.ckpt_path is not None
        if continues and choices.start_from_is_flag and choices.start_from is not None:
            raise ArgumentError("--start_from begins the training of a detector: it is for fit, without --ckpt_path")
        return None if continues else choices.start_from

    def _set_class_defaults(
        self,
        parser: LightningArgumentParser,
        model: type[LightningModule],
        data: type[LightningDataModule],
        options: Mapping[str, Any] | None = None,
        data_options: Mapping[str, Any] | None = None,
    ) -> None:
        parser.set_defaults(
            {
                "model": {"class_path": _path_of(model), "init_args": dict(options or {})},
                "data": {"class_path": _path_of(data), "init_args": dict(data_options or {})},
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments given, whatever ``sys.argv`` holds."""
        self.config = parser.parse_args(args)
        if self._planner.only_plan:  # it ends where the plan is printed
            raise ArgumentError("there is no plan for these arguments: plans are for this package's detectors and data")

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it is: the checkpoint's values are the parser's defaults already."""
        subcommand = self.config["subcommand"]
        chosen = self.config[subcommand]["model"].get("init_args", {})
        if self._checkpoint is None:
            released = chosen.get("pretrained_backbone") or chosen.get("backbone_weights")
            if subcommand != "fit" and not (released and issubclass(self._kind, ClassifierModule)):
                raise CheckpointError(f"[LCD-K001] {subcommand} needs trained weights: add --ckpt_path FILE")
            return
        for name, trained in self._checkpoint["hyper_parameters"].items():
            value = chosen.get(name, trained)
            if name not in (*_LINKED, "pretrained_backbone", "backbone_weights") and _plain(value) != _plain(trained):
                sys.stderr.write(f"model.{name}: {value} replaces the checkpoint's {trained}\n")

    # ---- model, data and trainer

    def before_instantiate_classes(self) -> None:
        """Hand ``--nms`` to the model, and ``--tiles`` to the training images."""
        config = self.config[self.subcommand]
        size_training_tiles(config)
        if config["nms"]:
            config["model"]["init_args"]["nms"] = config["nms"]
        if self.subcommand != "fit":
            self.save_config_callback = None

    def after_instantiate_classes(self) -> None:
        """Take the weights of ``--start_from`` and the plan's splits, put windows, views and detectors around."""
        add_to_inference(self.model, self.config[self.subcommand], self.datamodule, str(self.subcommand))
        if self.subcommand == "fit" and self.config["fit"]["report"]:
            from lightning_convnext_det.report.training import check_report

            check_report(self.datamodule)
        if isinstance(self.datamodule, DetectionDataModule):
            self._planner.share_splits(self.datamodule, self.config[self.subcommand]["data"]["init_args"])
        if self._start is not None and self._checkpoint is not None:
            new = take_weights(self.model, self._checkpoint, self._start)
            self.model.grey_range = read_grey_range(self._checkpoint[FORMAT])
            kept = len(self.model.state_dict()) - len(new)
            sys.stderr.write(f"{self._start}: {kept} tensors kept, {len(new)} begin anew for other classes\n")

    # a number, names or ids
    def _classes(self, name: str, data: LightningDataModule) -> Any:
        """The classes of the model: the checkpoint's in prediction, else those of the data."""
        is_classifier = issubclass(self._kind, ClassifierModule)
        if self._checkpoint is not None and (self.config["subcommand"] == "predict" or is_classifier):
            return self._checkpoint["hyper_parameters"].get(name)
        if is_classifier and self.config["subcommand"] != "fit":
            return None  # those of the pretrained weights, among which the folder's are found
        if name == "num_classes" and not hasattr(data, name):
            raise ArgumentError(
                f"{type(data).__name__} has no num_classes, by which the model is built; add the attribute"
            )
        return getattr(data, name, None)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """The arguments of the trainer's method; predictions are written as they come, not kept in memory."""
        arguments: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if "return_predictions" in arguments and arguments["return_predictions"] is None:
            arguments["return_predictions"] = False
        return arguments

    def before_fit(self) -> None:
        """Measure batch size and learning rate, where that is asked for."""
        tune(self.trainer, self.model, self.datamodule, self.config["fit"])

    def after_fit(self) -> None:
        """Say what came out and where it is."""
        from lightning_convnext_det.report.training import report_training, show_results

        show_results(self.trainer)
        if self.config["fit"]["report"]:
            report_training(self.trainer, self.datamodule)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        fit, predict = self.subcommand == "fit", self.subcommand == "predict"
        if config.get("precision") == "bf16-mixed" and _emulates_bfloat16(str(config["accelerator"])):
            sys.stderr.write("trainer.precision: 32-true replaces bf16-mixed, which this device only emulates\n")
            config["precision"] = "32-true"
        kinds = (ModelCheckpoint,) if fit else (PredictionWriter,) if predict else ()
        own: list[Callback] = [c for c in callbacks if isinstance(c, kinds)]
        if isinstance(self.model, ClassifierModule):
            own = [ClassificationWriter.instead_of(c) if isinstance(c, PredictionWriter) else c for c in own]
        given = config.get("callbacks") or []
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in given):
            own.append(StepProgressBar())
        if config.get("fast_dev_run") or config.get("enable_checkpointing") is False:
            own = [c for c in own if not isinstance(c, ModelCheckpoint)]
        if config.get("logger") in (None, True):
            config["logger"] = _loggers(Path(config["default_root_dir"])) if not predict else False
        if fit and self._kept:
            own.append(KeptPlan(self._kept))
        if fit and config["logger"] and not config.get("fast_dev_run"):
            own.append(LearningRateMonitor("step"))
        if fit:  # a wanted time decides the steps before the overview forecasts them
            own += create_run_callbacks(self.config["fit"], self.model, given, self._validates(config))
        if fit and config.get("enable_model_summary") is None and not config.get("fast_dev_run"):
            own.append(RunOverview())
            config["enable_model_summary"] = False  # the overview says it, without operations that are not counted
        for callback in own:
            if isinstance(callback, ModelCheckpoint) and not self._validates(config):
                callback.monitor = None  # nothing is measured: the last checkpoint is the best one
            elif isinstance(callback, ModelCheckpoint) and callback.monitor == TrainableModule.monitor:
                callback.monitor = self.model.monitor
        return super()._instantiate_trainer(config, own)

    def _validates(self, config: dict[str, Any]) -> bool:
        if isinstance(self.datamodule, DetectionDataModule) and not self.datamodule.validates:
            return False
        return config.get("limit_val_batches") != 0


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


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _find_class(name: str | None, known: Mapping[str, type]) -> Any:
    """The class of that name or import path; None if there is none, of which the parser will tell.

    Raises:
        ArgumentError: if its module fails, with the file and the line.
    """
    if name is None or "." not in name:
        return known.get(name or "")
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        raise ArgumentError(f"{name} cannot be imported: {_where_it_failed(error)}") from None
    return found if isinstance(found, type) else None


def _where_it_failed(error: pydoc.ErrorDuringImport) -> str:
    """File, line and message of the error in a user's module."""
    reason, frames = error.value, list(traceback.extract_tb(error.tb))
    if isinstance(reason, SyntaxError):
        return f"{reason.filename}, line {reason.lineno}: {reason.msg}"
    last = ([frame for frame in frames if not frame.filename.startswith("<frozen ")] or frames)[-1]
    text = "" if reason is None else one_line(reason)
    return f"{last.filename}, line {last.lineno}: {type(reason).__name__}: {text}"


# any class of a user, with its arguments
def _construct(kind: type, *arguments: Any, **options: Any) -> Any:
    """Build a model, data module or callback; an argument that it refuses is an error of the user's.

    Raises:
        ArgumentError: for a ValueError or TypeError that this package raises; jsonargparse would wrap it into a page
            about types.
    """
    try:
        return kind(*arguments, **options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        if is_raised_in(error, "lightning_convnext_det."):
            raise ArgumentError(one_line(error)) from error
        raise
