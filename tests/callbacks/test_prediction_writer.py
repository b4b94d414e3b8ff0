import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_convnext_det.callbacks import prediction_writer
from lightning_convnext_det.callbacks.prediction_writer import PredictionWriter
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.writers.files import FileList
from lightning_convnext_det.errors import ArgumentError, DivergenceError
from lightning_convnext_det.metrics.coco_results import coco_results
from lightning_convnext_det.types import Detection, Target

Batch = tuple[list[Tensor], list[Target]]


class Foretold(pl.LightningModule):
    """Finds in every image one box for each score, at places that depend on the image's id."""

    def __init__(self, scores: tuple[float, ...] = (0.9, 0.2)) -> None:
        super().__init__()
        self.class_names, self.category_ids = ["cat", "dog"], [17, 3]
        self.scores = scores
        self.fail_at = -1

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Detection]:
        if batch_idx == self.fail_at:
            raise RuntimeError("the power is gone")
        return [self.detection(int(target["image_id"])) for target in batch[1]]

    def detection(self, image_id: int) -> Detection:
        n = len(self.scores)
        boxes = torch.tensor([[image_id + 0.1, 2.5, image_id + 40.7, 60.25]]).repeat(n, 1)
        return Detection(boxes=boxes, labels=torch.arange(n) % 2, scores=torch.tensor(self.scores))


def loader(*names: str, first_id: int = 1) -> DataLoader[Batch]:
    """Batches of two grey images."""
    samples = [
        (torch.full((3, 260, 300), 128, dtype=torch.uint8), {"image_id": i, "file_name": name})
        for i, name in enumerate(names, first_id)
    ]
    pairs = [samples[i : i + 2] for i in range(0, len(samples), 2)]
    batches = [([s[0] for s in pair], [s[1] for s in pair]) for pair in pairs]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list serves as a dataset


def predict(
    writer: PredictionWriter, data: DataLoader[Batch], module: pl.LightningModule | None = None, **options: object
) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[writer], enable_checkpointing=False,
        **options,
    )  # fmt: skip
    trainer.predict(module or Foretold(), data, return_predictions=False)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "predictions.json").read_text())


def test_prediction_writer__records_and_drawings(tmp_path: Path) -> None:
    predict(PredictionWriter(tmp_path / "out"), loader("some/a.jpg", "some/b.png", "c.jpeg"))
    assert visible(tmp_path / "out") == ["a.jpg", "b.png", "c.jpg", "predictions.json"]
    records = results(tmp_path / "out")
    assert [r["image_id"] for r in records] == [1, 1, 2, 2, 3, 3]
    assert set(records[0]) == {"image_id", "category_id", "bbox", "score", "category_name", "file_name"}
    assert [(r["category_id"], r["category_name"]) for r in records[:2]] == [(17, "cat"), (3, "dog")]
    assert [r["score"] for r in records[:2]] == [0.9, 0.2]
    assert records[2]["bbox"] == [2.1, 2.5, 40.6, 57.75]
    assert records[3]["file_name"] == "some/b.png"


def test_prediction_writer__only_boxes_above_the_threshold_are_drawn(tmp_path: Path) -> None:
    drawn = {}
    for scores in ((0.9, 0.2), (0.9,), (0.1, 0.2)):
        predict(PredictionWriter(tmp_path, score_threshold=0.3), loader("a.png"), Foretold(scores))
        drawn[scores] = read_image(tmp_path / "a.png")
        assert len(results(tmp_path)) == len(scores)
    assert (drawn[0.9, 0.2] == drawn[0.9,]).all()
    assert (drawn[0.9,] != 128).any()
    assert (drawn[0.1, 0.2] == 128).all()


@pytest.mark.parametrize(
    ("arguments", "drawn"),
    [
        pytest.param({"draw": False}, [], id="no drawings"),
        pytest.param({"draw_limit": 2}, ["a.jpg", "b.jpg"], id="two"),
        pytest.param({"draw_limit": 0}, [], id="none"),
        pytest.param({"draw_limit": 9}, ["a.jpg", "b.jpg", "c.jpg"], id="more than there are"),
    ],
)
def test_prediction_writer__limits_drawings_but_not_records(arguments: dict, drawn: list[str], tmp_path: Path) -> None:
    predict(PredictionWriter(tmp_path, **arguments), loader("a.jpg", "b.jpg", "c.jpg"))
    assert visible(tmp_path) == [*drawn, "predictions.json"]
    assert len(results(tmp_path)) == 6


