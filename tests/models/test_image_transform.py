import pytest
import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lightning_convnext_det.models.image_transform import IMAGENET_MEAN, IMAGENET_STD, ImageTransform, scale_boxes

SIZES = [(480, 640), (333, 500), (1000, 100), (37, 91)]


@pytest.mark.heavy
@pytest.mark.parametrize(("min_size", "max_size"), [(800, 1333), (224, 300), (64, 2000)])
def test_image_transform__equals_torchvision(min_size: int, max_size: int) -> None:
    images = [torch.rand(3, h, w) for h, w in SIZES]
    targets = [{"boxes": torch.tensor([[1.0, 2.0, 30.5, 33.0]]), "labels": torch.tensor([0])} for _ in images]
    reference = GeneralizedRCNNTransform(min_size, max_size, list(IMAGENET_MEAN), list(IMAGENET_STD)).eval()
    expected, expected_targets = reference(images, targets)
    batch, sizes, moved = ImageTransform(min_size, max_size).eval()(images, targets)
    assert sizes == [tuple(s) for s in expected.image_sizes]
    assert torch.equal(batch, expected.tensors)
    assert moved is not None
    for ours, theirs in zip(moved, expected_targets, strict=True):
        torch.testing.assert_close(ours["boxes"], theirs["boxes"])


@pytest.mark.parametrize(
    ("channels", "mean"),
    [(1, (0.449,)), (2, (0.485, 0.456)), (3, (0.485, 0.456, 0.406)), (4, (0.485, 0.456, 0.406, 0.485))],
)
def test_image_transform__statistics_of_other_numbers_of_channels(channels: int, mean: tuple[float, ...]) -> None:
    transform = ImageTransform(64, in_chans=channels).eval()
    assert transform.image_mean == pytest.approx(mean, abs=1e-3)
    white = torch.full((channels, 64, 64), 255, dtype=torch.uint8)
    expected = torch.tensor([(1 - m) / s for m, s in zip(transform.image_mean, transform.image_std, strict=True)])
    torch.testing.assert_close(transform([white])[0][0, :, 5, 5], expected)


def test_image_transform__statistics_given_for_each_channel_or_one_for_all() -> None:
    assert ImageTransform(64, image_mean=[0.5], image_std=[0.2], in_chans=4).image_mean == (0.5,) * 4
    assert ImageTransform(64, image_mean=[0.1, 0.2], image_std=[0.2, 0.3], in_chans=2).image_std == (0.2, 0.3)
    with pytest.raises(ValueError, match="image_mean and image_std have 2 values, but in_chans is 4"):
        ImageTransform(64, image_mean=[0.1, 0.2], image_std=[0.2, 0.3], in_chans=4)


def test_image_transform__uint8_equals_float(photos: list[Tensor]) -> None:
    transform = ImageTransform(200, 333).eval()
    assert torch.equal(transform(photos)[0], transform([p / 255 for p in photos])[0])


def test_image_transform__leaves_its_input_alone(photos: list[Tensor]) -> None:
    target = {"boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "labels": torch.tensor([0]), "file_name": "a.jpg"}
    before = [p.clone() for p in photos]
    _, _, moved = ImageTransform(100).eval()(photos[:1], [target])
    assert all(torch.equal(a, b) for a, b in zip(photos, before, strict=True))
    assert target["boxes"].tolist() == [[1, 2, 3, 4]]
    assert moved is not None
    assert moved[0]["file_name"] == "a.jpg"


def test_image_transform__restore_inverts_the_resize() -> None:
    boxes = torch.tensor([[0.0, 0.0, 640.0, 480.0], [10.0, 20.0, 30.0, 40.0]])
    moved = scale_boxes(boxes, (480, 640), (800, 1066))
    assert moved[0].tolist() == [0, 0, 1066, 800]
    detection = {"boxes": moved, "labels": torch.zeros(2), "scores": torch.ones(2)}
    restored = ImageTransform().restore([detection], [(800, 1066)], [(480, 640)])
    torch.testing.assert_close(restored[0]["boxes"], boxes)


def test_image_transform__training_sizes() -> None:
    transform = ImageTransform([64, 96], 1000).train()
    seen = {transform([torch.rand(3, 50, 70)])[1][0][0] for _ in range(30)}
    assert seen == {64, 96}
    assert transform.eval()([torch.rand(3, 50, 70)])[1] == [(96, 134)]
    transform.train().resize_in_training = False
    assert transform([torch.rand(3, 50, 70)])[1] == [(50, 70)]


def test_image_transform__extreme_aspect_keeps_a_pixel() -> None:
    batch, sizes, _ = ImageTransform(64, 96).eval()([torch.rand(3, 1, 2000)])
    assert sizes == [(1, 96)]
    assert batch.shape == (1, 3, 32, 96)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.rand(1, 10, 10), ValueError, r"images\[0\] has shape \[1, 10, 10\]; expected \[3, height, width\]"),
        (torch.rand(10, 10), ValueError, r"shape \[10, 10\]"),
        (torch.zeros(3, 10, 10, dtype=torch.int64), TypeError, "int64; expected uint8 or floating point"),
    ],
)
def test_image_transform__wrong_image(image: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImageTransform()([image])


def test_image_transform__wrong_arguments() -> None:
    with pytest.raises(ValueError, match="images is empty"):
        ImageTransform()([])
    with pytest.raises(ValueError, match="at least 1 pixel"):
        ImageTransform(0)
    with pytest.raises(ValueError, match="image_mean has 1 channels, image_std has 3"):
        ImageTransform(image_mean=(0.5,))
