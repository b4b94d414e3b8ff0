"""The trainer's argument parser, whose defaults depend on the checkpoint and the classes that are named.

LightningCLI parses the command line. It needs the default model first, because ``--model.lr 0.1`` means nothing without
a class; so each subcommand's parser looks up the four arguments that decide it wherever LightningCLI reads arguments:
environment variables (if they are on), configuration files in order, and the command line, of which the last wins.
"""

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jsonargparse
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.cli import LightningArgumentParser

from lightning_convnext_det.checkpoints.format import is_own
from lightning_convnext_det.cli.given import names_in_file, names_on_command_line
from lightning_convnext_det.cli.messages import one_line, shorten_refusal
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.image_folder import ImageFolderDataModule
from lightning_convnext_det.errors import UserError
from lightning_convnext_det.models.deformable_detr.dino import DINO
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.modules.classification import ClassifierModule
from lightning_convnext_det.modules.detection import DetectionModule
from lightning_convnext_det.modules.registry import MODULES
from lightning_convnext_det.suggestions import suggest

_MODELS = (DetectionModule, CascadeRCNN, FasterRCNN, DeformableDETR, DINO, ClassifierModule)
_DATA = (DetectionDataModule, ImageFolderDataModule)
_KINDS: dict[str, Sequence[type]] = {  # that arguments may name without their module
    "model": list(MODULES.values()),
    "data": _DATA,
    "callbacks": [getattr(callbacks, name) for name in callbacks.__all__],
    "logger": [getattr(loggers, name) for name in loggers.__all__],
}


class Choices(NamedTuple):
    """The arguments that decide the defaults of the others."""

    model: str | None = None
    """Class of the model, as the user writes it."""
    data: str | None = None
    """Class of the data module."""
    ckpt_path: str | None = None
    """Checkpoint to go on from, evaluate or predict with."""
    start_from: str | None = None
    """Checkpoint to take the network and the weights from."""
    start_from_is_flag: bool = False
    """Whether ``start_from`` is on the command line, not only in a configuration file."""


