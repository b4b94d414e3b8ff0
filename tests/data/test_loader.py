import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_convnext_det.data.batch import pack
from lightning_convnext_det.data.dataset import DetectionDataset, ImageDataset
from lightning_convnext_det.data.loader import EvaluationLoader, ImageLoader, TrainingLoader, report_unreadable
from lightning_convnext_det.data.sampler import EvaluationSampler, TrainingBatchSampler
from lightning_convnext_det.data.transforms import create_transforms
from lightning_convnext_det.errors import DataError
from tests.data import unreadable
from tests.data.builders import Box, TinyImage, make_annotations
from tests.processes import run_on_two_ranks

IMAGES = [TinyImage(20, 30, (Box((1, 2, 11, 12)),)), TinyImage(30, 20)] * 5


def training_loader(folder: Path, num_workers: int = 0) -> TrainingLoader:
    table = make_annotations(folder, IMAGES)
    dataset = DetectionDataset(table, create_transforms("lsj", crop_size=24), training=True)
    return TrainingLoader(
        dataset,
        batch_size=None,
        sampler=TrainingBatchSampler(table.sizes[:, 1] >= table.sizes[:, 0], 2),
        collate_fn=pack,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),
    )


def image_ids(batches: Sequence[tuple[object, list[dict[str, object]]]]) -> list[list[object]]:
    return [[target["image_id"] for target in targets] for _, targets in batches]


def test_training_loader__workers_do_not_change_the_images(tmp_path: Path) -> None:
    passes = {}
    for num_workers in (0, 2):
        loader = training_loader(tmp_path, num_workers)
        passes[num_workers] = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            passes[num_workers].append(list(loader))
    for alone, helped in zip(passes[0], passes[2], strict=True):
        assert image_ids(alone) == image_ids(helped)
        for (images, targets), (others, other_targets) in zip(alone, helped, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))
            assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, other_targets, strict=True))
    assert image_ids(passes[0][0]) != image_ids(passes[0][1])


