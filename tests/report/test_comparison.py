"""The paired bootstrap of two detectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.report.comparison import Difference, compare
from lightning_convnext_det.report.evaluation import Evaluation
from tests.report.test_report import write_predictions

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_coco(tmp_path_factory.mktemp("compare") / "shapes", num_train=2, num_val=40)


def detector(dataset: Path, jitter: float, seed: int) -> Evaluation:
    """Finds every object with boxes of some inaccuracy, which it knows little of."""
    generator = torch.Generator().manual_seed(seed)
    annotations = DetectionDataModule(str(dataset), num_workers=0).annotations("val")
    detections, targets = [], []
    for index in range(len(annotations)):
        rows = annotations.rows(index)
        boxes, labels = torch.from_numpy(annotations.boxes[rows]), torch.from_numpy(annotations.labels[rows])
        moved = boxes + jitter * torch.randn(boxes.shape, generator=generator)
        detections.append({"boxes": moved, "labels": labels, "scores": torch.rand(len(labels), generator=generator)})
        targets.append({"boxes": boxes, "labels": labels})
    return Evaluation(annotations, detections, targets, f"jitter {jitter}")


def test_compare__equally_good_detectors_do_not_differ(dataset: Path) -> None:
    differences = compare(detector(dataset, 3.0, seed=1), detector(dataset, 3.0, seed=2), samples=300)
    assert differences[0].name == "map"
    assert differences[0].verdict == "no difference"
    assert differences[0].low < differences[0].b - differences[0].a < differences[0].high


def test_compare__finds_the_better_one(dataset: Path) -> None:
    good, bad = detector(dataset, 3.0, seed=1), detector(dataset, 5.0, seed=2)
    forth, back = compare(bad, good, samples=300), compare(good, bad, samples=300)
    assert forth[0].verdict == "B is better"
    assert back[0].verdict == "A is better"
    assert (forth[0].low, forth[0].high) == pytest.approx((-back[0].high, -back[0].low), abs=5e-3)


def test_compare__refuses_other_images(dataset: Path) -> None:
    one = detector(dataset, 3.0, seed=1)
    other = write_synthetic_coco(dataset.parent / "others", num_train=2, num_val=3)
    with pytest.raises(ArgumentError, match="different images"):
        compare(one, detector(other, 3.0, seed=1))


def test_difference__verdict() -> None:
    assert Difference("map", 0.5, 0.4, -0.2, -0.01).verdict == "A is better"
    assert Difference("map", 0.5, 0.5, np.nan, np.nan).verdict == "undefined"


def test_compare__command_prints_and_writes(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = str(write_predictions(dataset, tmp_path / "found.json"))
    output = tmp_path / "compared.json"
    assert main(["compare", found, found, f"--data.root={dataset}", f"--output={output}"]) == 0
    assert capsys.readouterr().out.count("no difference") == 7
    numbers = json.loads(output.read_text())
    assert list(numbers)[:2] == ["map", "map_50"]
    assert numbers["map"]["low"] == numbers["map"]["high"] == 0
