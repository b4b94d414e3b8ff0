"""Access to the objects of a prediction, its drawings, and its files read back by others."""

import contextlib
import csv
import io
import json
import pickle
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor

from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.inference.images import PixelFormat
from lightning_convnext_det.inference.prediction import DetectedObject, Prediction
from lightning_convnext_det.inference.predictor import Predictor
from lightning_convnext_det.modules import FasterRCNNModule
from lightning_convnext_det.modules.registry import save_module

NAMES, IDS = ["cat", "dog", "wide load"], [17, 3, 5]


@pytest.fixture
def photo() -> Tensor:
    return torch.full((3, 250, 300), 128, dtype=torch.uint8)


@pytest.fixture
def found(photo: Tensor) -> Prediction:
    boxes = torch.tensor([[10.25, 20.5, 110.0, 90.0], [0.0, 0.0, 300.0, 250.0], [50.1, 60.2, 70.3, 80.4]])
    return Prediction(boxes, torch.tensor([1, 0, 2]), torch.tensor([0.9, 0.6, 0.1]), NAMES, IDS, photo)


# ---- access


def test_prediction__is_a_sequence_of_objects(found: Prediction) -> None:
    assert len(found) == 3
    assert found[0] == DetectedObject((10.25, 20.5, 110.0, 90.0), pytest.approx(0.9), "dog", 1, 3)
    assert [one.name for one in found] == ["dog", "cat", "wide load"] == found.names
    assert found[-1] == list(found)[2]
    assert found[np.int64(1)].label == 0  # type: ignore[call-overload]
    with pytest.raises(IndexError):
        found[3]


def test_prediction__fields_by_name(found: Prediction) -> None:
    assert found["boxes"] is found.boxes
    assert found["names"] == found.names
    assert found.category_ids.tolist() == [3, 17, 5]
    assert list(dict(found)) == ["boxes", "labels", "scores", "names", "category_ids"]
    with pytest.raises(KeyError, match="box"):
        found["box"]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("index", "names"),
    [
        pytest.param(slice(1, None), ["cat", "wide load"], id="slice"),
        pytest.param(torch.tensor([True, False, True]), ["dog", "wide load"], id="mask"),
        pytest.param([True, False, False], ["dog"], id="list of bools"),
        pytest.param(torch.tensor([2, 0]), ["wide load", "dog"], id="numbers"),
        pytest.param(np.array([1]), ["cat"], id="array"),
        pytest.param([], [], id="none"),
        pytest.param(slice(None, None, -1), ["wide load", "cat", "dog"], id="slice backwards"),
        pytest.param(np.argsort([2, 1, 0])[::-1], ["dog", "cat", "wide load"], id="array backwards"),
    ],
)
def test_prediction__selections_know_image_and_classes(
    index: slice | list | Tensor, names: list[str], found: Prediction
) -> None:
    some = found[index]
    assert some.names == names
    assert len(some) == len(names)
    assert some.image is found.image
    assert some.class_names == NAMES
    assert some.boxes.shape == (len(names), 4)


def test_prediction__an_index_as_a_tensor(found: Prediction) -> None:
    assert found[found.scores.argmin()].names == ["wide load"]
    assert found[np.array(1)].names == ["cat"]


def test_prediction__filter(found: Prediction) -> None:
    assert found.filter(score=0.6).names == ["dog", "cat"]
    assert found.filter(classes=["cat", "wide load"]).names == ["cat", "wide load"]
    assert found.filter(score=0.5, classes=["wide load"]).names == []
    with pytest.raises(ArgumentError, match="no class 'dgo'; did you mean 'dog'"):
        found.filter(classes=["dgo"])
    for wrong in (17, [17]):
        with pytest.raises(ArgumentError, match=r"classes holds 17; give names .* found\.category_ids == 17"):
            found.filter(classes=wrong)
    assert found[found.category_ids == 17].names == ["cat"]
    with pytest.raises(ArgumentError, match="score is 60"):
        found.filter(score=60)


def test_prediction__wrong_lengths() -> None:
    with pytest.raises(ArgumentError, match="1 boxes, 2 labels and 1 scores"):
        Prediction(torch.zeros(1, 4), torch.zeros(2).long(), torch.zeros(1), NAMES)


def test_prediction__says_what_it_holds(found: Prediction) -> None:
    assert repr(found) == "Prediction of 3 objects (1 dog, 1 cat, 1 wide load) in an image of 300x250"
    assert repr(found[:0]) == "Prediction of 0 objects in an image of 300x250"
    found = Prediction(found.boxes, found.labels, found.scores, NAMES, image="a.jpg")
    assert repr(found[:1]) == "Prediction of 1 object (1 dog) in 'a.jpg'"  # the file is not opened for that


def test_prediction__can_be_sent_to_another_process(found: Prediction) -> None:
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.boxes, found.boxes)
    assert again.names == found.names