def test_training_loader__global_generator_is_left(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    list(training_loader(tmp_path, num_workers=1))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.heavy
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_loader__continues_after_the_batches_received(tmp_path: Path, num_workers: int) -> None:
    loader = training_loader(tmp_path, num_workers)
    loader.sampler.set_epoch(3)
    everything = image_ids(list(loader))
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = loader.state_dict()  # with workers, later batches are on their way: they must not count
    assert state == {"seed": 0, "epoch": 3, "batches": 2}
    resumed = training_loader(tmp_path, num_workers)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    waiting = iter(resumed)  # before set_epoch, as Lightning does it
    resumed.sampler.set_epoch(3)
    assert image_ids(list(waiting)) == everything[2:]
    assert resumed.state_dict() == {"seed": 0, "epoch": 3, "batches": 5}
    assert image_ids(list(resumed)) == everything


@pytest.mark.parametrize("follows", [True, False])
def test_training_loader__seed_of_a_state_unless_another_is_given(tmp_path: Path, follows: bool) -> None:
    first, second = training_loader(tmp_path), training_loader(tmp_path)
    second.load_state_dict({"seed": 5, "epoch": 0, "batches": 0})
    expected = image_ids(list(second))
    first.follows_checkpoint = follows
    first.load_state_dict({"seed": 5, "epoch": 0, "batches": 0})
    assert first.dataset.seed == first.sampler.seed == (5 if follows else 0)
    assert (image_ids(list(first)) == expected) is follows


def test_training_loader__state_of_a_finished_epoch_does_not_touch_the_next(tmp_path: Path) -> None:
    loader = training_loader(tmp_path)
    loader.load_state_dict({"seed": 0, "epoch": 3, "batches": 5})
    waiting = iter(loader)
    loader.sampler.set_epoch(4)
    assert len(list(waiting)) == 5


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_loader__unreadable_image_is_one_line(tmp_path: Path, num_workers: int) -> None:
    dataset = DetectionDataset(make_annotations(tmp_path, IMAGES), training=False)
    (tmp_path / "03.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^\[LCD-I001\].*03\.png.*\(image id 103, epoch 0\)$") as caught:
        list(EvaluationLoader(dataset, batch_size=2, collate_fn=pack, num_workers=num_workers))
    assert "\n" not in str(caught.value)


@pytest.mark.heavy
@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_loader__leaves_out_what_cannot_be_read(
    tmp_path: Path, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    make_annotations(tmp_path, IMAGES)
    for index in (1, 2, 3):
        (tmp_path / f"{index:02d}.png").write_bytes(b"no image")
    files = sorted(tmp_path.glob("*.png"))
    loader = ImageLoader(ImageDataset(files), batch_size=2, collate_fn=pack, num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        batches = list(loader)
    assert image_ids(batches) == [[1], [5, 6], [7, 8], [9, 10]]  # the second batch has nothing left
    assert [len(images) for images, _ in batches] == [1, 2, 2, 2]
    messages = [record.getMessage() for record in caplog.records]
    assert [Path(files[index]).name in messages[index - 1] for index in (1, 2, 3)] == [True] * 3
    assert messages[3] == "3 of 10 images could not be read and were skipped"


@pytest.mark.heavy
def test_image_loader__nothing_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    loader = ImageLoader(ImageDataset([tmp_path / "a.png"]), batch_size=2, collate_fn=pack)
    with pytest.raises(DataError, match="none of 1 images can be read"):
        list(loader)


def test_training_loader__two_ranks_share_an_epoch(tmp_path: Path) -> None:
    table = make_annotations(tmp_path, IMAGES)
    seen = []
    for rank in (0, 1):
        sampler = TrainingBatchSampler(np.ones(10, np.bool_), 2, num_replicas=2, rank=rank)
        loader = TrainingLoader(
            DetectionDataset(table, training=True), batch_size=None, sampler=sampler, collate_fn=pack
        )
        ids = image_ids(list(loader))
        assert len(ids) == len(loader) == 3
        seen += [one for batch in ids for one in batch]
    assert sorted(seen) == list(range(100, 110))


@pytest.mark.heavy
def test_image_loader__nothing_can_be_read_on_one_of_two_ranks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file in files:
        file.write_bytes(b"no image")
    for rank in (0, 1):
        caplog.clear()
        sampler = EvaluationSampler(4, 2, rank)
        loader = ImageLoader(ImageDataset(files), batch_size=2, sampler=sampler, collate_fn=pack)
        with caplog.at_level(logging.WARNING):
            assert list(loader) == []
        assert "[LCD-P002] none of the 2 images of this rank can be read" in caplog.text
        assert loader.dataset.counts == {"read": 0, "failed": 2}


def test_report_unreadable__an_error_only_if_nothing_was_read(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report_unreadable(3, 0)
        assert caplog.text == ""
        report_unreadable(3, 1)
    assert "1 of 4 images could not be read" in caplog.text
    with pytest.raises(DataError, match=r"LCD-P002.*none of 4 images"):
        report_unreadable(0, 4)


@pytest.mark.heavy
@pytest.mark.parametrize(("readable", "ended"), [(0, "[LCD-P002] none of 4 images can be read"), (1, "done")])
def test_predict__two_ranks_end_alike(readable: int, ended: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):  # rank 0 has the first two
        (images / f"{i}.png").write_bytes(b"no image")
    if readable:
        Image.new("RGB", (30, 20)).save(images / "0.png")
    said = run_on_two_ranks(unreadable.main, tmp_path / "log", images, tmp_path)
    assert "none of the 2 images of this rank can be read" in said
    assert all((tmp_path / f"{rank}.txt").read_text().startswith(ended) for rank in (0, 1))
    if readable:
        assert said.count("3 of 4 images could not be read and were skipped") == 1
