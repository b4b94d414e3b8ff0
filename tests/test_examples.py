"""Examples that need no further packages are run where they are described; these need some."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_convnext_det.data.synthetic import write_synthetic_coco

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_train_with_ray__two_workers(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    root = write_synthetic_coco(tmp_path / "data", num_train=8, num_val=2)
    options = ["--workers=2", "--epochs=1", "--batches=2", "--loaders=0", "--backbone=test_convnext"]
    command = [sys.executable, str(EXAMPLES / "train_with_ray.py"), str(root), *options, "--random_weights"]
    found = subprocess.run(
        [*command, f"--folder={tmp_path / 'runs'}"], capture_output=True, text=True, timeout=900, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    for rank in (0, 1):
        assert f"rank {rank} of 2: 2 steps" in found.stdout + found.stderr


def test_many_nodes__is_a_shell_script() -> None:
    assert subprocess.run(["bash", "-n", str(EXAMPLES / "many_nodes.sh")], check=False).returncode == 0