# ---- drawings


def changed(image: Image.Image) -> bool:
    return bool((np.asarray(image) != 128).any())


def test_plot__draws_what_is_above_the_threshold(found: Prediction) -> None:
    assert found.plot().size == (300, 250)
    assert changed(found.plot())
    assert not changed(found[2:].plot())  # 0.1 is below the default of 0.3
    assert changed(found[2:].plot(score_threshold=0.1))
    assert changed(found.filter(score=0.05)[2:].plot())  # asked for
    found.drawn_from = [0.0, 1.0, 1.0]
    assert not changed(found[:1].plot())
    assert changed(found[1:].plot())


def test_plot__reads_the_file_when_it_is_needed(found: Prediction, tmp_path: Path) -> None:
    found.image = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"a.png"):
        found.plot()
    Image.new("RGB", (300, 250), (128, 128, 128)).save(tmp_path / "a.png")
    assert changed(found.plot())


def test_plot__large_tiff_is_reduced_as_it_was_read_in_tiles(found: Prediction, tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    Image.new("RGB", (5000, 300)).save(tmp_path / "wide.tif")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_convnext_det.data.io.decode.MAX_PIXELS", 1000)
        tiled = PixelFormat(tile=640)
        one = Prediction(
            found.boxes, found.labels, found.scores, NAMES, image=tmp_path / "wide.tif", pixel_format=tiled
        )
        assert one.image_size == (300, 5000)
        assert one.plot().size == (4096, 246)
        one.save(tmp_path / "drawn.png")
        assert one._repr_png_() is not None


def test_plot__without_image(found: Prediction) -> None:
    found.image = None
    with pytest.raises(ArgumentError, match="does not know its image"):
        found.plot()
    assert found._repr_png_() is None


def test_repr_png__is_the_drawing(found: Prediction) -> None:
    with Image.open(io.BytesIO(found._repr_png_() or b"")) as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(found.plot()))


# ---- files


def test_save__drawing(found: Prediction, tmp_path: Path) -> None:
    found.save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), np.asarray(found.plot()))


def test_save__coco_results_are_read_by_pycocotools(found: Prediction, tmp_path: Path) -> None:
    found.save(tmp_path / "a.json", image_id=7)
    truth = COCO()
    truth.dataset = {"images": [{"id": 7}], "categories": [{"id": i} for i in IDS], "annotations": []}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results = truth.loadRes(str(tmp_path / "a.json"))
    annotations = results.loadAnns(results.getAnnIds(imgIds=[7]))
    assert [a["category_id"] for a in annotations] == [3, 17, 5]
    assert next(a["bbox"] for a in annotations) == [10.25, 20.5, 99.75, 69.5]
    assert torch.equal(torch.tensor([a["score"] for a in annotations]), found.scores)


def test_save__csv(found: Prediction, tmp_path: Path) -> None:
    found.image = 'odd, "name".jpg'
    found.save(tmp_path / "a.csv", image_id=7)
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["category_name"] for row in rows] == ["dog", "cat", "wide load"]
    assert {row["file_name"] for row in rows} == {'odd, "name".jpg'}
    boxes = torch.tensor([[float(row[k]) for k in ("x1", "y1", "x2", "y2")] for row in rows])
    assert torch.equal(boxes, found.boxes)
    assert torch.equal(torch.tensor([float(row["score"]) for row in rows]), found.scores)


