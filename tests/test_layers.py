import ast
from pathlib import Path

import pytest

PACKAGE = "lightning_convnext_det"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE
# room -> what it must not import; a room is a folder or a file
FORBIDDEN = {
    "ops": ["lightning", "timm", *(f"{PACKAGE}.{r}" for r in ("models", "modules", "data", "cli", "predictor"))],
    "models": [
        "lightning",
        *(f"{PACKAGE}.{r}" for r in ("modules", "data", "cli", "predictor", "callbacks", "checkpoints")),
    ],
    "modules": [f"{PACKAGE}.{r}" for r in ("data", "cli", "predictor", "callbacks", "visualize")],
    "data": [
        "timm.models",
        "timm.create_model",
        *(f"{PACKAGE}.{r}" for r in ("models", "modules", "ops", "cli", "predictor", "checkpoints")),
    ],
    "predictor.py": ["lightning", f"{PACKAGE}.cli", f"{PACKAGE}.callbacks", f"{PACKAGE}.data.datamodule"],
    "visualize.py": ["lightning", *(f"{PACKAGE}.{r}" for r in ("models", "modules", "data", "cli"))],
    "import_report.py": ["lightning", *(f"{PACKAGE}.{r}" for r in ("modules", "data", "cli"))],
    "import_mmdetection.py": ["lightning", *(f"{PACKAGE}.{r}" for r in ("modules", "data", "cli"))],
    "checkpoints.py": ["lightning", *(f"{PACKAGE}.{r}" for r in ("modules", "data", "cli"))],
    "callbacks.py": [f"{PACKAGE}.cli", f"{PACKAGE}.models"],
    "best_checkpoint.py": [f"{PACKAGE}.cli", f"{PACKAGE}.models", f"{PACKAGE}.data"],
}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_layers__a_room_imports_only_what_it_may(room: str) -> None:
    path = SOURCE / room
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files, f"{room} is gone: update this table"
    wrong = [
        f"{file.name} imports {name}"
        for file in files
        for name in imported(file)
        if any(name == f or name.startswith(f"{f}.") for f in FORBIDDEN[room])
    ]
    assert wrong == []