def test_prediction_writer__same_stem_does_not_overwrite(tmp_path: Path) -> None:
    names = ["x/a.jpg", "y/a.jpg", "z/a.jpeg", "a-2.jpg", "a.png"]
    predict(PredictionWriter(tmp_path), loader(*names))
    # a-2 is taken by the drawing of y/a.jpg
    assert visible(tmp_path) == ["a-2-4.jpg", "a-2.jpg", "a-3.jpg", "a.jpg", "a.png", "predictions.json"]
    assert all(read_image(tmp_path / name).shape == (3, 260, 300) for name in visible(tmp_path)[:-1])


def test_prediction_writer__earlier_results_are_replaced_and_other_files_kept(tmp_path: Path) -> None:
    theirs = Image.new("RGB", (10, 10))
    theirs.save(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "a.jpg").read_bytes()
    writer = PredictionWriter(tmp_path)
    predict(writer, loader("a.jpg", "old.jpg"))
    assert visible(tmp_path) == ["a-1.jpg", "a.jpg", "notes.txt", "old.jpg", "predictions.json"]
    predict(writer, loader("new.jpg", first_id=5))
    assert visible(tmp_path) == ["a.jpg", "new.jpg", "notes.txt", "predictions.json"]
    assert (tmp_path / "a.jpg").read_bytes() == before
    assert {r["image_id"] for r in results(tmp_path)} == {5}


def test_prediction_writer__says_that_it_replaces(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        predict(PredictionWriter(tmp_path / "p"), loader("a.jpg"))
        assert "are replaced" not in caplog.text
        predict(PredictionWriter(tmp_path / "p"), loader("a.jpg"))
    assert f"the earlier results in '{tmp_path / 'p'}' are replaced" in caplog.text
    assert f"predictions are in '{tmp_path / 'p' / 'predictions.json'}'" in caplog.text


def test_prediction_writer__a_list_of_drawings_that_names_files_elsewhere_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "precious.jpg").write_text("data")
    folder = tmp_path / "p"
    folder.mkdir()
    names = ["../precious.jpg", str(tmp_path / "precious.jpg"), "x/../../precious.jpg"]
    (folder / ".predictions-0.drawn").write_text("".join(f"{json.dumps([name, 1])}\n" for name in names))
    predict(PredictionWriter(folder), loader("a.jpg"))
    assert (tmp_path / "precious.jpg").read_text() == "data"


def test_prediction_writer__no_image_and_no_box(tmp_path: Path) -> None:
    predict(PredictionWriter(tmp_path), loader("a.jpg"), Foretold(scores=()))
    assert results(tmp_path) == []
    assert visible(tmp_path) == ["a.jpg", "predictions.json"]


def test_prediction_writer__failure_leaves_no_results(tmp_path: Path) -> None:
    predict(PredictionWriter(tmp_path), loader("old.jpg"))
    module = Foretold()
    module.fail_at = 1
    with pytest.raises(RuntimeError, match="power"):
        predict(PredictionWriter(tmp_path), loader("a.jpg", "b.jpg", "c.jpg"), module)
    assert visible(tmp_path) == ["a.jpg", "b.jpg"]  # neither old results nor half of the new
    assert not list(tmp_path.glob("*.part"))
    predict(PredictionWriter(tmp_path), loader("d.jpg"))
    assert visible(tmp_path) == ["d.jpg", "predictions.json"]


def test_prediction_writer__a_killed_run_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".predictions-3.part").write_text("7\t{}\n")
    listed = '["half.jpg", 1]\n["half.jpg", 1]\n["gone.jpg", 2]\n["cut sho'
    (tmp_path / ".predictions-3.drawn").write_text(listed)
    (tmp_path / "half.jpg").write_text("")
    predict(PredictionWriter(tmp_path), loader("a.jpg"))
    assert visible(tmp_path) == ["a.jpg", "predictions.json"]
    assert {r["image_id"] for r in results(tmp_path)} == {1}


def test_prediction_writer__a_kill_at_any_time_leaves_a_list_of_the_drawings(tmp_path: Path) -> None:
    listed = []

    class Watching(Foretold):
        def predict_step(self, batch: Batch, batch_idx: int) -> list[Detection]:
            listed.append((tmp_path / ".predictions-0.drawn").read_text().splitlines())
            return super().predict_step(batch, batch_idx)

    predict(PredictionWriter(tmp_path), loader("a.jpg", "b.jpg", "c.jpg"), Watching())
    assert listed == [[], ['["a.jpg", 1]', '["b.jpg", 2]']]


