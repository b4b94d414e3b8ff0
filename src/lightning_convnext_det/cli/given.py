"""What a user has given of the settings that a plan would choose, wherever arguments are read."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_convnext_det.errors import ArgumentError

_UNITS = {"h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def find_given(names: set[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a parsed configuration has for the settings that a user has named."""
    given: dict[str, Any] = {}
    for group in ("model", "data", "trainer"):
        values = config.get(group) or {}
        values = values.get("init_args", values)
        given |= {f"{group}.{name}": values[name] for name in values if f"{group}.{name}" in names}
    if config.get("time") is not None:
        given["time"] = parse_duration(config["time"])
    return given


def names_on_command_line(arguments: Sequence[str]) -> set[str]:
    """Names of the settings that flags set, as ``model.lr``."""
    flags = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    return {flag[2:].rstrip("+").replace(".init_args.", ".") for flag in flags}


def names_in_file(content: Mapping[str, Any]) -> set[str]:
    """Names of the settings that a configuration file sets."""
    names = set()
    for group in ("model", "data", "trainer"):
        values = content.get(group)
        values = values.get("init_args", values) if isinstance(values, Mapping) else {}
        names |= {f"{group}.{name}" for name in values or {}}
    return names


def parse_duration(text: str | float) -> float:
    """Read a duration in seconds.

    >>> parse_duration("1h30m"), parse_duration("5m"), parse_duration("90s"), parse_duration(45)
    (5400.0, 300.0, 90.0, 45.0)

    Raises:
        ArgumentError: if it is none.
    """
    found = _DURATION.fullmatch(str(text).strip().replace(" ", ""))
    parts = found.groups() if found else ()
    seconds = sum(float(part) * unit for part, unit in zip(parts, _UNITS.values(), strict=False) if part)
    if seconds <= 0:
        raise ArgumentError(f"time is '{text}'; give a duration such as 30m, 1h30m or 90s")
    return seconds
