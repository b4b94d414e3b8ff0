import importlib.util
import re
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

pytestmark = [
    # the kernel's client binds its sockets in a way that tornado and zmq warn of on some platforms
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def executor() -> ModuleType:
    """The script of ``make notebooks``."""
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook__is_committed_with_small_images(path: Path, executor: ModuleType) -> None:
    notebook = nbformat.read(path, as_version=4)
    found = executor.images(notebook)
    assert found
    assert max(map(len, found)) <= executor.MOST
    assert path.stat().st_size < 1_000_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


# half the time of free axes, with which docs/export.md's commands export such a detector
EXPORT_ONE_SIZE = """
import lightning_convnext_det
from lightning_convnext_det.inference.export.export import export

def export_one_size(module, path, images, export=export, **options):  # a default outlives %reset
    size = tuple(images[1].shape[-2:])  # of the image that the notebook's program reads
    return export(module, path, images=images, dynamic=(), image_size=size, **options)

lightning_convnext_det.export = export_one_size
"""


@pytest.mark.heavy
def test_notebooks__run_with_few_steps(executor: ModuleType, tmp_path: Path) -> None:
    """All in one kernel, which imports torch once; what a training of six steps finds does not matter here."""
    joined, parts = new_notebook(cells=[new_code_cell(EXPORT_ONE_SIZE)]), {}
    for path in NOTEBOOKS:
        (tmp_path / path.stem).mkdir()
        cells = nbformat.read(path, as_version=4).cells
        short = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        assert len(short) == 1, "the cell with the number of steps has the tag parameters"
        short[0].source = re.sub(r"\d+", "6", short[0].source)
        joined.cells += [new_code_cell(f"%reset -f\n%cd -q {tmp_path / path.stem}"), *cells]
        parts[path.stem] = cells
    executor.execute(joined, tmp_path)
    for name, cells in parts.items():
        assert executor.images(new_notebook(cells=cells)), name


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook__runs(path: Path, executor: ModuleType, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    executor.execute(notebook, tmp_path)
    assert max(map(len, executor.images(notebook))) <= executor.MOST
