"""The report of predictions on a small dataset: page, numbers and plots; and its list of label errors."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import DataError
from lightning_convnext_det.report.analysis import analyse
from lightning_convnext_det.report.curves import draw_learning_curves, read_learning_curves, write_learning_curves
from lightning_convnext_det.report.drawings import crop_label_errors
from lightning_convnext_det.report.evaluation import evaluate_predictions
from lightning_convnext_det.report.training import metric_table

pytestmark = pytest.mark.heavy
Spoil = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_coco(tmp_path_factory.mktemp("report") / "shapes", num_train=6, num_val=12)


def annotation_file(dataset: Path) -> Path:
    return next(path for path in dataset.rglob("*.json") if "val" in path.name)


def write_predictions(dataset: Path, destination: Path) -> Path:
    """A good detector: every object is found with two boxes more on nothing."""
    generator = np.random.default_rng(0)
    annotations = json.loads(annotation_file(dataset).read_text())
    results = [
        {
            "image_id": record["image_id"], "category_id": record["category_id"],
            "bbox": (np.array(record["bbox"]) + generator.normal(0, 0.5, 4)).tolist(),
            "score": float(generator.uniform(0.7, 0.99)),
        }
        for record in annotations["annotations"]
    ]  # fmt: skip
    for image in annotations["images"]:
        box = [1, 1, 9, 7]
        results.append(
            {"image_id": image["id"], "category_id": 1, "bbox": box, "score": float(generator.uniform(0, 0.4))}
        )
    destination.write_text(json.dumps(results))
    return destination


@pytest.fixture(scope="module")
def report(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    predictions = write_predictions(dataset, folder / "found.json")
    arguments = ["report", f"--predictions={predictions}", f"--data.root={dataset}", f"--output={folder}/report.html"]
    assert main([*arguments, "--data.num_workers=0"]) == 0
    return folder


def test_report__is_one_page_that_loads_nothing(report: Path) -> None:
    page = (report / "report.html").read_text()
    loaded = re.findall(r"(?:src|href)=\"([^\"]+)\"", page)
    assert loaded
    assert {address[:11] for address in loaded if not address.startswith("#")} == {"data:image/"}
    anchors = re.findall(r"<section id=\"(\w+)\"", page)
    assert anchors == ["summary", "classes", "curves", "errors", "groups", "worst", "labels", "dataset", "origin"]
    assert page.count("<svg ") == page.count('role="img"') == 11
    assert len(page) < 2_000_000


def test_report__numbers_are_those_of_coco(report: Path, dataset: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers = json.loads((report / "report.json").read_text())
    ground_truth = COCO(str(annotation_file(dataset)))
    oracle = COCOeval(ground_truth, ground_truth.loadRes(str(report / "found.json")), "bbox")
    oracle.evaluate()
    oracle.accumulate()
    oracle.summarize()
    expected = dict(zip(("map", "map_50", "map_75"), oracle.stats[:3].tolist(), strict=True))
    assert {name: numbers["metrics"][name] for name in expected} == pytest.approx(expected, abs=1e-6)
    low, high = numbers["intervals"]["map"]
    assert low <= expected["map"] <= high
    assert sum(map(sum, numbers["confusion"]["matrix"])) >= len(ground_truth.anns)


def test_report__writes_the_plots(report: Path) -> None:
    plots = sorted((report / "report_plots").glob("*.svg"))
    assert len(plots) == 11
    assert all(plot.read_text().startswith("<svg") for plot in plots)
    images = sorted((report / "report_plots").glob("*.png"))
    assert [image.stem for image in images] == [plot.stem for plot in plots]
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)


def swap_class(record: dict[str, Any]) -> None:
    record["category_id"] = record["category_id"] % 5 + 1


def shift_box(record: dict[str, Any]) -> None:
    record["bbox"][0] += 0.6 * record["bbox"][2]


@pytest.mark.parametrize(("kind", "spoil"), [("class", swap_class), ("box", shift_box), ("missing", None)])
def test_find_label_errors__names_spoilt_annotations(
    kind: str, spoil: Spoil | None, dataset: Path, tmp_path: Path
) -> None:
    predictions = write_predictions(dataset, tmp_path / "found.json")
    content = json.loads(annotation_file(dataset).read_text())
    spoilt = content["annotations"][::9]
    for record in spoilt:
        if spoil is None:
            content["annotations"].remove(record)
        else:
            spoil(record)
    file = tmp_path / "spoilt.json"
    file.write_text(json.dumps(content))
    images = next(path.parent for path in dataset.rglob("*.jpg") if "val" in str(path))
    data = DetectionDataModule(val=str(file), val_images=str(images), num_workers=0)
    evaluation = evaluate_predictions(predictions, data, "val")
    listed = crop_label_errors(evaluation, analyse(evaluation, samples=100), with_crops=0)
    found = [(one.image_id, one.annotation_id) for one in listed if one.error.kind == kind]
    if spoil is None:
        assert sorted(image for image, _ in found) == sorted(record["image_id"] for record in spoilt)
    else:
        assert sorted(found) == sorted((record["image_id"], record["id"]) for record in spoilt)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "LCD-D004"),
        ("{}", "LCD-D001"),
        ('[{"image_id": 1}]', "LCD-D002"),
        ('[{"image_id": 99999, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5}]', "LCD-D117"),
        ('[{"image_id": 1, "category_id": 77, "bbox": [1, 1, 2, 2], "score": 0.5}]', "LCD-D1"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": NaN}]', "LCD-E010|LCD-D117"),
    ],
)
def test_evaluate_predictions__refuses(content: str, message: str, dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        evaluate_predictions(file, DetectionDataModule(str(dataset), num_workers=0), "val")


def test_report__needs_one_source(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"--data.root={dataset}"]) == 2
    assert "one of them" in capsys.readouterr().err


def test_read_learning_curves__averages_the_steps_of_an_epoch(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step,train/loss,val/map\n0,9,2.0,\n0,19,1.0,\n0,19,,0.25\n1,29,0.5,\n")
    assert read_learning_curves(log) == {"train/loss": ([0.0, 1.0], [1.5, 0.5]), "val/map": ([0.0], [0.25])}


def test_write_learning_curves__draws_one_plot_for_losses_and_one_for_metrics(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step,train/loss,val/map\n0,9,2.0,\n0,19,,0.25\n1,29,0.5,\n")
    assert write_learning_curves(log, tmp_path / "both.png")
    log.write_text("epoch,step,train/loss,val/map\n0,9,2.0,\n1,29,0.5,\n")
    assert write_learning_curves(log, tmp_path / "losses.png")
    with Image.open(tmp_path / "both.png") as both, Image.open(tmp_path / "losses.png") as losses:
        assert both.width == 2 * losses.width
        assert both.height == losses.height
    log.write_text("epoch,step,lr\n0,9,2.0\n")
    assert not write_learning_curves(log, tmp_path / "none.png")


def test_write_learning_curves__leaves_room_for_a_long_legend(tmp_path: Path) -> None:
    log, names = tmp_path / "metrics.csv", [f"train/loss_{i}" for i in range(40)]
    log.write_text(
        "\n".join(",".join(["epoch", "step", *row]) for row in [names, ["1.0"] * 40]).replace("epoch,step,1", "0,9,1")
    )
    assert write_learning_curves(
        log, tmp_path / "many.png"
    )  # matplotlib's warning of axes without room is an error here


def test_write_learning_curves__has_the_last_decoder_layer_alone(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step,train/loss_box,train/loss_box_aux0,train/loss_box_denoising_aux4\n0,9,1.0,2.0,3.0\n")
    assert list(draw_learning_curves(log)["Losses"].svg.partition("aux")[1:]) == ["", ""]


def test_metric_table__has_the_best_epoch_and_the_last(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step,train/loss,val/map\n0,9,,0.25\n1,19,,0.5\n2,29,,nan\n3,39,,0.25\n")
    assert [line.split() for line in metric_table(log, "val/map")] == [
        ["best", "last"],
        ["epoch", "1", "3"],
        ["val/map", "0.500", "0.250"],
    ]
    log.write_text("epoch,step,train/loss\n0,9,2.0\n")
    assert metric_table(log, "val/map") == []
