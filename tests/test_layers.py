"""The rooms of the package, who may import whom, and that no file imports itself by a detour."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "lightning_convnext_det"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE
# from the top; a room imports those below it, never those above; the last six are files, not folders
ROOMS = (
    "cli", "report", "planning", "inference", "modules", "callbacks", "convert", "models", "data", "checkpoints",
    "metrics", "ops", "visualization", "fonts", "types", "arguments", "suggestions", "errors",
)  # fmt: skip
# libraries that a room does without, also inside its functions
FORBIDDEN = {
    "ops": ("lightning", "timm", "torchmetrics", "PIL"),
    "models": ("lightning",),
    "metrics": ("lightning", "timm"),
    "convert": ("lightning",),
    "data": ("timm.models", "timm.create_model"),
    "inference": ("lightning",),
    "visualization": ("lightning", "timm"),
    "types": ("lightning", "timm"),
    "errors": ("lightning", "torch"),
}


def dotted(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(file): file for file in sorted(SOURCE.rglob("*.py"))}


def imported(file: Path) -> set[str]:
    """Every name that a file imports, also in functions and under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def arrows(module: str) -> set[str]:
    """The files of the package that a file imports."""
    found = {name if name in FILES else name.rpartition(".")[0] for name in imported(FILES[module])}
    return {name for name in found if name in FILES and name not in (PACKAGE, module)}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


INNER = sorted(name for name in FILES if name not in (PACKAGE, f"{PACKAGE}.__main__"))


def test_rooms__are_those_that_exist() -> None:
    assert {room(name) for name in INNER} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_rooms__import_only_those_below(name: str) -> None:
    above = ROOMS[: ROOMS.index(name)]
    wrong = [f"{a} imports {b}" for a in INNER if room(a) == name for b in sorted(arrows(a)) if room(b) in above]
    assert wrong == []


@pytest.mark.heavy
def test_files__import_each_other_in_no_circle() -> None:
    try:
        order = list(TopologicalSorter({name: arrows(name) for name in INNER}).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert len(order) == len(INNER)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_rooms__do_without(name: str) -> None:
    wrong = [
        f"{module} imports {found}"
        for module in INNER
        if room(module) == name
        for found in sorted(imported(FILES[module]))
        if any(found == f or found.startswith(f"{f}.") for f in FORBIDDEN[name])
    ]
    assert wrong == []


def test_tests__mirror_the_rooms() -> None:
    folders = {p.name for p in Path(__file__).parent.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= set(ROOMS)