def test_save__yolo_is_read_by_supervision(found: Prediction, tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision")
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("RGB", (300, 250)).save(tmp_path / "images" / "a.jpg")
    found.save(tmp_path / "labels" / "a.txt")
    (tmp_path / "data.yaml").write_text(f"names: {json.dumps(NAMES)}\n")
    dataset = supervision.DetectionDataset.from_yolo(
        str(tmp_path / "images"), str(tmp_path / "labels"), str(tmp_path / "data.yaml")
    )
    [(_, _, read)] = list(dataset)
    assert read.class_id.tolist() == found.labels.tolist()
    assert read.xyxy == pytest.approx(found.boxes.numpy(), abs=1e-4)


def test_save__voc_is_read_by_the_standard_library(found: Prediction, tmp_path: Path) -> None:
    found.save(tmp_path / "a.xml")
    root = ElementTree.parse(tmp_path / "a.xml").getroot()
    assert [root.findtext(f"size/{side}") for side in ("width", "height")] == ["300", "250"]
    boxes = [
        [float(item.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")]
        for item in root.iter("object")
    ]
    assert torch.allclose(torch.tensor(boxes) - torch.tensor([1.0, 1.0, 0.0, 0.0]), found.boxes, atol=1e-5)
    assert [item.findtext("name") for item in root.iter("object")] == found.names
    assert [float(item.findtext("score", "")) for item in root.iter("object")] == pytest.approx([0.9, 0.6, 0.1])


def test_save__labelme(found: Prediction, tmp_path: Path) -> None:
    found.save(tmp_path / "a.json", format="labelme")
    content = json.loads((tmp_path / "a.json").read_text())
    assert (content["imageHeight"], content["imageWidth"], content["imageData"]) == (250, 300, None)
    boxes = torch.tensor([shape["points"] for shape in content["shapes"]]).flatten(1)
    assert torch.equal(boxes, found.boxes)
    assert [(shape["label"], shape["shape_type"]) for shape in content["shapes"]] == [
        (n, "rectangle") for n in found.names
    ]


@pytest.mark.parametrize("name", ["caf\udce9.jpg", "a\nb.jpg", "bell\x07.jpg", "<&>.jpg", "名前.jpg"])
def test_save__odd_file_names(name: str, found: Prediction, tmp_path: Path) -> None:
    found.image_size = (250, 300)
    found.image = name
    for suffix in ("csv", "json", "txt", "xml"):
        found.save(tmp_path / f"a.{suffix}")
    assert ElementTree.parse(tmp_path / "a.xml").getroot().findtext("filename")
    assert {record["file_name"] for record in json.loads((tmp_path / "a.json").read_text())} == {name}


def test_save__nothing_found(found: Prediction, tmp_path: Path) -> None:
    for suffix in ("csv", "json", "txt", "xml", "png"):
        found[:0].save(tmp_path / f"a.{suffix}")
    assert (tmp_path / "a.txt").read_text() == ""
    assert json.loads((tmp_path / "a.json").read_text()) == []


def test_save__unknown_suffix(found: Prediction, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"none of the suffixes \.png, .*\.xml"):
        found.save(tmp_path / "a.doc")
    with pytest.raises(ArgumentError, match=r"format is 'yulo'; .*did you mean 'yolo'"):
        found.save(tmp_path / "a.doc", format="yulo")  # type: ignore[arg-type]


def test_to_supervision__has_all_objects(found: Prediction) -> None:
    pytest.importorskip("supervision")
    detections = found.to_supervision()
    assert np.array_equal(detections.xyxy, found.boxes.numpy())
    assert detections.class_id.tolist() == [1, 0, 2]  # type: ignore[union-attr]
    assert detections.data["class_name"].tolist() == found.names
    assert len(found[:0].to_supervision()) == 0


# ---- thresholds of a predictor


class Foretold(torch.nn.Module):
    """Finds four cats and dogs with scores 0.9, 0.6, 0.4 and 0.2."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        boxes, scores = torch.tensor([[10.0, 10.0, 200.0, 200.0]]).repeat(4, 1), torch.tensor([0.9, 0.6, 0.4, 0.2])
        return [{"boxes": boxes, "labels": torch.tensor([0, 1, 0, 1]), "scores": scores} for _ in images]


def test_predictor__best_thresholds_are_those_of_the_classes(photo: Tensor) -> None:
    chosen = [0.5, 0.1]
    assert Predictor(Foretold(), ["cat", "dog"], score_thresholds=chosen)(photo).drawn_from == chosen
    best = Predictor(Foretold(), ["cat", "dog"], score_threshold="best", score_thresholds=chosen)
    assert best(photo).scores.tolist() == pytest.approx([0.9, 0.6, 0.2])
    unknown = Predictor(Foretold(), ["cat", "dog"], score_threshold="best", score_thresholds=[None, 0.9])
    assert unknown(photo).scores.tolist() == pytest.approx([0.9, 0.4])  # 0.3 where there is none
    given = Predictor(Foretold(), ["cat", "dog"], score_threshold=0.5, score_thresholds=chosen)
    assert given(photo).drawn_from == [0.5, 0.5]
    with pytest.raises(ArgumentError, match="no thresholds are known"):
        Predictor(Foretold(), ["cat", "dog"], score_threshold="best")
    with pytest.raises(ArgumentError, match="score_thresholds has 1 entries, but class_names has 2"):
        Predictor(Foretold(), ["cat", "dog"], score_thresholds=[0.5])


@pytest.mark.heavy
def test_from_checkpoint__takes_its_thresholds(tmp_path: Path) -> None:
    module = FasterRCNNModule(2, ["cat", "dog"], backbone="test_convnext", min_size=64, max_size=96)
    save_module(module, tmp_path / "without.ckpt")
    with pytest.raises(ArgumentError, match="no thresholds are known"):
        Predictor.from_checkpoint(tmp_path / "without.ckpt", score_threshold="best")
    module.score_thresholds = [0.25, None]
    save_module(module, tmp_path / "with.ckpt")
    predictor = Predictor.from_checkpoint(tmp_path / "with.ckpt", "cpu", score_threshold="best")
    assert predictor.score_thresholds == [0.25, 0.3]
