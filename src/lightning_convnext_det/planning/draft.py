"""Settings with their values and reasons: a draft that the rules write, and the plan that comes of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Setting(NamedTuple):
    """One setting of a training."""

    name: str
    """As on the command line, without dashes: ``model.min_size``."""
    value: Any
    """What it is set to; of any type that a configuration file can hold."""
    reason: str
    """Why, on one line."""
    given: bool = False
    """Whether the user has set it."""


@dataclass(frozen=True)
class Plan:
    """Settings of a training with their reasons.

    Attributes:
        settings: in the order of the rules.
        warnings: what the data ask for and the settings cannot give, on a line each.
        refusal: why no training can begin by this plan, with the remedy; None if it can.
    """

    settings: tuple[Setting, ...]
    warnings: tuple[str, ...]
    refusal: str | None = None

    def __getitem__(self, name: str) -> Any:
        for setting in self.settings:
            if setting.name == name:
                return setting.value
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(setting.name == name for setting in self.settings)

    def chosen(self, group: str) -> dict[str, Any]:
        """The settings of ``model``, ``data`` or ``trainer`` that the user has not given, by their own names."""
        found = (s for s in self.settings if not s.given and s.name.startswith(f"{group}."))
        return {setting.name.removeprefix(f"{group}."): setting.value for setting in found}

    def print(self, console: Console | None = None) -> None:
        """Print a table of settings, values and reasons, then the warnings."""
        console = console or Console(stderr=True)
        grid = Table(title="plan (what you give wins; --plan false switches it off)", title_justify="left")
        grid.add_column("setting", overflow="fold")
        grid.add_column("value", overflow="fold")
        grid.add_column("why", ratio=1)
        for setting in self.settings:
            style = "dim" if setting.given else ""
            grid.add_row(Text(setting.name), Text(show(setting.value)), Text(setting.reason), style=style)
        console.print(grid)
        for warning in self.warnings:
            console.print(Text(f"warning: {warning}", "yellow"), soft_wrap=True)


class Draft:
    """The settings that the rules have chosen so far, and those that the user has given.

    >>> draft = Draft({"model.lr": 0.1})
    >>> draft.choose("model.lr", 1e-4, "the default"), draft.choose("data.batch_size", 2, "few images")
    (0.1, 2)
    >>> [(setting.name, setting.value, setting.reason) for setting in draft.finish().settings]
    [('model.lr', 0.1, 'given'), ('data.batch_size', 2, 'few images')]
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self._settings: dict[str, Setting] = {}
        self._warnings: list[str] = []
        self._refusal: str | None = None

    def choose(self, name: str, value: Any, reason: str) -> Any:
        """Set a value with its reason; return it, or the user's if there is one."""
        if name in self.given:
            self._settings[name] = Setting(name, self.given[name], "given", True)
        else:
            self._settings[name] = Setting(name, value, reason)
        return self._settings[name].value

    def get(self, name: str, default: Any = None) -> Any:
        """The value chosen or given, else a default."""
        setting = self._settings.get(name)
        return self.given.get(name, default) if setting is None else setting.value

    def warn(self, text: str) -> None:
        """Say what the data ask for and the settings cannot give."""
        self._warnings.append(text)

    def refuse(self, text: str) -> None:
        """Say why no training can begin by this plan, and what to do."""
        self._refusal = text

    def finish(self) -> Plan:
        """The plan."""
        return Plan(tuple(self._settings.values()), tuple(self._warnings), self._refusal)

    def __iter__(self) -> Iterator[Setting]:
        return iter(self._settings.values())


def show(value: object) -> str:
    """Write a value as it can be given on the command line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(show, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
