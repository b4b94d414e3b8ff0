import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_convnext_det.data.io.inputs import find_images, names_one_image
from lightning_convnext_det.data.io.video import FrameReader, count_frames, frame_name, parse_frame_name
from lightning_convnext_det.errors import DataError

av = pytest.importorskip("av")
COLORS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10), (20, 20, 20)]


def write_video(
    path: Path, width: int = 64, height: int = 48, damaged: Sequence[int] = (), cut: float = 1, hidden: int = 0
) -> Path:
    """Frames of one colour each, with a white upper half.

    Some are damaged, the first ones hidden by an edit list, and the file is cut to a share of its length.
    """
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 1  # no frame depends on another
        for color in COLORS:
            pixels = np.empty((height, width, 3), np.uint8)
            pixels[:] = color
            pixels[: height // 2] = 255
            packets = stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
            container.mux([_earlier(packet, hidden) for packet in packets])
        container.mux([_earlier(packet, hidden) for packet in stream.encode()])
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for position, size in (places[i] for i in damaged):
        content[position : position + size] = b"\xa5" * size
    path.write_bytes(content[: int(cut * len(content))])
    return path


def _earlier(packet: "av.Packet", steps: int) -> "av.Packet":
    packet.pts, packet.dts = packet.pts - steps, packet.dts - steps
    return packet


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "a clip.mp4")


def color_of(image: Tensor) -> int:
    """The number of the frame whose colour the lower half has."""
    mean = image[:, 36:44, 8:56].float().mean((1, 2))
    return int((torch.tensor(COLORS) - mean).abs().sum(1).argmin())


def test_count_frames__of_a_video(video: Path) -> None:
    assert count_frames(video) == len(COLORS)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 2, 3, 0], [3]])
def test_frame_reader__in_any_order(video: Path, order: list[int]) -> None:
    reader = FrameReader()
    images = [reader.read(video, index) for index in order]
    assert [color_of(image) for image in images] == order
    assert {(image.shape, image.dtype) for image in images} == {((3, 48, 64), torch.uint8)}
    assert images[0][:, 4:20].float().mean() > 240


def test_frame_reader__channels(video: Path) -> None:
    grey, rgba = (FrameReader().read(video, 1, channels) for channels in (1, 4))
    assert (grey.shape, rgba.shape) == ((1, 48, 64), (4, 48, 64))
    assert int(rgba[3].min()) == 255


def test_frame_reader__begins_anew_in_a_worker(video: Path) -> None:
    reader = FrameReader()
    reader.read(video, 3)
    assert color_of(pickle.loads(pickle.dumps(reader)).read(video, 1)) == 1