@pytest.mark.parametrize("name", ["名前.jpg", "a\nb.jpg", "q\"uote'.jpg", "caf\udce9.jpg", "no suffix", ".hidden.jpg"])
def test_prediction_writer__odd_file_names(name: str, tmp_path: Path) -> None:
    predict(PredictionWriter(tmp_path), loader(name))
    assert {r["file_name"] for r in results(tmp_path)} == {name}
    drawing = tmp_path / f"{Path(name).stem}.jpg"
    assert drawing.is_file()
    predict(PredictionWriter(tmp_path), loader("other.jpg"))
    assert not drawing.exists()


def test_prediction_writer__a_target_without_file_name_is_called_by_its_id(tmp_path: Path) -> None:
    data = DataLoader([([torch.zeros(3, 260, 260)], [{"image_id": 12}])], batch_size=None)
    predict(PredictionWriter(tmp_path), data)
    assert visible(tmp_path) == ["12.jpg", "predictions.json"]
    assert results(tmp_path)[0]["file_name"] == "12"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"score_threshold": 30}, "score_threshold is 30; choose best or a number at least 0", id="percent"
        ),
        pytest.param({"draw_limit": -1}, "draw_limit is -1", id="negative limit"),
    ],
)
def test_prediction_writer__wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PredictionWriter(**arguments)


def test_prediction_writer__folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("")
    with pytest.raises(ValueError, match=r"cannot write predictions to folder '.*p' .*or choose another"):
        predict(PredictionWriter(tmp_path / "p"), loader("a.jpg"))


