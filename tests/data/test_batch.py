from pathlib import Path

import pytest
import torch

from lightning_convnext_det.data.batch import UnreadableImage, collate, pack, split_batch, unpack
from lightning_convnext_det.data.dataset import DetectionDataset
from lightning_convnext_det.data.io.regions import RegionImage
from tests.data.builders import Box, TinyImage, make_annotations

IMAGES = [
    TinyImage(20, 30, (Box((1, 2, 11, 12), 1), Box((5, 5, 25, 15), 0, crowd=True, area=77.0))),
    TinyImage(31, 17),
    TinyImage(24, 24, (Box((0, 0, 24, 24)),)),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("keys", [[0, 1, 2], [1], [2, 0]], ids=["all", "without-boxes", "other-order"])
def test_unpack__gives_back_what_was_packed(tmp_path: Path, training: bool, keys: list[int]) -> None:
    samples = DetectionDataset(make_annotations(tmp_path, IMAGES), training=training)[keys]
    images, targets = unpack(pack(samples))
    expected_images, expected_targets = collate(samples)
    assert len(images) == len(targets) == len(keys)
    for image, expected in zip(images, expected_images, strict=True):
        assert torch.equal(image, expected)
    for target, expected in zip(targets, expected_targets, strict=True):
        assert target.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(target[key], value) if isinstance(value, torch.Tensor) else target[key] == value
            assert getattr(target[key], "dtype", None) == getattr(value, "dtype", None)


def test_unpack__layout_in_memory_is_kept(tmp_path: Path) -> None:
    (first, target), (second, _) = DetectionDataset(make_annotations(tmp_path, IMAGES), training=True)[[0, 1]]
    innermost = first.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    cut = second[:, 3:9, 4:8]  # contiguous in neither way
    images, _ = unpack(pack([(first, target), (innermost, target), (cut, target)]))
    assert [image.stride() for image in images[:2]] == [first.stride(), innermost.stride()]
    assert torch.equal(images[0], first)
    assert torch.equal(images[1], first)
    assert torch.equal(images[2], cut)


def test_pack__tensors_do_not_grow_with_the_batch(tmp_path: Path) -> None:
    packed = pack(DetectionDataset(make_annotations(tmp_path, IMAGES), training=False)[[0, 1, 2]])
    assert sum(isinstance(value, torch.Tensor) for value in packed) == 1
    assert set(packed.objects) == {"boxes", "labels", "iscrowd", "area"}


def test_pack__sets_aside_what_cannot_be_read(tmp_path: Path) -> None:
    dataset = DetectionDataset(make_annotations(tmp_path, IMAGES), training=True)
    failed = UnreadableImage("a.jpg", "no image")
    packed = pack([dataset[0], failed, dataset[2]])
    assert packed.unreadable == [failed]
    assert [target["image_id"] for target in unpack(packed)[1]] == [100, 102]
    assert unpack(pack([failed])) == ([], [])


def test_pack__images_that_are_read_by_regions_keep_their_place(tmp_path: Path) -> None:
    dataset = DetectionDataset(make_annotations(tmp_path, IMAGES), training=True)
    (first, target), (second, _) = dataset[[0, 1]]
    regions = [RegionImage(f"{i}.tif", 5000, 6000) for i in range(3)]
    order = [regions[0], first, regions[1], second, regions[2]]
    images, targets = unpack(pack([(image, target) for image in order]))
    assert len(images) == len(targets) == 5
    assert [images[i] for i in (0, 2, 4)] == regions
    assert torch.equal(images[1], first)
    assert torch.equal(images[3], second)
    only, _ = unpack(pack([(regions[0], target)]))
    assert only == [regions[0]]


IMAGE, TARGET = torch.zeros(3, 8, 9), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("batch", "count", "has_targets"),
    [
        (([IMAGE, IMAGE], [TARGET, TARGET]), 2, True),
        (([IMAGE], [TARGET]), 1, True),
        (tuple(zip(*[(IMAGE, TARGET), (IMAGE, TARGET)], strict=True)), 2, True),  # torchvision's collate_fn
        ((torch.stack([IMAGE] * 3), [TARGET] * 3), 3, True),
        ([(IMAGE, TARGET), (IMAGE, TARGET)], 2, True),
        ([(IMAGE, TARGET)], 1, True),
        (([], []), 0, True),
        ([IMAGE, IMAGE], 2, False),
        ((IMAGE,), 1, False),
        (torch.stack([IMAGE] * 3), 3, False),
        ([torch.stack([IMAGE] * 3)], 3, False),  # a DataLoader over a TensorDataset
    ],
)
def test_split_batch__forms_that_loaders_yield(batch: object, count: int, has_targets: bool) -> None:
    images, targets = split_batch(batch)
    assert [image.shape for image in images] == [IMAGE.shape] * count
    assert targets == [TARGET] * count if has_targets else targets is None


@pytest.mark.parametrize("batch", [{"images": IMAGE}, IMAGE, ["a.jpg"], (torch.zeros(2, 3, 8, 8), torch.zeros(2)), 5])
def test_split_batch__refuses(batch: object) -> None:
    with pytest.raises(TypeError, match=r"give (a list of tensors \[C, H, W\]|\(images, targets\))"):
        split_batch(batch)
