from pathlib import Path

import pytest

from lightning_convnext_det.data.io.listing import (
    first_images,
    folder_names,
    has_images,
    list_names,
    walk_images,
)

FILES = [
    "b.jpg",
    "a.PNG",
    "note.txt",
    "c/z.jpg",
    "c/d/y.jpg",
    "a.d/x.jpg",
    ".hidden/w.jpg",
    "._a.jpg",
    "e.xml",
    "f.XML",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "v.jpg").touch()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "other")
    return tmp_path / "set"


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 50])
def test_first_images__are_those_of_the_walk(folder: Path, count: int) -> None:
    every = walk_images([folder])
    names = ["a.PNG", "a.d/x.jpg", "b.jpg", "c/d/y.jpg", "c/z.jpg", "link/v.jpg"]
    assert every == [folder / name for name in names]
    assert first_images(folder, count) == every[:count]


def test_folder_names__also_links_and_nothing_hidden(folder: Path) -> None:
    assert folder_names(folder) == ["a.d", "c", "link"]
    assert folder_names(folder / "nowhere") == []


def test_has_images__in_the_folder_itself(folder: Path) -> None:
    assert has_images(folder)
    assert has_images(folder / "link")
    assert not has_images(folder.parent)
    assert not has_images(folder / "nowhere")


def test_list_names__by_suffix(folder: Path) -> None:
    assert list_names(folder, ".xml") == ["e.xml", "f.XML"]
    assert list_names(folder, (".xml", ".txt")) == ["e.xml", "f.XML", "note.txt"]