@pytest.mark.parametrize("format", ["coco", "yolo", "parquet"])
def test_prediction_writer__folder_that_becomes_full(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    writer = PredictionWriter(tmp_path, formats=format, draw=False)
    if format == "coco":
        monkeypatch.setattr(prediction_writer, "MERGED", {"coco": ("predictions.json", fail)})
    else:
        monkeypatch.setattr(*{"yolo": (FileList, "reserve"), "parquet": (os, "fsync")}[format], fail)
    with pytest.raises(ArgumentError, match=r"cannot write predictions to folder .*No space left .* make room"):
        predict(writer, loader("a.jpg"))


def test_prediction_writer__your_own_tables_stay(tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text("mine\n1\n")
    for _ in range(2):
        predict(PredictionWriter(tmp_path, draw=False), loader("a.jpg"))
    assert visible(tmp_path) == ["predictions.csv", "predictions.json"]
    with pytest.raises(ArgumentError, match=r"predictions\.csv' is not of an earlier prediction"):
        predict(PredictionWriter(tmp_path, formats="csv", draw=False), loader("a.jpg"))
    (tmp_path / "predictions.csv").unlink()
    for scores in [(0.9,), (), (0.5,)]:
        predict(PredictionWriter(tmp_path, formats="csv,coco", draw=False), loader("a.jpg"), Foretold(scores))
    predict(PredictionWriter(tmp_path, formats="yolo", draw=False), loader("a.jpg"))
    assert visible(tmp_path) == ["yolo"]


def test_prediction_writer__font_is_refused_at_once() -> None:
    with pytest.raises(ArgumentError, match=r"font 'none\.ttf' cannot be used"):
        PredictionWriter(font="none.ttf")


def test_prediction_writer__target_without_id(tmp_path: Path) -> None:
    module = Foretold()
    module.predict_step = lambda batch, batch_idx: [Foretold().detection(0)] * len(batch)  # type: ignore[method-assign]
    data = DataLoader([torch.zeros(2, 3, 260, 260), [torch.zeros(3, 260, 260)]], batch_size=None)
    predict(PredictionWriter(tmp_path, draw=False), data, module)
    records = json.loads((tmp_path / "predictions.json").read_text())
    assert sorted({(record["image_id"], record["file_name"]) for record in records}) == [(1, "1"), (2, "2"), (3, "3")]


def test_prediction_writer__module_without_classes(tmp_path: Path) -> None:
    module = Foretold()
    del module.class_names
    with pytest.raises(TypeError, match="Foretold has no class_names and category_ids"):
        predict(PredictionWriter(tmp_path), loader("a.jpg"), module)


def test_prediction_writer__is_idle_in_training(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path / "p")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[writer])
    trainer.validate(BoringModel(), verbose=False)
    assert not (tmp_path / "p").exists()


def test_coco_results__numbers_keep_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * 1000
    boxes = torch.cat([corners, corners + torch.rand(200, 2, generator=generator) * 300], 1)
    scores = torch.rand(200, generator=generator)
    detection = Detection(boxes=boxes, labels=torch.zeros(200, dtype=torch.int64), scores=scores)
    records = json.loads(json.dumps(coco_results(detection, 1, "a", ["cat"], [9])))
    assert torch.equal(torch.tensor([r["score"] for r in records]), scores)
    written = torch.tensor([r["bbox"] for r in records], dtype=torch.float64)
    written[:, 2:] += written[:, :2]
    assert torch.equal(written.float(), boxes)


@pytest.mark.parametrize("name", ["boxes", "scores"])
def test_coco_results__figures_that_are_not_finite_are_refused(name: str) -> None:
    detection = Foretold().detection(1)
    detection[name][0] = float("nan")  # type: ignore[literal-required]
    with pytest.raises(DivergenceError, match=r"\[LCD-E010\] .* 'a.jpg' are not finite"):
        coco_results(detection, 1, "a.jpg", ["cat", "dog"], [1, 2])


@pytest.mark.heavy
def test_prediction_writer__pycocotools_reads_what_it_writes(shared_data: Path, tmp_path: Path) -> None:
    # here, for the script below imports this file in two processes
    from lightning_convnext_det.modules import FasterRCNNModule

    file = shared_data / "coco_mini" / "annotations" / "instances_val2017.json"
    truth = COCO(str(file))
    categories = sorted(truth.cats)
    torch.manual_seed(0)
    module = FasterRCNNModule(
        80, [truth.cats[c]["name"] for c in categories], categories, backbone="test_convnext", min_size=64, max_size=96,
        fpn_channels=32, box_head_features=32, score_threshold=0.0, detections_per_image=20,
    )  # fmt: skip
    images = list(truth.imgs.values())[:12]
    paths = [shared_data / "coco_mini" / "val2017" / image["file_name"] for image in images]
    batches = [
        ([read_image(path)], [{"image_id": image["id"], "file_name": str(path)}])
        for path, image in zip(paths, images, strict=True)
    ]
    predict(PredictionWriter(tmp_path, score_threshold=0.0), DataLoader(batches, batch_size=None), module)  # type: ignore[arg-type]
    found = truth.loadRes(str(tmp_path / "predictions.json"))
    assert len(found.anns) == 12 * 20
    for annotation in found.anns.values():
        assert annotation["category_name"] == truth.cats[annotation["category_id"]]["name"]
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.params.imgIds = [image["id"] for image in images]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert 0 <= evaluation.stats[0] < 0.1  # random weights
    for path, image in zip(paths, images, strict=True):
        assert read_image(tmp_path / path.name).shape == (3, image["height"], image["width"])


TWO_PROCESSES = """
import sys
from pathlib import Path
import lightning.pytorch as pl
from lightning_convnext_det.callbacks import prediction_writer
from lightning_convnext_det.callbacks.prediction_writer import PredictionWriter
from tests.callbacks.test_prediction_writer import Foretold, loader

class Data(pl.LightningDataModule):
    def __init__(self, *shares):
        super().__init__()
        self.shares = shares
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self):
        first_id, names = self.shares[self.trainer.global_rank]
        return loader(*names, first_id=first_id)

writer = PredictionWriter(draw_limit=3)
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
                     callbacks=[writer], use_distributed_sampler=False)
for name, shares in (
    ("uneven", [(1, ["x/a.jpg", "x/b.jpg", "x/c.jpg"]), (4, ["y/a.jpg"])]),
    ("idle", [(1, ["a.jpg"]), (0, [])]),
):
    writer.folder = Path(sys.argv[1], name)
    trainer.predict(Foretold(), datamodule=Data(*shares), return_predictions=False)
"""


@pytest.mark.heavy
def test_prediction_writer__two_processes(tmp_path: Path) -> None:
    script, tests = tmp_path / "script.py", Path(__file__).parents[1]
    script.write_text(TWO_PROCESSES)
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent / 'src'}:{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    assert [r["image_id"] for r in results(tmp_path / "uneven")] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [r["image_id"] for r in results(tmp_path / "idle")] == [1, 1]
    # of three drawings the first process may make two, the second one; both images are called a
    drawings = visible(tmp_path / "uneven")[:-1]
    assert drawings in (["a-1.jpg", "a.jpg", "b.jpg"], ["a-4.jpg", "a.jpg", "b.jpg"])
    assert all(read_image(tmp_path / "uneven" / name).shape == (3, 260, 300) for name in drawings)
    assert visible(tmp_path / "idle") == ["a.jpg", "predictions.json"]
    assert not list(tmp_path.glob("*/*.part"))