@pytest.mark.parametrize(
    ("content", "index", "message"),
    [
        (b"no video", 0, r"LCD-I040.*not a video that can be read"),
        (None, 5, r"LCD-I041.*has no frame 5; it ends after 5"),
        (b"", 0, "LCD-I040"),
    ],
    ids=["other", "end", "empty"],
)
def test_frame_reader__bad_files(video: Path, content: bytes | None, index: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(video.read_bytes() if content is None else content)
    with pytest.raises(DataError, match=message):
        FrameReader().read(path, index)


@pytest.mark.parametrize(
    ("damaged", "part"),
    [([2], "frame 2 is"), ([0, 1], "frames 0 to 1 are"), ([3], "frame 3 is"), ([3, 4], "frames 3 to 4 are")],
)
def test_frame_reader__goes_on_after_damaged_frames(damaged: list[int], part: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", damaged=damaged)
    reader = FrameReader()
    for index in [0, 1, 2, 3, 4, 1, 3]:
        if index not in damaged:
            assert color_of(reader.read(path, index)) == index
            continue
        with pytest.raises(DataError, match=rf"LCD-I040.*clip.mp4: {part} damaged and cannot be decoded"):
            reader.read(path, index)
    with pytest.raises(DataError, match=r"LCD-I041.*has no frame 5; it ends after 5"):
        reader.read(path, 5)


def test_frame_reader__frames_before_an_edit_do_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_video(tmp_path / "clip.mp4", hidden=2)
    assert count_frames(path) == 3
    reader = FrameReader()
    assert [color_of(reader.read(path, index)) for index in range(3)] == [2, 3, 4]
    assert caplog.text == ""


def test_frame_reader__too_many_pixels(video: Path) -> None:
    with pytest.raises(DataError, match=r"LCD-I023.*64x48 is more than max_pixels = 100"):
        FrameReader().read(video, 0, max_pixels=100)


def test_frame_reader__without_pyav(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(DataError, match=r"LCD-P004.*pip install 'lightning-convnext-det\[video\]'"):
        count_frames(video)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/clip.mp4#000007", ("a/clip.mp4", 7)),
        ("clip.MOV#1234567", ("clip.MOV", 1234567)),
        ("photo.jpg#000007", None),
        ("clip.mp4", None),
        ("clip.mp4#7", None),
    ],
)
def test_parse_frame_name__reads_what_frame_name_writes(name: str, expected: tuple[str, int] | None) -> None:
    assert parse_frame_name(name) == expected
    if expected:
        assert frame_name(*expected) == name


# ---- find_images


def test_find_images__names_videos_that_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = write_video(tmp_path / "cut.mp4", cut=0.8)
    (tmp_path / "script.ts").write_text("let a = 1")
    (tmp_path / "photo.jpg").touch()
    found = find_images([tmp_path], videos=True)
    assert 1 < len(found) < 6
    assert tmp_path / "photo.jpg" in found
    assert f"{cut}: cut short, it ends in frame {len(found) - 2}" in caplog.text
    assert f"skipped: [LCD-I040] {tmp_path / 'script.ts'}: not a video" in caplog.text
    with pytest.raises(DataError, match=r"script\.ts: not a video"):
        find_images([tmp_path / "script.ts"], videos=True)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    assert find_images([tmp_path], videos=True) == [tmp_path / "photo.jpg"]
    assert "skipped: [LCD-P004] reading videos needs PyAV" in caplog.text


def test_find_images__frames_of_videos(video: Path) -> None:
    frames = [Path(f"{video}#{i:06d}") for i in range(5)]
    for source in (video, video.parent, video.parent / "*.mp4"):
        assert find_images([source], videos=True) == frames
    assert find_images([frames[2]], videos=True) == [frames[2]]
    with pytest.raises(DataError, match="holds no image that can be read"):
        find_images([video.parent])


def test_find_images__lists_and_folders_below(tmp_path: Path) -> None:
    for name in ("a.png", "below/b.jpg", "below/deep/c.PNG", ".hidden/d.png", "below/.e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path], recursive=True)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.png", "below/b.jpg", "below/deep/c.PNG"]
    assert find_images([tmp_path]) == [tmp_path / "a.png"]
    listed = tmp_path / "list.txt"
    listed.write_text(f"# photos\n\nbelow/*.jpg\n{tmp_path / 'a.png'}\n  below/deep \n", encoding="utf-8-sig")
    assert find_images([listed]) == [tmp_path / "below/b.jpg", tmp_path / "a.png", tmp_path / "below/deep/c.PNG"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lists no images"),
        (b"# a.png\n", "lists no images"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"b.png", "b.png is not"),
    ],
)
def test_find_images__bad_lists(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_images([tmp_path / "list.txt"])


def test_names_one_image__or_several(tmp_path: Path) -> None:
    (tmp_path / "odd[1].jpg").touch()
    assert names_one_image("a.jpg")
    assert names_one_image(tmp_path / "odd[1].jpg")
    assert not any(names_one_image(name) for name in (tmp_path, "photos/*.jpg", "list.txt", "clip.mp4"))
    assert names_one_image("clip.mp4#000003")
