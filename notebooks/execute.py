"""Execute notebooks in place, each in an empty folder: python notebooks/execute.py [NOTEBOOK ...].

What is committed with them is small: images are JPEG or PNG below 150 kB, and neither warnings nor times of execution
are kept.
"""

import base64
import resource
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
MOST = 150_000  # bytes of an image


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a kernel of its own, whose working folder is given."""
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()


def images(notebook: NotebookNode) -> list[bytes]:
    """The JPEG and PNG outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    found = [output.get("data", {}).get(f"image/{kind}") for output in outputs for kind in ("png", "jpeg")]
    return [base64.b64decode(text) for text in found if text]


def clean(notebook: NotebookNode, folder: str) -> None:
    """Drop warnings, times of execution and the name of the folder; join what a cell prints bit by bit."""
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)
        outputs: list[NotebookNode] = []
        for output in cell.get("outputs", []):
            for part, key in (
                (output, "text"),
                (output.get("data", {}), "text/plain"),
                (output.get("data", {}), "text/html"),
            ):
                if key in part:
                    part[key] = part[key].replace(f"{folder}/", "")
            if output.get("name") == "stdout" and outputs and outputs[-1].get("name") == "stdout":
                outputs[-1].text += output.text
            elif output.get("name") != "stderr":
                outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def main() -> None:
    """Execute the notebooks that are named, or all."""
    for path in map(Path, sys.argv[1:] or sorted(FOLDER.glob("*.ipynb"))):
        notebook = nbformat.read(path, as_version=4)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        clean(notebook, folder)
        large = max((len(image) for image in images(notebook)), default=0)
        if large > MOST:
            raise SystemExit(f"{path}: an image has {large:,} bytes; show it smaller or as JPEG")
        nbformat.write(notebook, path)
        print(f"{path.name}: {seconds:.0f} CPU seconds, largest image {large / 1000:.0f} kB")


if __name__ == "__main__":
    main()
