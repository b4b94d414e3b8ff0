"""The example script finds with three packages what the detector finds with this one."""

import importlib.metadata
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lightning_convnext_det import DeformableDETRModule, Predictor
from lightning_convnext_det.inference.export.export import ExportReport

EXAMPLE = Path(__file__).parents[3] / "examples" / "run_onnx.py"
IN_OWN_ENVIRONMENT = """
import importlib.util, json, runpy, sys

packages, example, found, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, packages)
for name in ("torch", "torchvision", "timm", "lightning", "lightning_convnext_det", "onnx"):
    assert importlib.util.find_spec(name) is None, name
sys.argv[0] = example
parts = runpy.run_path(example, run_name="__main__")
with parts["Image"].open(sys.argv[2]) as image:
    objects = parts["detect"](parts["runtime"], image, 0.0)
with open(found, "w") as file:
    json.dump([(name, score, box.tolist()) for name, score, box in objects], file)
"""


@pytest.mark.heavy
def test_example__in_an_environment_without_torch_and_this_package(
    exported: ExportReport, module: DeformableDETRModule, tmp_path: Path
) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 40
    photo, packages = tmp_path / "photo.png", tmp_path / "packages"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 87, 3), np.uint8)).save(photo)
    packages.mkdir()
    for name in find_files_of("numpy", "pillow", "onnxruntime"):
        (packages / name.name).symlink_to(name)
    # without the folders of site-packages (-S) and variables such as PYTHONPATH (-I)
    command = [sys.executable, "-I", "-S", "-c", IN_OWN_ENVIRONMENT, packages, EXAMPLE, tmp_path / "found.json"]
    lines = subprocess.run(
        [*command, exported.path, photo, "0"], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout.splitlines()
    found = json.loads((tmp_path / "found.json").read_text())
    expected = Predictor(module.detector, ["cat", "dog"], score_threshold=0.0)(photo)
    assert len(lines) == len(found) == len(expected) == 15
    assert [name for name, _, _ in found] == expected.names == [line.split()[0] for line in lines]
    np.testing.assert_allclose([score for _, score, _ in found], expected.scores, atol=1e-5)
    np.testing.assert_allclose([box for _, _, box in found], expected.boxes, atol=1e-2)
    printed = [[float(x) for x in line.split()[3:]] for line in lines]
    np.testing.assert_allclose(printed, expected.boxes, atol=0.07)  # one decimal


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_example__gives_the_channels_of_the_detector(channels: int, mode: str) -> None:
    class Session:
        def get_inputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(shape=["batch", channels, "height", "width"])]

        def run(self, _: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
            self.images = given["images"]
            return [np.zeros((1, 0, 4)), np.zeros((1, 0)), np.zeros((1, 0), np.int64), np.zeros(1, np.int64)]

        def get_modelmeta(self) -> SimpleNamespace:
            return SimpleNamespace(custom_metadata_map={"class_names": "[]"})

    session, image = Session(), Image.new(mode, (7, 5), 9 if mode == "L" else (9, 9, 9, 9))
    assert runpy.run_path(str(EXAMPLE))["detect"](session, image, 0.0) == []
    assert (session.images.shape, session.images.dtype) == ((1, channels, 5, 7), np.uint8)
    assert (session.images == 9).all()


def find_files_of(*packages: str) -> set[Path]:
    """The folders and modules in site-packages of distributions and of what they need, also their shared libraries."""
    found: set[Path] = set()
    left, seen = list(packages), set()
    while left:
        name = left.pop()
        distribution = importlib.metadata.distribution(name)
        seen.add(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        found |= {Path(str(distribution.locate_file(top))) for top in tops}
        needed = [requirement for requirement in distribution.requires or () if "extra ==" not in requirement]
        left += [n for n in (re.split(r"[^\w.-]", requirement)[0] for requirement in needed) if n not in seen]
    return found
