"""Prints the oldest release of every requirement that pyproject.toml admits, one a line, for ``pip install -r``."""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
EXTRAS = ("export", "heic", "report", "video", "logging", "dev")  # not docs: the site is built with the newest
CHECKERS = ("ruff", "mypy", "scipy-stubs", "types-PyYAML")  # nothing imports them


def lower_bounds() -> list[str]:
    """Turn ``name[extra]>=1.2,<2`` into ``name[extra]==1.2``."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    requirements = [*project["dependencies"], *(r for e in EXTRAS for r in project["optional-dependencies"][e])]
    found = []
    for requirement in requirements:
        name, extra, bound = re.fullmatch(r"([\w-]+)(\[[\w,-]+\])?(?:>=([\w.]+))?.*", requirement).groups()
        if name == project["name"] or name in CHECKERS:
            continue
        if bound is None:
            raise ValueError(f"pyproject.toml: '{requirement}' has no lower bound; give the oldest release that works")
        found.append(f"{name}{extra or ''}=={bound}")
    return found


if __name__ == "__main__":
    print("\n".join(lower_bounds()))
