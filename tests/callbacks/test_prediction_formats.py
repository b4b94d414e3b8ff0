"""Formats of predictions, each read back by another reader, and going on with a prediction that was killed."""

import csv
import json
import os
from pathlib import Path
from xml.etree import ElementTree

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_convnext_det.callbacks.prediction_writer import PredictionWriter
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.io.inputs import find_images
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.data.writers.files import FileList
from lightning_convnext_det.data.writers.rank_results import name_folders
from lightning_convnext_det.errors import ArgumentError, DataError
from lightning_convnext_det.types import Detection
from tests.callbacks.test_prediction_writer import Batch, Foretold, loader, predict, results, visible
from tests.processes import run_on_two_ranks, run_script
from tests.training import create_trainer

polars = pytest.importorskip("polars")
pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")

ALL = "coco,csv,parquet,yolo,voc,labelme,crops"


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "parquet").glob("*.parquet"))


def rows(folder: Path) -> list[tuple]:
    """The rows of all parts by polars, by image and descending score."""
    table = polars.concat([polars.read_parquet(path) for path in parts(folder)])
    return table.sort(["image_id", "score"], descending=[False, True]).rows()


class Seen(Foretold):
    """Notes the images it is given; its boxes lie in the synthetic images, another number in each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Detection]:
        self.seen += [int(target["image_id"]) for target in batch[1]]
        return super().predict_step(batch, batch_idx)

    def detection(self, image_id: int) -> Detection:
        found = super().detection(image_id)
        count = image_id % 3
        return Detection(boxes=found["boxes"][:count], labels=found["labels"][:count], scores=found["scores"][:count])


# ---- formats


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Results of three images in all formats, two boxes each, of scores 0.9 and 0.2."""
    predict(PredictionWriter(tmp_path, formats=ALL), loader("some/a.jpg", "b.png", "c.jpeg"))
    return tmp_path


