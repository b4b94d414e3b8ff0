"""A data set of COCO's size, generated as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "coco_scale.py"


def measure(what: str, root: Path) -> dict[str, float]:
    command = [sys.executable, str(SCRIPT), "--measure", what, "--folder", str(root)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1500)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_datamodule__coco_size(tmp_path: Path) -> None:
    """118,000 pictures and 860,000 boxes: read, checked and through an epoch with two workers."""
    sys.path.insert(0, str(SCRIPT.parent))
    from coco_scale import write_data_set

    write_data_set(tmp_path / "set", 118_000, 860_000)
    found = measure("ours", tmp_path / "set") | measure("check", tmp_path / "set")
    print(found)
    assert found["MB of the data set, one process"] < 200
    grown = found["MB of all processes, at most"] - found["MB of all processes, first batch"]
    assert grown < 150  # lists of objects, copied page by page into each worker, grow by the size of the data set
    assert found["seconds of CPU until then, imports included"] < 150  # about 50
    assert found["seconds of CPU to check"] < 300
