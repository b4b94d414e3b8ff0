"""Every shell and Python block of README and docs runs here, with small networks; the site builds."""

import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from lightning_convnext_det import (
    DINO,
    CascadeRCNN,
    Classifier,
    DeformableDETR,
    DetectionDataModule,
    FasterRCNN,
    ImageFolderDataModule,
)
from lightning_convnext_det.cli.commands import TOOLS
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.modules.registry import MODULES
from tests.convert.test_dino import SMALL as SMALL_DINO
from tests.convert.test_dino import detrex_tensors
from tests.convert.test_importer import original_state
from tests.data.io.test_video import write_video
from tests.test_layers import ROOMS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.num_workers=0"]
# one device with full precision, whatever the page says of others
ALONE = ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.precision=32-true", "--data.batch_size=2"]
IMAGE_SIZE = ["--model.min_size=64", "--model.max_size=96"]
RCNN = [*IMAGE_SIZE, "--model.fpn_channels=16", "--model.box_head_features=32", "--model.score_threshold=0"]
DETR = [*IMAGE_SIZE, "--model.hidden_dim=64", "--model.feedforward_dim=32", "--model.num_queries=20"]
SMALL = 'backbone="test_convnext", min_size=64, max_size=96'

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def blocks(document: Path, language: str) -> list[str]:
    """The blocks of a page, but for those that README has too."""
    found = [text for kind, text in BLOCK.findall(document.read_text()) if kind == language]
    return found if document == DOCUMENTS[0] else [text for text in found if text not in DOCUMENTS[0].read_text()]


