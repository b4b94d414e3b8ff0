"""Scripts under the start methods of macOS, Windows and Python 3.14."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_convnext_det.data.synthetic import write_synthetic_coco

IMPORT = """
import multiprocessing, sys
from lightning_convnext_det.data.main_guard import check_main_guard

multiprocessing.set_start_method(sys.argv[1], force=True)
def main():
    check_main_guard(None)
    print("read")

"""
TRAIN = """
import multiprocessing, sys
multiprocessing.set_start_method(sys.argv[1], force=True)
from lightning.pytorch import Trainer
from lightning_convnext_det import DetectionDataModule, FasterRCNNModule

data = DetectionDataModule("shapes", batch_size=1, num_workers=1)
module = FasterRCNNModule(5, backbone="test_convnext", min_size=64, max_size=96, fpn_channels=32, box_head_features=32)
trainer = Trainer(fast_dev_run=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
"""
GUARD = 'if __name__ == "__main__":\n    '


def run(folder: Path, code: str, method: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(code)
    return subprocess.run(
        [sys.executable, "script.py", method], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize(
    "code",
    ["main()", "for _ in range(2):\n    main()", "if sys.argv:\n    main()", "if True:\n    import json\n    main()"],
    ids=["call", "loop", "condition", "block"],
)
def test_check_main_guard__refuses(tmp_path: Path, code: str, method: str) -> None:
    ended = run(tmp_path, IMPORT + code, method)
    line = len((IMPORT + code).splitlines())
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "error: worker processes import script.py, which would run again in each of them; put its code under "
        f'if __name__ == "__main__": (line {line}), or set num_workers to 0\n'
    )


@pytest.mark.parametrize(
    ("code", "method"),
    [
        (GUARD + "main()", "spawn"),
        (GUARD + "main()", "forkserver"),
        ("if __name__ != '__main__':\n    pass\nelse:\n    main()", "spawn"),
        ("if __name__ != '__main__':\n    sys.exit()\nmain()", "spawn"),
        ("main()", "fork"),
    ],
    ids=["guard", "guard under forkserver", "else", "end", "fork"],
)
def test_check_main_guard__accepts(tmp_path: Path, code: str, method: str) -> None:
    ended = run(tmp_path, IMPORT + code, method)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "read\n", "")


def test_check_main_guard__module_and_code_without_a_file(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(IMPORT + "main()")
    for arguments, status in ((["-m", "script", "spawn"], 1), (["-c", IMPORT + "main()", "spawn"], 0)):
        ended = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == status, ended.stderr


@pytest.mark.heavy
def test_fit__script_without_a_guard_ends_in_one_line(tmp_path: Path) -> None:
    write_synthetic_coco(tmp_path / "shapes", num_train=2, num_val=2)
    ended = run(tmp_path, TRAIN + "trainer.fit(module, data)", "forkserver")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: worker processes import script.py, which would run again")