def test_formats__csv_equals_the_coco_results(written: Path) -> None:
    with open(written / "predictions.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for row, record in zip(table, results(written), strict=True):
        assert {k: row[k] for k in ("image_id", "file_name", "category_id", "category_name", "score")} == {
            k: str(record[k]) for k in ("image_id", "file_name", "category_id", "category_name", "score")
        }
        found = Foretold().detection(record["image_id"])["boxes"][0]
        assert torch.equal(torch.tensor([float(row[k]) for k in ("x1", "y1", "x2", "y2")]), found)


def test_formats__parquet_is_read_by_polars(written: Path) -> None:
    assert [path.name for path in parts(written)] == ["part-00000-000000.parquet"]
    table = polars.read_parquet(parts(written)[0])
    assert table["image_id"].to_list() == [1, 1, 2, 2, 3, 3]
    assert table["file_name"].to_list()[::2] == ["some/a.jpg", "b.png", "c.jpeg"]
    assert table["category_id"].to_list() == [17, 3] * 3
    assert table["category_name"].to_list() == ["cat", "dog"] * 3
    assert table["score"].to_numpy() == pytest.approx(np.float32([0.9, 0.2] * 3), abs=0)
    boxes = table.select("x1", "y1", "x2", "y2").to_numpy()
    assert np.array_equal(boxes, np.concatenate([Foretold().detection(i)["boxes"].numpy() for i in (1, 2, 3)]))


def test_formats__annotation_files_hold_what_reaches_the_threshold(written: Path) -> None:
    assert visible(written / "yolo") == ["a.txt", "b.txt", "c.txt", "classes.txt"]
    assert (written / "yolo" / "classes.txt").read_text() == "cat\ndog\n"
    label, *box = (float(word) for word in (written / "yolo" / "b.txt").read_text().split())
    x, y, width, height = np.multiply(box, [300, 260, 300, 260])
    assert (label, x - width / 2, y - height / 2) == pytest.approx((0, 2.1, 2.5), abs=1e-4)
    assert (width, height) == pytest.approx((40.6, 57.75), abs=1e-4)
    root = ElementTree.parse(written / "voc" / "b.xml").getroot()
    assert [root.findtext("object/name"), root.findtext("object/bndbox/xmin")] == ["cat", "3.1"]
    root = ElementTree.parse(written / "voc" / "a.xml").getroot()
    assert [root.findtext("filename"), root.findtext("path")] == ["a.jpg", "some/a.jpg"]
    [shape] = json.loads((written / "labelme" / "b.json").read_text())["shapes"]
    assert shape["points"] == [[2.1, 2.5], [42.7, 60.25]]


def test_formats__yolo_and_voc_are_read_by_the_data_module(tmp_path: Path) -> None:
    write_synthetic_coco(tmp_path / "data", 3, 1, 1)
    images = sorted((tmp_path / "data" / "train").glob("*.jpg"))
    data = DetectionDataModule(predict=str(tmp_path / "data" / "train"), batch_size=2, num_workers=0)
    predict_files(PredictionWriter(tmp_path / "out", formats="yolo,voc", draw=False, score_threshold=0), data)
    for name, layout in (("yolo", ("images", "labels")), ("voc", ("JPEGImages", "Annotations"))):
        root = tmp_path / name
        for folder in layout:
            (root / folder).mkdir(parents=True)
        for image in images:
            (root / layout[0] / image.name).write_bytes(image.read_bytes())
        for file in (tmp_path / "out" / name).iterdir():
            if file.name != "classes.txt":
                (root / layout[1] / file.name).write_bytes(file.read_bytes())
        if name == "yolo":
            (root / "data.yaml").write_text("train: images\nval: images\nnames: [cat, dog]\n")
        read = DetectionDataModule(
            str(root),
            num_workers=0,
            val_fraction=0.0,
            class_names=["cat", "dog"],
        )
        table = read.annotations("train")
        assert table is not None
        assert len(table) == 3
        for i, image_id in enumerate((1, 2, 3)):
            expected = Seen().detection(image_id)
            own = slice(table.offsets[i], table.offsets[i + 1])
            assert table.labels[own].tolist() == expected["labels"].tolist()
            assert table.boxes[own] == pytest.approx(expected["boxes"].numpy(), abs=2e-3)


def test_formats__crops_are_the_pixels_of_the_objects(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 260, 300), dtype=torch.uint8)
    target = {"image_id": 1, "file_name": "a.png"}
    module = Foretold((0.9, 0.8, 0.7, 0.1))
    module.class_names = ["cat", "a/b: c"]
    data = torch.utils.data.DataLoader([([image], [target])], batch_size=None)  # type: ignore[arg-type]
    predict(PredictionWriter(tmp_path, formats=["crops"], draw=False), data, module)
    assert visible(tmp_path / "crops") == ["a_b_ c", "cat"]
    assert visible(tmp_path / "crops" / "cat") == ["a-1.png", "a.png"]
    # the box is 1.1, 2.5, 41.7, 60.25: whole pixels that it touches
    assert torch.equal(read_image(tmp_path / "crops" / "cat" / "a.png"), image[:, 2:61, 1:42])


def test_formats__crops_of_classes_of_like_names_have_folders_of_their_own(tmp_path: Path) -> None:
    module = Foretold((0.9, 0.8))
    module.class_names = ["C++", "C#"]
    predict(PredictionWriter(tmp_path, formats="crops", draw=False), loader("a.jpg"), module)
    assert visible(tmp_path / "crops") == ["C_", "C_-1"]


def test_formats__names_keep_blanks_and_joiners_of_other_scripts(tmp_path: Path) -> None:
    module, name = Foretold((0.9, 0.8)), "Screenshot 3.04\u202fPM.png"  # as macOS names them
    module.class_names = names = ["no\u00a0break", "\u0645\u06cc\u200c\u0634\u0648\u062f"]
    predict(PredictionWriter(tmp_path, formats=ALL), loader(name), module)
    assert {(row[1], row[3]) for row in rows(tmp_path)} == {(name, names[0]), (name, names[1])}
    assert (tmp_path / "yolo" / "classes.txt").read_text(encoding="utf-8").split("\n") == [*names, ""]
    root = ElementTree.parse(tmp_path / "voc" / f"{Path(name).stem}.xml").getroot()
    assert [root.findtext("filename"), *(item.findtext("name") for item in root.iter("object"))] == [name, *names]