class Parser(LightningArgumentParser):
    """LightningCLI's parser: sets its defaults by `Choices`, and names the closest argument to an unknown one."""

    set_defaults_by: Callable[["Parser", Choices], None] | None = None
    plan_by: Callable[["Parser", jsonargparse.Namespace, set[str]], bool] | None = None
    subcommand: str | None = None  # jsonargparse sets it

    def add_class_arguments(self, theclass: type, *arguments: Any, **options: Any) -> list[str]:
        """Add the arguments of a class, for a user's own module also those of the detector that it extends.

        jsonargparse follows ``**options`` up to `DetectionModule`, but not from there to ``build_detector``.
        """
        added: list[str] = super().add_class_arguments(theclass, *arguments, **options)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(theclass).parameters.values())
        if takes_any and issubclass(theclass, DetectionModule) and not is_own(theclass):
            extended = next(base for base in theclass.__mro__ if is_own(base))
            options |= {
                "skip": {*options.get("skip", ()), *(name.rpartition(".")[2] for name in added)},
                "as_group": False,
            }
            further = super().add_class_arguments(extended, *arguments, **options)
            for action in self._actions:
                if action.dest in further:
                    action.default = argparse.SUPPRESS  # not handed to the user's constructor unless given
            added += further
        return added

    # the signature of jsonargparse, whose private keywords are handed on
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: jsonargparse.Namespace | None = None, **options: Any
    ) -> jsonargparse.Namespace:
        """Parse arguments; those on the command line win over configuration files, wherever they stand."""
        if self.set_defaults_by is not None and args is not None:
            configs, flags = _split(args, {"--config": "config", "-c": "config"})
            files = configs.get("config", [])
            self.set_defaults_by(self, self._choices(files, flags, namespace))
            args = [*(f"--config={file}" for file in files), *flags]
        parsed: jsonargparse.Namespace = super().parse_args(args, namespace, **options)
        if self.plan_by is not None and args is not None and self._is_planned(args, namespace, parsed):
            parsed = super().parse_args(args, namespace, **options)  # with the plan as defaults
        return parsed

    def _is_planned(
        self, args: Sequence[str], namespace: jsonargparse.Namespace | None, parsed: jsonargparse.Namespace
    ) -> bool:
        """Make a plan the defaults; to print a configuration without it needs neither the data nor weights."""
        assert self.plan_by is not None
        try:
            return self.plan_by(self, parsed, self._given(args, namespace))
        except UserError as error:
            if not any(argument.partition("=")[0] == "--print_config" for argument in args):
                raise
            sys.stderr.write(f"printed without a plan: {one_line(error)}\n")
            return False

    def _given(self, args: Sequence[str], namespace: jsonargparse.Namespace | None) -> set[str]:
        """Names of the settings that the user has given, wherever arguments are read."""
        files, flags = _split(args, {"--config": "config"})
        reader = self._reader()
        sources: list[Mapping[str, Any]] = [reader.read([]), {} if namespace is None else namespace.as_dict()]
        sources += [reader.read([f"--config={file}"], env=False) for file in files.get("config", [])]
        groups = ("model", "data", "trainer")
        for name, values in _split(flags, {f"--{name}": name for name in groups})[0].items():
            sources += [{name: value} for value in values]
        sources = [{name: reader.mapping(source.get(name)) for name in groups} for source in sources]
        return names_on_command_line(flags).union(*map(names_in_file, sources))

    def _reader(self) -> "_Reader":
        reader = _Reader(exit_on_error=False, env_prefix=self.env_prefix, default_env=self.default_env)
        reader.add_argument("--config", action=jsonargparse.ActionConfigFile)  # type: ignore[attr-defined]  # not in __all__
        for name in ("model", "data", "trainer", "ckpt_path", "start_from"):
            reader.add_argument(f"--{name}")
        return reader

    def _choices(self, files: Sequence[str], flags: Sequence[str], namespace: jsonargparse.Namespace | None) -> Choices:
        reader = self._reader()
        known = {f"--{name}": name for name in ("model", "data", "ckpt_path", "start_from")}
        known |= {f"--{name}.class_path": name for name in ("model", "data")}
        given = {name: values[-1] for name, values in _split(flags, known)[0].items()}
        sources: list[Mapping[str, Any]] = [reader.read([]), {} if namespace is None else namespace.as_dict()]
        sources += [reader.read([f"--config={file}"], env=False) for file in files]
        chosen: dict[str, Any] = {}
        for source in [*sources, given]:
            chosen |= {name: source[name] for name in ("ckpt_path", "start_from") if name in source}
            chosen |= {name: kind for name in ("model", "data") if (kind := reader.class_path(source.get(name)))}
        paths = {name: value for name, value in chosen.items() if isinstance(value, str | Path) and value != "null"}
        return Choices(**{name: str(value) for name, value in paths.items()}, start_from_is_flag="start_from" in given)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and leave with status 2."""
        text = " ".join(str(message).split())
        known = [option for action in self._actions for option in action.option_strings]
        if unknown := re.search(r"nrecognized arguments: (--[\w.]+)", text):
            text += f"; {suggest(unknown.group(1), known)}"
        elif unknown := re.search(r"Option '(\w+)' is not accepted", text):
            text = f"'{unknown.group(1)}' is not an argument of the model or the data; {_suggest(unknown.group(1))}"
        text = shorten_refusal(text)
        sys.stderr.write(f"error: {text}{_suggest_value(text)}\n")
        raise SystemExit(2)


class _Reader(jsonargparse.ArgumentParser):
    """Reads `Choices` from one source; whatever else it holds is left to the trainer's parser to judge."""

    def validate(self, *args: object, **options: object) -> None:
        """Accept arguments that are not known here."""

    def read(self, arguments: list[str], env: bool | None = None) -> dict[str, Any]:
        """Parse arguments without defaults; nothing if they cannot be parsed, of which the trainer's parser tells."""
        try:
            found: dict[str, Any] = self.parse_args(arguments, env=env, defaults=False).as_dict()
        except Exception:  # whatever a file may hold
            return {}
        return found

    def class_path(self, value: Any) -> str | None:
        """The class that the argument ``model`` or ``data`` names: itself, in a mapping, or in a file of one."""
        found = self.mapping(value)
        kind = value if found is None else found.get("class_path")
        return kind if isinstance(kind, str) else None

    def mapping(self, value: Any) -> Mapping[str, Any] | None:
        """The mapping that an argument is, or that is in the file or the text that it names; None if it is none."""
        if isinstance(value, str) and (value.lstrip().startswith("{") or Path(value).suffix in (".yaml", ".json")):
            value = self.read([f"--config={value}"], env=False)
        return value if isinstance(value, Mapping) else None


def _split(arguments: Sequence[str], known: Mapping[str, str]) -> tuple[dict[str, list[str]], list[str]]:
    """Split arguments into the values of known options, by destination, and the rest."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    for option, name in known.items():
        parser.add_argument(option, dest=name, action="append")
    try:
        found, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError:  # an option without its value: the trainer's parser says so
        return {}, list(arguments)
    return vars(found), rest


def _suggest(word: str) -> str:
    """Say which argument of model or data a misspelt one may mean."""
    options = {name: f"--{group}.{name}" for group, name in _argument_names()}
    close = [options[name] for name in difflib.get_close_matches(word, options, n=2, cutoff=0.5)]
    return f"did you mean {' or '.join(close)}?" if close else "see --model.help and --data.help"


def _suggest_value(text: str) -> str:
    """Say which value a misspelt one may mean, by the choices that a refusal lists and the classes known here."""
    given = re.search(r"^([\w.]+) is ([^\s:]+): |^([\w.]+): .*Got value: (\S+)$", text)
    if given is None:
        return ""
    name, value = given[1] or given[3], given[2] or given[4]
    choices = [choice for group in re.findall(r"one of \[(.*?)\]", text) for choice in re.findall(r"'([^']+)'", group)]
    choices += [kind.__name__ for kind in _KINDS.get(name.rpartition(".")[2], ())]
    close = difflib.get_close_matches(value, choices, n=1, cutoff=0.7)
    return f"; did you mean '{close[0]}'?" if close else ""


def _argument_names() -> Iterator[tuple[str, str]]:
    for group, kinds in (("model", _MODELS), ("data", _DATA)):
        for kind in kinds:
            yield from ((group, name) for name in inspect.signature(kind).parameters)
