import json
import os
import signal
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from lightning_convnext_det.data.annotations import DetectionAnnotations, Split
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.formats import cache
from lightning_convnext_det.data.formats.cache import (
    cache_folder,
    load_annotations,
    read_cached_split,
    save_annotations,
)
from lightning_convnext_det.data.formats.discovery import find_splits, read_split
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from tests.processes import run_script


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Split:
    monkeypatch.setattr(cache, "LEAST_BYTES", 1)
    return find_splits(write_synthetic_coco(tmp_path / "shapes", num_train=6, num_val=2))["train"]


def test_cache_folder__of_a_user_without_a_home_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder("auto") is None
    assert cache_folder("here") == Path("here")


def assert_same(one: DetectionAnnotations, other: DetectionAnnotations) -> None:
    for field in fields(DetectionAnnotations):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs, field.name


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


def test_read_cached_split__second_time_from_the_cache(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_cached_split(split, tmp_path / "cache", exif="auto")
    monkeypatch.setattr(cache, "read_split", None)  # would fail if it was called
    second = read_cached_split(split, tmp_path / "cache", exif="auto")
    assert_same(second, read_split(split, exif="auto"))
    assert_same(second, first)
    assert not second.boxes.flags.writeable
    assert len(files_of(tmp_path / "cache")) == 1


def test_read_cached_split__problems_are_kept(split: Split, tmp_path: Path) -> None:
    content = json.loads(split.annotations[0].read_text())
    content["annotations"][0]["bbox"] = [3, 3, 0, 4]
    split.annotations[0].write_text(json.dumps(content))
    first = read_cached_split(split, tmp_path / "cache")
    assert [problem.code for problem in first.problems] == ["LCD-D101"]
    assert_same(read_cached_split(split, tmp_path / "cache"), first)


def test_read_cached_split__other_content_options_or_images(split: Split, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    before = read_cached_split(split, folder)
    assert len(read_cached_split(split, folder, class_names=before.class_names[::-1])) == 6
    assert len(files_of(folder)) == 2
    content = json.loads(split.annotations[0].read_text())
    content["annotations"].pop()
    split.annotations[0].write_text(json.dumps(content))
    assert len(read_cached_split(split, folder).boxes) == len(before.boxes) - 1
    assert len(files_of(folder)) == 3
    os.utime(before.image_root, ns=(1, 1))  # as of an image that was removed and another one put there
    image = before.path(0)
    image.rename(image.with_suffix(".gone"))
    assert len(read_cached_split(split, folder, invalid_annotations="drop")) == 5


def test_read_cached_split__of_a_changed_image_folder_is_read_anew(split: Split, tmp_path: Path) -> None:
    before = read_cached_split(split, tmp_path / "cache", invalid_annotations="drop")
    os.unlink(before.path(0))
    os.utime(before.image_root, ns=(5, 5))  # a file system may not tell changes within some milliseconds
    assert len(read_cached_split(split, tmp_path / "cache", invalid_annotations="drop")) == len(before) - 1
    assert len(files_of(tmp_path / "cache")) == 1


def test_read_cached_split__refused_annotations_are_not_cached(split: Split, tmp_path: Path) -> None:
    content = json.loads(split.annotations[0].read_text())
    content["annotations"][0]["category_id"] = 99
    split.annotations[0].write_text(json.dumps(content))
    for _ in range(2):
        with pytest.raises(Exception, match="99"):
            read_cached_split(split, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_read_cached_split__small_files_and_a_folder_that_cannot_be_written(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert len(read_cached_split(split, tmp_path / "file" / "cache")) == 6
    monkeypatch.undo()
    assert len(read_cached_split(split, tmp_path / "cache")) == 6
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_load_annotations__incomplete(split: Split, tmp_path: Path, share: float) -> None:
    annotations = read_split(split)
    path = tmp_path / "one.annotations"
    save_annotations(annotations, path, annotations.image_root.stat().st_mtime_ns)
    assert load_annotations(path) is not None
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert load_annotations(path) is None


def test_load_annotations__without_objects(split: Split, tmp_path: Path) -> None:
    content = json.loads(split.annotations[0].read_text())
    content["annotations"] = []
    split.annotations[0].write_text(json.dumps(content))
    first = read_cached_split(split, tmp_path / "cache")
    assert_same(read_cached_split(split, tmp_path / "cache"), first)
    assert load_annotations(tmp_path / "absent") is None


def test_read_cached_split__removes_what_nobody_used(split: Split, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    ages = {"old.annotations": 90, "recent.annotations": 9, "killed.part": 2, "being_written.part": 0, "mine.txt": 900}
    for name, days in ages.items():
        (folder / name).write_text("")
        os.utime(folder / name, (time.time() - 86400 * days,) * 2)
    read_cached_split(split, folder)
    left = {path.name for path in files_of(folder)}
    assert {"recent.annotations", "being_written.part", "mine.txt"} < left
    assert len(left) == 4


def test_cache_folder__choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "lightning-convnext-det"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("auto") == Path.home() / ".cache" / "lightning-convnext-det"
    assert cache_folder("none") is None


def test_datamodule__cache(split: Split, tmp_path: Path) -> None:
    for _ in range(2):
        data = DetectionDataModule(str(split.root), num_workers=0, batch_size=2, cache=str(tmp_path / "cache"))
        data.setup("fit")
        images, targets = next(iter(data.train_dataloader()))
        assert len(images) == len(targets) == 2
    assert len(files_of(tmp_path / "cache")) == 2  # train and val


_KILLED = """
import os, sys
from pathlib import Path
from lightning_convnext_det.data.formats import cache
from lightning_convnext_det.data.formats.discovery import find_splits
cache.LEAST_BYTES = 1
real, left = os.{call}, [{count}]
def dying(*arguments):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), 9)
    return real(*arguments)
os.{call} = dying
cache.read_cached_split(find_splits(sys.argv[1])["train"], Path(sys.argv[2]))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_read_cached_split__killed_while_it_writes(split: Split, tmp_path: Path, call: str) -> None:
    """The next start is right, whatever the last one left."""
    killed = run_script(_KILLED.format(call=call, count=1), split.root, tmp_path / "cache")
    assert killed.returncode == -signal.SIGKILL
    assert [path.suffix for path in files_of(tmp_path / "cache")] == [".part"]
    first = read_cached_split(split, tmp_path / "cache")
    assert_same(first, read_split(split))
    assert_same(read_cached_split(split, tmp_path / "cache"), first)
