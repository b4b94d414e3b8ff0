"""The command that chooses score thresholds and stores them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_convnext_det import DetectionDataModule
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.cli.thresholds import format_table, store_thresholds
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.metrics.thresholds import ClassThreshold
from lightning_convnext_det.modules import load_module
from lightning_convnext_det.modules.detection import DetectionModule
from lightning_convnext_det.modules.registry import save_module
from lightning_convnext_det.types import Detection
from tests.training import create_module

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A detector that finds all objects but every third, and as many false ones of lower scores."""
    write_synthetic_coco(tmp_path / "data", 2, 4, 4)
    data = DetectionDataModule(str(tmp_path / "data"))
    module = create_module(data.num_classes, class_names=data.class_names, category_ids=data.category_ids)
    save_module(module, tmp_path / "a.ckpt")

    def evaluate(self: DetectionModule, batch: tuple) -> None:
        found = []
        for target in batch[1]:
            boxes, labels = target["boxes"], target["labels"]
            boxes = torch.cat([boxes, boxes + 1000])
            scores = torch.linspace(0.9, 0.1, len(boxes))
            found.append(Detection(boxes=boxes, labels=labels.repeat(2), scores=scores))
        self.evaluator.update(found, batch[1])

    monkeypatch.setattr(DetectionModule, "_evaluate", evaluate)
    return tmp_path / "a.ckpt"


def test_store_thresholds__in_the_file_that_a_link_leads_to(tmp_path: Path) -> None:
    save_module(create_module(1, class_names=["cat"]), tmp_path / "a.ckpt")
    (tmp_path / "link.ckpt").symlink_to("a.ckpt")
    store_thresholds(tmp_path / "link.ckpt", [ClassThreshold(0.25, 1.0, 1.0, 1.0, 1)])
    assert (tmp_path / "link.ckpt").is_symlink()
    assert load_module(tmp_path / "a.ckpt").score_thresholds == [0.25]


@pytest.mark.heavy
def test_thresholds__are_printed_and_stored(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = load_module(checkpoint).class_names
    arguments = [str(checkpoint), f"--data.root={checkpoint.parent / 'data'}", "--data.num_workers=0"]
    before = checkpoint.read_bytes()
    assert main(["thresholds", *arguments, "--accelerator=cpu", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "thresholds of highest F1 at IoU 0.5, on the val split" in out
    assert "nothing is written" in out
    assert checkpoint.read_bytes() == before
    assert main(["thresholds", *arguments, "--accelerator=cpu", "--split=test", "--precision=0.95"]) == 0
    out = capsys.readouterr().out
    assert "thresholds of a precision of 0.95 at IoU 0.5, on the test split" in out
    stored = load_module(checkpoint).score_thresholds
    assert stored is not None
    shown = {m[1]: m[2] for m in re.finditer(r"^(\w+) +([\d.]+\*?) +[\d.]+", out, re.MULTILINE)}
    assert [shown.get(name) for name in names] == [f"{value:.3f}" for value in stored]
    for name, value in load_module(checkpoint).state_dict().items():
        assert value.isfinite().all(), name


def test_thresholds__precision_and_recall_are_one_wish(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["thresholds", "a.ckpt", "--data.root=x", "--precision=0.9", "--recall=0.9"]) == 2
    assert "give --precision or --recall, not both" in capsys.readouterr().err
    assert main(["thresholds", "a.ckpt", "--data.root=x", "--precision=95"]) == 2
    assert "--precision is 95; it must be above 0 and at most 1" in capsys.readouterr().err


def test_thresholds__no_such_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["thresholds", str(tmp_path / "a.ckpt"), "--data.root=x"]) == 6
    assert "no such checkpoint" in capsys.readouterr().err


def test_format_table__by_hand() -> None:
    chosen = [
        ClassThreshold(0.4213, 0.95, 0.8, 0.8686, 40),
        ClassThreshold(0.9, 0.5, 0.1, 0.1667, 7, reached=False),
        ClassThreshold(None, np.nan, 0.0, 0.0, 0, reached=False),
    ]
    assert format_table(["cat", "wide load", "owl"], chosen).splitlines() == [
        "class      threshold  precision  recall     F1  objects",
        "cat           0.421       0.950   0.800  0.869       40",
        "wide load     0.900       0.500   0.100  0.167        7",
        "owl           0.300*          -   0.000  0.000        0",
        "* no object, or none found: nothing is stored, and 0.3 is used: owl",
        "not reached by any threshold, the nearest is taken: wide load",
    ]


@pytest.mark.heavy
def test_thresholds__of_windows_views_and_ensembles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_synthetic_coco(tmp_path / "data", 1, 2, 1)
    data = DetectionDataModule(str(tmp_path / "data"))
    for seed in range(2):
        torch.manual_seed(seed)
        module = create_module(
            data.num_classes, class_names=data.class_names, category_ids=data.category_ids, score_threshold=0.0
        )
        save_module(module, tmp_path / f"{seed}.ckpt")
    arguments = [f"--data.root={tmp_path / 'data'}", "--data.num_workers=0", "--accelerator=cpu"]
    before = (tmp_path / "0.ckpt").read_bytes()
    for options in (["--tta=flip"], [f"--ensemble={tmp_path / '1.ckpt'}", "--tiles=200"]):
        assert main(["thresholds", str(tmp_path / "0.ckpt"), *arguments, *options]) == 0
        assert "nothing is written (fused scores are not those of the checkpoint alone)" in capsys.readouterr().out
        assert (tmp_path / "0.ckpt").read_bytes() == before
    assert main(["thresholds", str(tmp_path / "0.ckpt"), *arguments, "--tiles=200", "--tile_overlap=0.4"]) == 0
    assert "written:" in capsys.readouterr().out
    assert (tmp_path / "0.ckpt").read_bytes() != before
