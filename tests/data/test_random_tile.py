"""Windows of training images."""

import pytest
import torch
from torch import Tensor

from lightning_convnext_det.data.batch import pack, unpack
from lightning_convnext_det.data.transforms import RandomTile, create_transforms, transform_sample
from lightning_convnext_det.models.target_check import prepare_targets
from lightning_convnext_det.types import Target
from tests.models.color_detector import ColorDetector, draw

BOXES = [(10, 10, 50, 30), (60, 5, 100, 45), (90, 60, 98, 68), (0, 70, 40, 80)]


def target() -> Target:
    return {"boxes": torch.tensor(BOXES).float(), "labels": torch.arange(4), "image_id": 7, "file_name": "a.png"}


def sample(seed: int, side: int = 48) -> tuple[Tensor, Target]:
    torch.manual_seed(seed)
    transform = create_transforms("tiles", crop_size=side)
    assert transform is not None
    return transform_sample(transform, draw(80, 120, BOXES), target())


def test_random_tile__boxes_are_those_of_what_is_visible() -> None:
    states, numbers = set(), set()
    for seed in range(60):
        window, found = sample(seed)
        assert window.shape == (3, 48, 48)
        seen = ColorDetector().find(window)["boxes"]
        assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, found["boxes"].tolist()))
        for box, label, crowd in zip(found["boxes"], found["labels"].tolist(), found["iscrowd"].tolist(), strict=True):
            full = torch.tensor(BOXES[label]).float()
            share = float((box[2:] - box[:2]).prod() / (full[2:] - full[:2]).prod())
            assert crowd == (share < 0.4)
            states.add(crowd)
            numbers.add(label)
    assert states == {True, False}
    assert numbers == {0, 1, 2, 3}


@pytest.mark.parametrize("width", [5, 10, 12.5, 33.3, 55])
def test_random_tile__an_object_is_learned_from_40_percent_on(width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomTile, "_start", lambda self, side, center: 0)
    shares = [0.39, 0.4, 0.41]
    boxes = torch.tensor([[40 - share * width, 0, 40 + (1 - share) * width, 10] for share in shares])
    _, found = RandomTile(40)(torch.zeros(3, 40, 100), Target(boxes=boxes, labels=torch.arange(3)))
    assert found["iscrowd"].tolist() == [True, False, False]


def test_random_tile__detectors_learn_from_what_is_visible_enough() -> None:
    samples = [sample(seed) for seed in range(8)]
    images, targets = unpack(pack(samples))
    prepared = prepare_targets(images, targets, 4, torch.device("cpu"))
    for one, (_, other) in zip(prepared, samples, strict=True):
        assert torch.equal(one["boxes"], other["boxes"][~other["iscrowd"]])
    assert sum(int(other["iscrowd"].sum()) for _, other in samples) > 0


def test_random_tile__half_of_the_windows_have_an_object() -> None:
    image, lonely = (
        torch.zeros(3, 1000, 1000),
        Target(boxes=torch.tensor([[500.0, 500, 510, 510]]), labels=torch.ones(1)),
    )
    torch.manual_seed(0)
    found = [len(RandomTile(50)(image, lonely)[1]["boxes"]) for _ in range(400)]
    assert 170 < sum(found) < 240  # one half, and 0.3 % of the other


def test_random_tile__small_images_stay() -> None:
    image, given = draw(80, 120, BOXES), target()
    window, found = RandomTile(120)(image, given)
    assert torch.equal(window, image)
    assert torch.equal(found["boxes"].as_subclass(Tensor), given["boxes"])
    assert not found["iscrowd"].any()
    assert "iscrowd" not in given


@pytest.mark.parametrize("boxes", [torch.zeros(0, 4)], ids=["none"])
def test_random_tile__without_objects(boxes: Tensor) -> None:
    window, found = transform_sample(
        RandomTile(16), draw(80, 120, []), Target(boxes=boxes, labels=torch.zeros(0, dtype=torch.int64))
    )
    assert (window.shape, found["boxes"].shape, found["iscrowd"].shape) == ((3, 16, 16), (0, 4), (0,))
