"""Windows, test-time augmentation and ensembles on the command line."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_convnext_det import FasterRCNN
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.io import regions
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.io.reader import ImageReader
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.models.fused import FusedDetector, augment_detector
from lightning_convnext_det.models.tiling import TiledDetector
from lightning_convnext_det.modules import load_module
from lightning_convnext_det.modules.registry import save_module
from tests.training import create_module

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.num_workers=0",
    "--output.draw=false",
]
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_coco(tmp_path_factory.mktemp("data"), 1, 1, 2)


@pytest.fixture(scope="module")
def checkpoints(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two detectors of the dataset's classes, and one of others."""
    folder, names = tmp_path_factory.mktemp("checkpoints"), ["disc", "ring", "square", "triangle", "star"]
    paths = []
    for i, classes in enumerate((names, names, [*names[:4], "comet"])):
        torch.manual_seed(i)
        module = create_module(5, class_names=classes, category_ids=[1, 2, 3, 4, 5], score_threshold=0.0)
        paths.append(folder / f"{i}.ckpt")
        save_module(module, paths[-1])
    return paths


def predict(checkpoint: Path, dataset: Path, folder: Path, *options: str) -> list[dict[str, object]]:
    """The records of ``predictions.json``."""
    given = [f"--ckpt_path={checkpoint}", f"--data.predict={dataset / 'test'}", f"--output.folder={folder}"]
    assert main(["predict", *given, *QUIET, *options]) == 0
    return json.loads((folder / "predictions.json").read_text())


