"""Folders, lists, videos, iterators, windows and views in `Predictor`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_convnext_det.data.io.pixels import Channels
from lightning_convnext_det.errors import ArgumentError, DataError
from lightning_convnext_det.inference.images import PixelFormat, read_source
from lightning_convnext_det.inference.predictor import Predictor
from lightning_convnext_det.inference.sources import LONG, list_sources, progress_bar
from lightning_convnext_det.models.fused import FusedDetector
from lightning_convnext_det.modules.registry import save_module
from tests.data.io.test_video import write_video
from tests.models.color_detector import ColorDetector, draw
from tests.training import create_module


def save(image: Tensor, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images with 1, 2 and 3 objects, the third in a folder below, and one that is damaged."""
    boxes = [(2, 3, 10, 12), (20, 20, 33, 30), (12, 2, 19, 9)]
    for i, name in enumerate(("a.png", "b.png", "below/c.png"), 1):
        save(draw(40, 50, boxes[:i]), tmp_path / "photos" / name)
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(ColorDetector(), ["background", "thing"], batch_size=2)


def test_predictor__a_list_takes_folders_and_leaves_out_what_cannot_be_read(
    folder: Path, predictor: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    assert [len(found) for found in predictor([folder])] == [1, 2]
    assert "bad.png" in caplog.text
    found = predictor([folder / "*.png", torch.zeros(3, 20, 20, dtype=torch.uint8), str(folder / "below" / "c.png")])
    assert [len(one) for one in found] == [1, 2, 0, 3]
    assert [Path(str(one.image)).name for one in (found[0], found[1], found[3])] == ["a.png", "b.png", "c.png"]


def test_stream__below_folders_and_from_lists(folder: Path, predictor: Predictor, tmp_path: Path) -> None:
    assert [len(found) for found in predictor.stream(folder, recursive=True)] == [1, 2, 3]
    (tmp_path / "list.txt").write_text("photos/b.png\nphotos/below/*.png\n")
    assert [len(found) for found in predictor.stream(tmp_path / "list.txt")] == [2, 3]
    (tmp_path / "list.txt").rename(folder.rename(tmp_path / "photos [1]") / "list.txt")
    (tmp_path / "photos [1]" / "list.txt").write_text("b*.png\nbelow/c.png\n")
    assert [len(found) for found in predictor.stream(tmp_path / "photos [1]" / "list.txt")] == [2, 3]


def test_stream__takes_only_the_images_of_a_batch_from_an_iterator(predictor: Predictor) -> None:
    taken = []

    def images() -> object:
        for i in range(7):
            taken.append(i)
            yield draw(30, 30, [(2, 2, 9, 9)] * (i % 2))

    found = predictor.stream(images())
    assert taken == []
    assert len(next(found)) == 0
    assert taken == [0, 1]
    assert [len(one) for one in found] == [1, 0, 1, 0, 1, 0]


@pytest.mark.heavy
def test_stream__frames_of_a_video(predictor: Predictor, tmp_path: Path) -> None:
    pytest.importorskip("av")
    video = write_video(tmp_path / "clip.mp4")
    found = list(predictor.stream(video))
    assert [str(one.image) for one in found] == [f"{video}#{i:06d}" for i in range(5)]
    assert {one.image_size for one in found} == {(48, 64)}
    assert found[3].plot().size[0] >= 64  # reads the frame again
    assert predictor(f"{video}#000002").image_size == (48, 64)


def test_stream__goes_on_after_damaged_frames(
    predictor: Predictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("av")
    video = write_video(tmp_path / "clip.mp4", damaged=[1, 2])
    assert [str(one.image)[-1] for one in predictor.stream(video)] == ["0", "3", "4"]
    assert caplog.text.count("frames 1 to 2 are damaged") == 1
    assert "2 of 5 images could not be read and were skipped" in caplog.text


@pytest.mark.parametrize("channels", [1, 4])
def test_read_source__frames_have_the_channels_of_the_detector(channels: Channels, tmp_path: Path) -> None:
    pytest.importorskip("av")
    frame = f"{write_video(tmp_path / 'clip.mp4')}#000002"
    assert read_source(frame, "it", pixel_format=PixelFormat(channels)).shape == (channels, 48, 64)


def test_stream__any_iterable(predictor: Predictor) -> None:
    images = {i: torch.zeros(3, 20, 20, dtype=torch.uint8) for i in range(3)}
    assert [len(found) for found in predictor.stream(images.values())] == [0, 0, 0]
    with pytest.raises(TypeError, match="the image is of type bytes"):
        list(predictor.stream(b"photo.jpg"))


@pytest.mark.parametrize("name", ["photos", "photos/*.png", "photos/none/*.jpg", "clip.mp4", "list.txt"])
def test_predictor__a_single_path_of_several_images_is_refused(
    name: str, folder: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ArgumentError, match=r"is no single image; give a list, predictor\(\[.*\]\)"):
        predictor(name)


def test_predictor__an_image_that_is_given_must_be_readable(folder: Path, predictor: Predictor) -> None:
    for given in (folder / "bad.png", [folder / "a.png", folder / "bad.png"]):
        with pytest.raises(DataError, match=r"LCD-I001.*bad\.png"):
            predictor(given)
    (folder / "below" / "c.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"LCD-P002.*none of 1 images"):
        predictor([folder / "below"])
    with pytest.raises(DataError, match=r"LCD-P001.*holds no images"):
        list(predictor.stream([folder.parent]))


def test_progress_bar__only_for_many_images_and_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    sources = list_sources([np.zeros((4, 4, 3), np.uint8)] * (LONG + 1))
    with progress_bar(sources, shown=True) as bar:
        bar.advance(bar.task_ids[0])
    assert capsys.readouterr() == ("", "")  # standard error is no terminal here


def test_progress_bar__counts_what_is_done(monkeypatch: pytest.MonkeyPatch, predictor: Predictor) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * (LONG + 1)
    assert len(predictor(images)) == LONG + 1
    with progress_bar(list_sources(images), shown=True) as bar:
        bar.advance(bar.task_ids[0], 5)
        assert (bar.disable, bar.tasks[0].completed, bar.tasks[0].total) == (False, 5, LONG + 1)
    with progress_bar(list_sources(images[:2]), shown=True) as bar:
        assert bar.disable


# ---- windows, views, ensembles


def test_predictor__tiles_find_small_objects_of_a_large_image() -> None:
    boxes = [(160 * i + 60, 30, 160 * i + 72, 42) for i in range(5)]
    image, detector = draw(200, 800, boxes), ColorDetector(side=100, smallest=4)
    assert len(Predictor(detector, ["background", "thing"])(image)) == 0
    found = Predictor(detector, ["background", "thing"], tiles=150, tile_overlap=0.3, tile_merge="nms")(image)
    assert sorted(found.boxes.int().tolist()) == [list(box) for box in boxes]


@pytest.mark.heavy
def test_from_checkpoint__several_are_an_ensemble(tmp_path: Path) -> None:
    image, paths, modules = torch.randint(256, (3, 80, 90), dtype=torch.uint8), [], []
    for seed in range(3):
        torch.manual_seed(seed)
        modules.append(create_module(2, class_names=["cat", "dog" if seed < 2 else "emu"], score_threshold=0.0).eval())
        paths.append(tmp_path / f"{seed}.ckpt")
        save_module(modules[-1], paths[-1])
    predictor = Predictor.from_checkpoint(paths[:2], device="cpu", tta="flip", nms="none")
    found = predictor(image)
    assert isinstance(predictor.detector, FusedDetector)
    assert [member.nms for member in predictor.detector.detectors] == ["hard", "hard"]  # given back
    fused = Predictor(
        FusedDetector([module.detector for module in modules[:2]]), ["cat", "dog"], tta="flip", nms="none"
    )
    assert torch.equal(found.boxes, fused(image).boxes)
    with pytest.raises(ValueError, match=r"LCD-K022.*2\.ckpt has the classes cat, emu, the ensemble has cat, dog"):
        Predictor.from_checkpoint(paths)
    with pytest.raises(ValueError, match="thresholds are not those of fused scores"):
        Predictor.from_checkpoint(paths[:2], score_threshold="best")
    save_module(create_module(2, class_names=["cat", "dog"], in_chans=1), paths[2])
    with pytest.raises(ValueError, match=r"LCD-K022.*2\.ckpt takes images of 1 channels, the ensemble of 3"):
        Predictor.from_checkpoint(paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tta": "flop"}, "tta is 'flop'; give 'flip'"),
        ({"tiles": 0}, "tiles is 0; it must be at least 1"),
        ({"tile_overlap": 1.0}, r"tile_overlap is 1\.0; it must be at least 0 and below 1"),
        ({"tile_merge": "max"}, "tile_merge is 'max'; choose nmm, nms or wbf"),
        ({"tta": "scales=2"}, "ColorDetector has no ImageTransform"),
    ],
)
def test_predictor__refuses_windows_and_views_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(ColorDetector(), ["background", "thing"], **options)