def test_formats__labelme_files_lead_to_the_images(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = DetectionDataModule(predict="data/train", batch_size=2, num_workers=0)
    predict_files(create(Path("out"), formats="labelme", draw=False), data)
    for path in (tmp_path / "out" / "labelme").glob("*.json"):
        image = path.parent / json.loads(path.read_text())["imagePath"]  # as LabelMe joins them
        assert image.resolve() == photos / f"{path.stem}.jpg"


def test_formats__results_of_frames_have_their_numbers(tmp_path: Path) -> None:
    predict(PredictionWriter(tmp_path, formats="yolo"), loader("clip.mp4#000000", "clip.mp4#000012"))
    assert visible(tmp_path / "yolo") == ["classes.txt", "clip-000000.txt", "clip-000012.txt"]
    assert visible(tmp_path) == ["clip-000000.jpg", "clip-000012.jpg", "yolo"]


def test_formats__best_threshold_is_that_of_the_class(tmp_path: Path) -> None:
    module = Foretold((0.9, 0.9))
    module.score_thresholds = [0.95, None]
    predict(PredictionWriter(tmp_path, formats="labelme"), loader("a.jpg"), module)
    [shape] = json.loads((tmp_path / "labelme" / "a.json").read_text())["shapes"]
    assert shape["label"] == "dog"


def test_formats__earlier_results_of_all_formats_are_replaced(written: Path) -> None:
    (written / "voc" / "mine.xml").write_text("")
    predict(PredictionWriter(written, formats="csv"), loader("new.jpg"))
    assert visible(written) == ["new.jpg", "parquet", "predictions.csv", "voc"]
    assert visible(written / "voc") == ["mine.xml"]
    assert not parts(written)


def test_formats__tables_alone(tmp_path: Path) -> None:
    predict(PredictionWriter(tmp_path, formats="parquet", draw=False), loader("a.jpg"), Foretold(()))
    assert visible(tmp_path) == ["parquet"]
    assert polars.read_parquet(parts(tmp_path)[0]).shape == (0, 9)


@pytest.mark.parametrize("name", ["名前.jpg", "a\nb.jpg", "caf\udce9.jpg", "no suffix"])
def test_formats__odd_file_names(name: str, tmp_path: Path) -> None:
    predict(PredictionWriter(tmp_path, formats=ALL), loader(name))
    assert ElementTree.parse(tmp_path / "voc" / f"{Path(name).stem}.xml").getroot().findtext("filename")
    assert len(rows(tmp_path)) == 2
    predict(PredictionWriter(tmp_path), loader("other.jpg"))
    assert not (tmp_path / "voc").exists()


def test_formats__names_at_the_limit_of_the_file_system(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{'x' * 251}.jpg", f"some/{'x' * 251}.jpg", f"{'写' * 83}.png"]  # of 255, 255 and 253 bytes
    predict(PredictionWriter(tmp_path, formats="yolo,labelme,crops"), loader(*names))
    assert visible(tmp_path / "labelme") == [f"{'x' * 248}-2.json", f"{'x' * 250}.json", f"{'写' * 83}.json"]
    assert visible(tmp_path / "yolo") == ["classes.txt", f"{'x' * 249}-2.txt", f"{'x' * 251}.txt", f"{'写' * 83}.txt"]
    assert len(visible(tmp_path / "crops" / "cat")) == 3
    paths = [json.loads(file.read_text())["imagePath"] for file in (tmp_path / "labelme").iterdir()]
    assert sorted(paths) == sorted(names)
    assert caplog.text.count("cannot hold are shortened, first") == 1
    folders = name_folders(["y" * 300, "y" * 301])
    assert len(set(folders)) == 2
    assert max(map(len, folders)) < 250


def test_file_list__names_of_many_crops_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a-7-3.jpg").touch()
    files, touch, tried = FileList(tmp_path, 0), Path.touch, []
    monkeypatch.setattr(Path, "touch", lambda self, **options: (tried.append(self.name), touch(self, **options))[1])
    names = [files.reserve(tmp_path, "a", ".jpg", image_id).name for image_id in (7, 7, 7, 7, 9, 7)]
    assert names == ["a.jpg", "a-7.jpg", "a-7-2.jpg", "a-7-4.jpg", "a-9.jpg", "a-7-5.jpg"]
    assert tried[:5] == ["a.jpg", "a-7.jpg", "a-7-2.jpg", "a-7-3.jpg", "a-7-4.jpg"]
    files.close()


def test_formats__your_own_list_of_classes_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo" / "classes.txt").write_text("cat\nbird\n")
    predict(PredictionWriter(tmp_path, formats="yolo"), loader("a.jpg"))
    assert (tmp_path / "yolo" / "classes.txt").read_text() == "cat\nbird\n"
    assert "classes.txt' is your own and stays; the labels of the files beside it are: cat, dog" in caplog.text
    caplog.clear()
    (tmp_path / "yolo" / "classes.txt").write_text("cat\ndog\n")
    predict(PredictionWriter(tmp_path, formats="yolo"), loader("a.jpg"))
    assert "is your own" not in caplog.text


def test_prediction_writer__unknown_format() -> None:
    with pytest.raises(ArgumentError, match="there is no 'labelm'; did you mean 'labelme'"):
        PredictionWriter(formats="coco,labelm")


def test_prediction_writer__folders_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert PredictionWriter("~/found").folder == Path("/home/ann/found")
    with pytest.raises(ArgumentError, match="folder is 's3://bucket/found'; results are written to folders"):
        PredictionWriter("s3://bucket/found")


def test_prediction_writer__parquet_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_convnext_det.data.writers.parquet.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"needs pyarrow: pip install 'lightning-convnext-det\[parquet\]'"):
        PredictionWriter(formats="parquet")


# ---- going on


def predict_files(
    writer: PredictionWriter, data: DetectionDataModule, module: pl.LightningModule | None = None
) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[writer], enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.predict(module or Seen(), datamodule=data, return_predictions=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nine images, of which the fourth cannot be read."""
    write_synthetic_coco(tmp_path / "data", 9, 1, 1)
    files = sorted((tmp_path / "data" / "train").glob("*.jpg"))
    files[3].write_text("no image")
    return tmp_path / "data" / "train"


def create(folder: Path, **options: object) -> PredictionWriter:
    return PredictionWriter(folder, **{"formats": ALL, "images_per_part": 2, **options})


def data_of(photos: Path) -> DetectionDataModule:
    return DetectionDataModule(predict=str(photos), batch_size=2, num_workers=0)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the lists and the Parquet files."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.suffix != ".parquet"}


@pytest.mark.heavy
@pytest.mark.parametrize("killed_at", [1, 3, 4])
def test_prediction_writer__goes_on_where_it_was_killed(killed_at: int, photos: Path, tmp_path: Path) -> None:
    predict_files(create(tmp_path / "undisturbed"), data_of(photos))
    broken = Seen()
    broken.fail_at = killed_at
    with pytest.raises(RuntimeError, match="power"):
        predict_files(create(tmp_path / "killed"), data_of(photos), broken)
    finished = {image_id for path in parts(tmp_path / "killed") for image_id in images_of(path)}
    again = Seen()
    predict_files(create(tmp_path / "killed"), data_of(photos), again)
    assert finished.isdisjoint(again.seen)
    assert finished | set(again.seen) == {1, 2, 3, 5, 6, 7, 8, 9}
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "undisturbed")
    idle = Seen()
    predict_files(create(tmp_path / "killed"), data_of(photos), idle)
    assert idle.seen == []
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")


def images_of(path: Path) -> list[int]:
    import pyarrow.parquet as pq

    facts = json.loads(pq.read_schema(path).metadata[b"lightning_convnext_det"])
    return [image_id for image_id, _ in facts["images"]]


@pytest.mark.heavy
def test_prediction_writer__begins_anew_for_another_prediction(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def seen(writer: PredictionWriter, module: Seen, data: DetectionDataModule) -> int:
        predict_files(writer, data, module)
        return len(module.seen)

    folder = tmp_path / "out"
    assert seen(create(folder), Seen(), data_of(photos)) == 8
    assert seen(create(folder), Seen(), data_of(photos)) == 0
    assert "are replaced" not in caplog.text
    others: list[dict[str, object]] = [{"score_thresholds": [0.5, 0.5]}, {"class_names": ["cat", "cow"]}, {}]
    for changes in others:  # stored by convnext-det thresholds, renamed, as before
        caplog.clear()
        module = Seen()
        vars(module).update(changes)
        assert seen(create(folder), module, data_of(photos)) == 8
        assert "4 parts of other weights, settings or images are replaced" in caplog.text
    assert seen(create(folder, formats="parquet,csv", draw=False), Seen(), data_of(photos)) == 8  # other files
    assert not (folder / "voc").exists()
    other = Seen()
    other.weight = torch.nn.Parameter(torch.ones(1))
    assert seen(create(folder, formats="parquet", draw=False), other, data_of(photos)) == 8  # other weights
    (photos / "00 new first one.jpg").write_bytes(sorted(photos.glob("*.jpg"))[0].read_bytes())
    again = Seen()
    again.weight = torch.nn.Parameter(torch.ones(1))
    assert seen(create(folder, formats="parquet", draw=False), again, data_of(photos)) == 9  # other ids
    assert {image_id for path in parts(folder) for image_id in images_of(path)} == {1, 2, 3, 4, 6, 7, 8, 9, 10}
    (photos / "z new last one.jpg").write_bytes((photos / "00 new first one.jpg").read_bytes())
    last = Seen()
    last.weight = torch.nn.Parameter(torch.ones(1))
    assert seen(create(folder, formats="parquet", draw=False), last, data_of(photos)) == 1  # one image more


def test_prediction_writer__its_drawings_are_no_images_to_predict_on(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for times, seen in enumerate([8, 0]):
        module = Seen()
        data = DetectionDataModule(predict=str(photos), predict_recursive=True, batch_size=2, num_workers=0)
        predict_files(create(photos / "out", formats="parquet,crops", score_threshold=0.1), data, module)
        assert len(module.seen) == seen
        assert ("drawings and crops of earlier predictions are skipped" in caplog.text) == bool(times)
    assert len(find_images([f"{photos}/**/*.jpg"])) == 9
    with pytest.raises(DataError, match=r"LCD-P001.*out holds nothing but drawings and crops"):
        find_images([photos / "out"])
    crops = photos / "out" / "crops" / "cat"
    assert find_images([crops]) == sorted(crops.iterdir())  # asked for
    drawing = next((photos / "out").glob("*.jpg"))
    assert find_images([drawing]) == [drawing]


def test_prediction_writer__predicts_a_changed_image_again(photos: Path, tmp_path: Path) -> None:
    predict_files(create(tmp_path / "out", formats="parquet", draw=False), data_of(photos))
    image = sorted(photos.glob("*.jpg"))[6]
    image.write_bytes(sorted(photos.glob("*.jpg"))[0].read_bytes())
    again = Seen()
    predict_files(create(tmp_path / "out", formats="parquet", draw=False), data_of(photos), again)
    assert again.seen == [7, 8]  # those of its part
    assert sorted(i for path in parts(tmp_path / "out") for i in images_of(path)) == [1, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.filterwarnings("ignore:Total length of `ImageLoader` across ranks is zero")
def test_prediction_writer__nothing_is_left_to_do(photos: Path, tmp_path: Path) -> None:
    sorted(photos.glob("*.jpg"))[3].unlink()
    predict_files(create(tmp_path / "out"), data_of(photos))
    before = content(tmp_path / "out")
    idle = Seen()
    predict_files(create(tmp_path / "out"), data_of(photos), idle)
    assert idle.seen == []
    assert content(tmp_path / "out") == before
    assert "yolo/classes.txt" in before


def test_prediction_writer__foreign_parquet_files_stay(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "parquet"
    folder.mkdir(parents=True)
    polars.DataFrame({"mine": [1]}).write_parquet(folder / "mine.parquet")
    polars.DataFrame({"mine": [1]}).write_parquet(folder / "part-mine.parquet")
    predict_files(create(tmp_path / "out", formats="parquet", draw=False), data_of(photos))
    assert {"mine.parquet", "part-mine.parquet"} < {path.name for path in folder.iterdir()}
    predict_files(create(tmp_path / "out", formats="coco", draw=False), data_of(photos))
    assert {"mine.parquet", "part-mine.parquet"} == {path.name for path in folder.iterdir()}


def predict_on_a_rank(folder: str) -> None:
    for name in ("two", "continued"):
        writer = create(Path(folder, name))
        trainer = create_trainer(folder, devices=2, strategy="ddp", callbacks=[writer], enable_checkpointing=False)
        trainer.predict(Seen(), datamodule=data_of(Path(folder, "data", "train")), return_predictions=False)


@pytest.mark.heavy
def test_prediction_writer__two_ranks_equal_one(photos: Path, tmp_path: Path) -> None:
    predict_files(create(tmp_path / "one"), data_of(photos))
    broken = Seen()
    broken.fail_at = 2
    with pytest.raises(RuntimeError, match="power"):
        predict_files(create(tmp_path / "continued"), data_of(photos), broken)
    run_on_two_ranks(predict_on_a_rank, tmp_path / "log", tmp_path)
    for name in ("two", "continued"):
        assert content(tmp_path / name) == content(tmp_path / "one")
        assert rows(tmp_path / name) == rows(tmp_path / "one")
    assert {path.name[:10] for path in parts(tmp_path / "two")} == {"part-00000", "part-00001"}


KILLS = """
import json, os, signal, sys, traceback
from pathlib import Path
from tests.callbacks.test_prediction_formats import create, data_of, predict_files

folder, kills = Path(sys.argv[1]), json.loads(sys.argv[2])

def run(name, kill_at=None):
    # in a process of its own, which kills itself when it touches a file for the n-th time
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = 0
    def watch(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(str(folder / name)):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    try:
        predict_files(create(folder / name), data_of(folder / "data" / "train"))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    (folder / f"{name}.count").write_text(str(count))
    os._exit(0)

assert run("undisturbed") == 0
total = int((folder / "undisturbed.count").read_text())
print("file operations:", total, file=sys.stderr)
for i, shares in enumerate(kills):
    for share in shares:
        run(f"killed{i}", max(1, round(share * total)))  # by SIGKILL, unless fewer files were left to be written
    assert run(f"killed{i}") == 0
"""


def check_kills(kills: list[list[float]], folder: Path) -> None:
    run = run_script(KILLS, folder, json.dumps(kills), timeout=1800)
    assert run.returncode == 0, run.stderr
    for i in range(len(kills)):
        killed = folder / f"killed{i}"
        assert content(killed) == content(folder / "undisturbed"), kills[i]
        assert rows(killed) == rows(folder / "undisturbed"), kills[i]
        assert not list(killed.rglob("*.tmp")), kills[i]


@pytest.mark.heavy
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process forks itself")
def test_prediction_writer__killed_and_started_again_equals_an_undisturbed_one(photos: Path, tmp_path: Path) -> None:
    # as shares of the file operations; the last is killed twice
    check_kills([[0.1], [0.5], [0.9], [1.0], [0.4, 0.3]], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process forks itself")
def test_prediction_writer__killed_at_any_file(photos: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    check_kills([generator.random(size=generator.integers(1, 4)).tolist() for _ in range(60)], tmp_path)