def with_blocks(language: str) -> list[Path]:
    return [document for document in DOCUMENTS if blocks(document, language)]


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the pages take for granted: datasets, images, weights, and the run of a small Faster R-CNN."""
    folder = tmp_path_factory.mktemp("docs")
    write_synthetic_coco(folder / "DIR", 6, 3, 3)
    shutil.copytree(folder / "DIR" / "test", folder / "PHOTOS")
    Image.new("RGB", (80, 60), (9, 99, 200)).save(folder / "photo.jpg")
    for split, kind in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        shutil.copytree(folder / "DIR" / "val", folder / "CLASSES" / split / kind)
    (folder / "configs").symlink_to(ROOT / "configs")
    torch.save(timm.create_model("test_convnext", num_classes=2).state_dict(), folder / "classifier.ckpt")
    for size in ("tiny_1k", "base_22k"):  # of another source, which is small; tests/convert has those of this name
        torch.save({"model": original_state(num_queries=20)}, folder / f"cascade_mask_rcnn_convnext_{size}_3x.pth")
    dino = DINO(80, "convnext_atto", min_size=64, max_size=96, size_divisible=1, resize="pillow", **SMALL_DINO)
    torch.save({"model": detrex_tensors(dino)}, folder / "dino_convnext_tiny_384_4scale_12ep.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit = [
            "fit",
            "--plan=false",
            "--data.root=DIR",
            "--trainer.max_epochs=15",  # untrained, proposals are equal but for rounding, which decides between them
            "--trainer.check_val_every_n_epoch=15",
            "--model.lr=1e-3",
            "--model.backbone=test_convnext",
            *RCNN,
            *QUIET,
        ]
        assert main(fit) == 0
        shutil.copy("runs/version_0/checkpoints/best.ckpt", "detector.ckpt")
        shutil.copy("detector.ckpt", "second.ckpt")
        write_video(folder / "clip.mp4")
        yield folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to write into."""
    shutil.copytree(trained, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.mark.heavy
@pytest.mark.parametrize("document", with_blocks("python"), ids=name)
def test_docs__python_runs(document: Path, place: Path) -> None:
    for block in blocks(document, "python"):
        # as written, but for the size of networks that train and the length of the training
        small = re.sub(r'backbone="\w+"(?=\))', SMALL, block) if "Module(" in block or "losses" in block else block
        small = small.replace("max_epochs=24", 'max_epochs=1, accelerator="cpu"')
        if "Trainer(" in block:
            assert 'if __name__ == "__main__":' in block, "workers of spawn import the script"
        exec(compile(small, name(document), "exec"), {"__name__": "__main__"})


@pytest.mark.heavy
@pytest.mark.parametrize("document", with_blocks("shell"), ids=name)
def test_docs__shell_runs(document: Path, place: Path) -> None:
    elsewhere = "" if document == DOCUMENTS[0] else DOCUMENTS[0].read_text()
    for line in "".join(blocks(document, "shell")).splitlines():
        if line and f"\n{line}\n" not in elsewhere:  # README's run once
            run(shlex.split(line))


@pytest.mark.heavy
@pytest.mark.parametrize("document", with_blocks("bash"), ids=name)
def test_docs__batch_scripts_run(document: Path, place: Path) -> None:
    for block in blocks(document, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("srun "):
                run(shlex.split(line)[1:])


def run(words: list[str]) -> None:
    """Run a command of a page."""
    if words[0] == "make":
        assert f"\n{words[1]}: " in (ROOT / "Makefile").read_text()
    elif words[:2] == ["pip", "install"]:
        assert words[2:] == ["."]
    elif words[0] == "convnext-det" and words[1] in TOOLS:
        assert main(words[1:]) == 0
    elif words[0] == "convnext-det":
        assert main([*words[1:], *small_options(words)]) == 0
    else:
        pytest.fail(f"{words[0]} is not a command that a page may show")


def small_options(words: list[str]) -> list[str]:
    """Options that make a command of the trainer small."""
    options, line = [*QUIET], " ".join(words)
    if words[1] == "predict":
        return options
    options += ["--trainer.max_epochs=16" if "--ckpt_path" in line else "--trainer.max_epochs=1", *ALONE]
    if "--ckpt_path" in line or "--start_from" in line:  # the network of the checkpoint
        return [*options, *(IMAGE_SIZE if "--start_from" in line else [])]
    options += ["--model.backbone=test_convnext", "--model.pretrained_backbone=false"]
    if "ClassifierModule" in line:
        return [*options, "--data.image_size=64"]
    return [*options, *(DETR if "DeformableDETR" in line or "DINO" in line else RCNN)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_docs__files_they_name_exist(document: Path) -> None:
    text = document.read_text()
    for path in LINK.findall(text):
        assert (document.parent / path).exists(), path
    for path in re.findall(r"`((?:configs|benchmarks|notebooks|docs|tests)/[\w./]+)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(
        r"`((?:cli|planning|inference|modules|callbacks|convert|models|data|checkpoints|metrics|ops)/[\w./]*)", text
    ):
        assert (ROOT / "src" / "lightning_convnext_det" / path).exists(), path


def test_reliability__tests_that_keep_the_promises_exist() -> None:
    promises = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(promises) > 30
    for path, test in promises:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def test_docs__options_they_name_exist() -> None:
    detectors = (*MODULES.values(), FasterRCNN, CascadeRCNN, DeformableDETR, DINO, Classifier)
    kinds = {"model": detectors, "data": (DetectionDataModule, ImageFolderDataModule)}
    known = {
        kind: {name for c in classes for name in inspect.signature(c).parameters} for kind, classes in kinds.items()
    }
    files = [*DOCUMENTS, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "configs").glob("*.yaml")]
    for file in files:
        for kind, option in re.findall(r"--(model|data)\.(\w+)", file.read_text()):
            assert option in known[kind] | {"help"}, f"{file}: --{kind}.{option}"


def test_contributing__names_every_room_in_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where do I add")[0]
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)/?`", " ".join(rows))) == ROOMS


@pytest.mark.heavy
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_site__builds_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]*rel=\"(?:stylesheet|icon|preconnect|preload)\"[^>]*href=\"([^\"]+)\"", text)
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page
        assert "::: lightning_convnext_det" not in text, page