def test_predict__tiles_larger_than_the_images_change_nothing(
    checkpoints: list[Path], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = predict(checkpoints[0], dataset, tmp_path / "plain", "--tile_merge=wbf")
    assert "--tile_merge wbf has no effect without --tiles" in capsys.readouterr().err
    assert len(plain) > 10
    assert predict(checkpoints[0], dataset, tmp_path / "tiled", "--tiles=4000") == plain


def test_predict__tiles_views_and_ensemble_are_those_of_python(
    checkpoints: list[Path], dataset: Path, tmp_path: Path
) -> None:
    options = ["--tiles=200", "--tile_overlap=0.3", "--tile_merge=wbf", "--tta=flip", f"--ensemble={checkpoints[1]}"]
    found = predict(checkpoints[0], dataset, tmp_path, *options, "--data.batch_size=1")
    members = FusedDetector([load_module(path).detector for path in checkpoints[:2]])
    detector = augment_detector(members, 200, 0.3, "wbf", "flip", batch_size=1)
    files = sorted((dataset / "test").iterdir())
    with torch.no_grad():
        expected = [detector([read_image(file)])[0] for file in files]
    scores = sorted(record["score"] for record in found)
    assert scores == pytest.approx(sorted(torch.cat([d["scores"] for d in expected]).tolist()), abs=1e-5)


def test_predict__windows_of_a_tiff_are_read_from_the_file(
    checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rasterio")
    monkeypatch.setattr(regions, "_DRAWN_SIDE", 400)
    pixels = torch.randint(0, 256, (17, 20, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    image = Image.fromarray(pixels.numpy()).resize((600, 510))
    options = ["--tiles=400", "--output.draw=true", "--output.formats=coco,crops", "--output.score_threshold=0.0"]
    found, read = {}, ImageReader.__call__

    def read_small(self: ImageReader, path: str) -> Tensor:
        assert "large" not in path
        return read(self, path)

    for suffix in ("png", "tif"):
        folder = tmp_path / suffix
        folder.mkdir()
        image.save(folder / f"large.{suffix}")
        image.crop((0, 0, 200, 256)).save(folder / f"small.{suffix}")  # no larger than a window: decoded as a whole
        given = [f"--ckpt_path={checkpoints[0]}", f"--data.predict={folder}", f"--output.folder={folder / 'out'}"]
        if suffix == "tif":
            monkeypatch.setattr(ImageReader, "__call__", read_small)
        assert main(["predict", *given, *QUIET, *options]) == 0
        records = json.loads((folder / "out" / "predictions.json").read_text())
        found[suffix] = [{**record, "file_name": Path(record["file_name"]).stem} for record in records]
    assert len(found["png"]) > 100
    assert found["tif"] == found["png"]
    drawings = [read_image(tmp_path / suffix / "out" / "large.png") for suffix in ("png", "tif")]
    assert [tuple(drawing.shape) for drawing in drawings] == [(3, 510, 600), (3, 340, 400)]
    crops = [sorted((tmp_path / suffix / "out" / "crops").rglob("*.png")) for suffix in ("png", "tif")]
    assert [len(of_suffix) for of_suffix in crops] == [len(found["png"])] * 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*crops, strict=True))


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_fit__trains_on_windows_and_validates_in_whole_images(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: dict[str, set[tuple[int, ...]]] = {"training": set(), "validation": set()}
    train, evaluate = FasterRCNN.forward, TiledDetector.forward

    def record_training(self: FasterRCNN, images: list[Tensor], targets: object = None) -> object:
        if self.training:
            shapes["training"] |= {tuple(image.shape[-2:]) for image in images}
        return train(self, images, targets)

    def record_evaluation(self: TiledDetector, images: list[Tensor]) -> object:
        assert self.tile == 96
        shapes["validation"] |= {tuple(image.shape[-2:]) for image in images}
        return evaluate(self, images)

    monkeypatch.setattr(FasterRCNN, "forward", record_training)
    monkeypatch.setattr(TiledDetector, "forward", record_evaluation)
    options = [f"--data.root={dataset}", *QUIET[:3], "--tiles=96", "--trainer.num_sanity_val_steps=0"]
    network = [
        "--model=lightning_convnext_det.FasterRCNNModule",
        "--model.backbone=test_convnext",
        "--model.pretrained_backbone=false",
        "--model.fpn_channels=32",
        "--model.box_head_features=64",
    ]
    network += ["--model.min_size=64", "--model.max_size=96", "--model.score_threshold=0.0", "--plan=false"]
    run = ["--data.train_transforms=tiles", "--trainer.max_epochs=1", "--data.batch_size=1", "--seed_everything=1"]
    folders = [tmp_path / "fit", tmp_path / "validate"]
    roots = [f"--trainer.default_root_dir={folder}" for folder in folders]
    assert main(["fit", *options, *network, *run, roots[0], "--report=false"]) == 0
    sizes = {tuple(read_image(file).shape[-2:]) for file in (dataset / "val").iterdir()}
    assert shapes == {"training": {(96, 96)}, "validation": sizes}
    (checkpoint,) = folders[0].rglob("last.ckpt")
    assert main(["validate", *options, f"--ckpt_path={checkpoint}", roots[1]]) == 0
    fitted, validated = (_last_metrics(folder) for folder in folders)
    assert float(fitted["val/map"]) > 0
    assert fitted == validated


def _last_metrics(folder: Path) -> dict[str, str]:
    (file,) = folder.rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    return {key: value for row in rows for key, value in row.items() if key.startswith("val/") and value}


def test_test__metrics_with_tiles_are_of_whole_images(
    checkpoints: list[Path], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--data.root", str(dataset), "--trainer.default_root_dir", str(tmp_path), f"--ckpt_path={checkpoints[0]}"]
    assert main(["test", *root, *QUIET[:3], "--tiles=200", "--tta=scales=0.5:1.0"]) == 0
    assert "test/map_50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--tta=flop"], 2, "tta is 'flop'; give 'flip'"),
        (["--tiles=0"], 2, "tile is 0; it must be at least 1"),
        (["--tile_overlap=1", "--tiles=9"], 2, "overlap is 1.0; it must be at least 0 and below 1"),
        (["--tile_merge=max", "--tiles=9"], 2, "tile_merge"),
        (["--ensemble=OTHER"], 6, "has the classes disc, ring, square, triangle, comet, the ensemble has disc"),
    ],
    ids=["tta", "tiles", "overlap", "merge", "ensemble"],
)
def test_predict__a_mistake_ends_in_one_line(
    options: list[str], status: int, message: str, checkpoints: list[Path], dataset: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [f"--ckpt_path={checkpoints[0]}", f"--data.predict={dataset / 'test'}", f"--output.folder={tmp_path}"]
    options = [option.replace("OTHER", str(checkpoints[2])) for option in options]
    try:
        found = main(["predict", *given, *QUIET, *options])
    except SystemExit as error:  # of the parser
        found = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert (found, message in lines[-1]) == (status, True), lines


def test_fit__refuses_views(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--data.root", str(dataset), "--trainer.default_root_dir", str(tmp_path), "--model.backbone=test_convnext"]
    root.append("--model.pretrained_backbone=false")
    assert main(["fit", *root, *QUIET[:3], "--tta=flip"]) == 2
    assert "--tta is for validate, test and predict" in capsys.readouterr().err
