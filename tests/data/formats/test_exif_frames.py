import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_convnext_det.data.formats.discovery import find_splits, read_split
from lightning_convnext_det.errors import DataError
from tests.data.reading import Annotate, WriteCoco, found, read


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../../secret.png", "leads out of the root"),
        ("a/../../../b.png", "leads out of the root"),
        ("/etc/hosts", "is absolute"),
        ("C:\\a.png", "is absolute"),
        ("..\\..\\a.png", "leads out of the root"),
        ("a\0.png", "holds bytes that no UTF-8 file name has"),
        ("\ud800.png", "holds bytes that no UTF-8 file name has"),
        ("", "names no file"),
        (".", "names no file"),
        ("http://host/a.png", "is an address"),
    ],
)
def test_resolve_frames__paths_out_of_the_root(write_coco: WriteCoco, tmp_path: Path, name: str, reason: str) -> None:
    path = write_coco(images=[{"id": 1, "file_name": name, "height": 48, "width": 64}])

    with pytest.raises(DataError, match=r"\[LCD-S001\] annotations/instances_train.json: image 1: file name ") as error:
        read(path, collect=False)
    assert repr(name) in str(error.value)
    assert reason in str(error.value)


def test_resolve_frames__dots_that_stay_inside(write_coco: WriteCoco) -> None:
    path = write_coco(images=[{"id": 1, "file_name": "../train/1.png", "height": 48, "width": 64}])

    assert len(read(path, collect=False)) == 1


def test_resolve_frames__links(write_coco: WriteCoco, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_coco()
    image = path.parents[1] / "train" / "1.png"
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "1.png"
    image.rename(elsewhere)
    image.symlink_to(elsewhere)

    assert len(read(path, collect=False)) == 1
    with pytest.raises(DataError, match=r"\[LCD-S001\].*'1.png' is a link out of .*follow_symlinks is off"):
        read(path, collect=False, follow_symlinks=False)


def test_resolve_frames__missing_image(write_coco: WriteCoco, annotate: Annotate) -> None:
    images = [
        {"id": i, "file_name": name, "height": 48, "width": 64} for i, name in enumerate(["1.png", "x.png", "1.PNG"])
    ]
    path = write_coco([annotate([1, 1, 5, 5], i, image_id=i) for i in range(3)], images)
    table = read(path)

    assert [(p.code, p.file, p.action) for p in table.problems] == [
        ("LCD-I003", "train/x.png", "refused"),
        ("LCD-I003", "train/1.PNG", "refused"),
    ]
    assert "is '1.png' meant?" in table.problems[1].reason
    assert "meant" not in table.problems[0].reason
    dropped = read(path, invalid_annotations="drop", collect=False)
    assert (len(dropped), dropped.annotation_ids.tolist()) == (1, [0])


@pytest.mark.parametrize(("content", "code"), [(b"", "LCD-I001"), (b"<html>", "LCD-I001")], ids=["empty_file", "html"])
def test_resolve_frames__unreadable_image(write_coco: WriteCoco, content: bytes, code: str) -> None:
    path = write_coco(num_images=2)
    (path.parents[1] / "train" / "2.png").write_bytes(content)

    with pytest.raises(DataError, match=rf"\[{code}\] train/2.png: not an image"):
        read(path, collect=False)


def test_resolve_frames__size_differs(write_coco: WriteCoco) -> None:
    path = write_coco(images=[{"id": 1, "file_name": "1.png", "height": 64, "width": 48}])

    with pytest.raises(DataError, match=r"\[LCD-I020\] train/1.png: the image is 64x48, the annotation says 48x64"):
        read(path, collect=False)


def test_resolve_frames__size_missing_is_read_from_the_image(write_coco: WriteCoco, annotate: Annotate) -> None:
    table = read(write_coco([annotate([60, 1, 9, 9])], images=[{"id": 1, "file_name": "1.png"}]))

    assert table.sizes.tolist() == [[48, 64]]
    assert table.boxes.tolist() == [[60, 1, 64, 10]]


def test_resolve_frames__without_looking_at_images(write_coco: WriteCoco) -> None:
    path = write_coco(images=[{"id": 1, "file_name": "none.png", "height": 48, "width": 64}])

    assert len(read(path, check_images=False, collect=False)) == 1


@pytest.mark.parametrize("frame", ["raw", "upright"])
def test_resolve_frames__exif_of_real_images(shared_data: Path, frame: str) -> None:
    """The sizes of the turned images also tell about the flipped ones, whose size says nothing."""
    table = read_split(find_splits(shared_data / "quirks" / "exif")[frame])

    assert table.upright.tolist() == [False] * 2 + [frame == "upright"] * 7
    stated = json.loads((shared_data / "quirks" / "exif" / f"instances_{frame}.json").read_text())
    assert table.sizes.tolist() == [[image["height"], image["width"]] for image in stated["images"]]
    assert found(table) == [("LCD-I025", "noted")] * 3
    if frame == "upright":
        assert len(np.unique(table.boxes, axis=0)) == 1  # one person, photographed once


EXIF = [
    ("stored_size", (64, 48), 6, "auto", False, ["LCD-I026"]),  # no box tells that it is not the upright image
    ("stored_size_raw", (64, 48), 6, "raw", False, []),
    ("upright_size", (48, 64), 6, "auto", True, []),
    ("no_size", None, 6, "auto", None, ["LCD-I024"]),
    ("no_size_upright", None, 6, "upright", True, []),
    ("no_size_raw", None, 6, "raw", False, []),
    ("other_size", (50, 50), 6, "auto", None, ["LCD-I020"]),
    ("upright_with_stored_size", (64, 48), 6, "upright", True, []),
    ("raw_against_upright_size", (48, 64), 6, "raw", None, ["LCD-I020"]),
    ("half_turn", (64, 48), 3, "auto", False, ["LCD-I025"]),
    ("half_turn_upright", (64, 48), 3, "upright", True, []),
    ("not_turned", (64, 48), 1, "upright", False, []),
]


@pytest.mark.parametrize(
    ("size", "orientation", "exif", "upright", "codes"), [row[1:] for row in EXIF], ids=[row[0] for row in EXIF]
)
def test_resolve_frames__exif(
    write_coco: WriteCoco,
    write_image: Callable[..., Path],
    size: tuple[int, int] | None,
    orientation: int,
    exif: str,
    upright: bool | None,
    codes: list[str],
) -> None:
    """An image stored with 64 rows and 48 columns."""
    image = {"id": 1, "file_name": "1.png"} | ({} if size is None else {"height": size[0], "width": size[1]})
    path = write_coco(images=[image])
    write_image(path.parents[1] / "train" / "1.png", 64, 48, orientation)
    table = read(path, exif=exif)

    assert [code for code, _ in found(table) if code != "LCD-D109"] == codes
    assert table.upright.tolist() == ([] if upright is None else [upright])
    if upright is not None:
        assert table.sizes.tolist() == [[48, 64] if upright and orientation == 6 else [64, 48]]


def test_resolve_frames__half_turn_among_images_of_both_frames(
    write_coco: WriteCoco, write_image: Callable[..., Path]
) -> None:
    sizes = [(64, 48), (48, 64), (64, 48)]
    images = [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(sizes, 1)]
    path = write_coco(images=images)
    for number, orientation in enumerate((6, 6, 3), 1):
        write_image(path.parents[1] / "train" / f"{number}.png", 64, 48, orientation)

    with pytest.raises(DataError, match=r"\[LCD-I025\] train/3.png: EXIF orientation 3.*exif: upright or exif: raw"):
        read(path, collect=False)
