from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lightning_convnext_det.data import transforms
from lightning_convnext_det.data.seeding import seeded
from lightning_convnext_det.data.transforms import (
    FILL,
    MULTISCALE_SIZES,
    Preset,
    RandomSizeCrop,
    RandomSquareCrop,
    SampleTransform,
    ShortestSide,
    create_transforms,
    scaled_size,
    transform_sample,
)
from lightning_convnext_det.types import Target

# (preset, arguments): each with sizes that suit an image of 90 x 130
CHANGES: list[tuple[Preset, dict[str, object]]] = [
    ("flip", {"vertical_flip": True}),
    ("multiscale", {"sizes": (60, 80, 100, 120), "max_size": 170}),
    ("lsj", {"crop_size": 110, "scale_range": (0.3, 2.0)}),
]


def image_with(
    *corners: tuple[float, float, float, float], height: int = 90, width: int = 130
) -> tuple[Tensor, Target]:
    """Black, each box a filled rectangle: its row number in red, brightly."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x1, y1, x2, y2 in corners:
        image[:, int(y1) : int(y2), int(x1) : int(x2)] = 255
    boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    return image, {"boxes": boxes, "labels": torch.arange(len(corners)), "image_id": 7, "file_name": "a.png"}


@pytest.mark.parametrize(("preset", "arguments"), CHANGES, ids=[preset for preset, _ in CHANGES])
def test_transform_sample__boxes_follow_the_painted_rectangle(preset: Preset, arguments: dict[str, object]) -> None:
    transforms = create_transforms(preset, **arguments)
    image, target = image_with((31, 22, 87, 64))
    kept = 0
    for index in range(40):
        with seeded(0, 0, index):
            changed, found = transform_sample(transforms, image, target)
        # a pixel that the box covers by more than half is above 127 in all channels, the fill is not
        bright = (changed.min(dim=0).values > 127).nonzero()
        if len(found["boxes"]) == 0:
            assert len(bright) <= 2 * max(changed.shape[-2:])  # a sliver of at most a pixel
            continue
        kept += 1
        (y1, x1), (y2, x2) = bright.min(dim=0).values.tolist(), (bright.max(dim=0).values + 1).tolist()
        painted = torch.tensor([x1, y1, x2, y2], dtype=torch.float32)
        assert (found["boxes"][0] - painted).abs().max() <= 1.0
    assert kept >= 20


@pytest.mark.parametrize(("preset", "arguments"), CHANGES, ids=[preset for preset, _ in CHANGES])
def test_transform_sample__boxes_stay_inside_and_rows_together(preset: Preset, arguments: dict[str, object]) -> None:
    generator = np.random.default_rng(0)
    low = generator.uniform(0, (120, 80), (30, 2))
    high = np.minimum(low + generator.uniform(0.5, 60, (30, 2)), (130, 90))
    image, target = image_with(*[tuple(row) for row in np.concatenate([low, high], axis=1).tolist()])
    transforms = create_transforms(preset, **arguments)
    for index in range(20):
        with seeded(0, 1, index):
            changed, found = transform_sample(transforms, image, target)
        boxes, height, width = found["boxes"], *changed.shape[-2:]
        assert boxes.dtype == torch.float32
        assert type(boxes) is Tensor
        assert type(changed) is Tensor
        assert len(boxes) == len(found["labels"])
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert all(before < after for before, after in pairwise(found["labels"].tolist()))
        assert (found["image_id"], found["file_name"]) == (7, "a.png")


def test_transform_sample__arguments_are_not_modified() -> None:
    image, target = image_with((10, 10, 50, 40), (0, 0, 5, 5))
    before = image.clone(), {key: target[key].clone() for key in ("boxes", "labels")}
    transform_sample(create_transforms("lsj", crop_size=64), image, target)
    assert torch.equal(image, before[0])
    assert all(torch.equal(target[key], value) for key, value in before[1].items())


def test_transform_sample__no_boxes() -> None:
    image, target = image_with()
    for preset, arguments in CHANGES:
        _, found = transform_sample(create_transforms(preset, **arguments), image, target)
        assert found["boxes"].shape == (0, 4)
        assert found["labels"].shape == (0,)


def test_transform_sample__a_transform_that_removes_boxes() -> None:
    image, target = image_with((0, 0, 4, 4), (10, 10, 50, 40), (60, 0, 62, 50))
    _, found = transform_sample(v2.SanitizeBoundingBoxes(min_size=10), image, target)
    assert found["labels"].tolist() == [1]
    assert found["boxes"].tolist() == [[10.0, 10.0, 50.0, 40.0]]


@pytest.mark.parametrize("format", ["XYWH", "CXCYWH", "XYXY"])
def test_transform_sample__boxes_in_any_format_of_torchvision(format: str) -> None:
    image, target = image_with((10, 10, 50, 40))
    steps = v2.Compose(
        [v2.Resize((180, 390)), v2.ConvertBoundingBoxFormat(format), v2.ToDtype(torch.float32, scale=True)]
    )
    changed, found = transform_sample(steps, image, target)
    assert found["boxes"].tolist() == [[30.0, 20.0, 150.0, 80.0]]
    assert (changed.shape, changed.dtype, float(changed.max())) == ((3, 180, 390), torch.float32, 1.0)


def test_transform_sample__a_callable_sees_labels_and_image_id() -> None:
    def keep_first(image: Tensor, target: Target) -> tuple[Tensor, Target]:
        assert (target["image_id"], target["labels"].tolist()) == (7, [0, 1])
        return image[:, :20], {"boxes": target["boxes"][:1].as_subclass(Tensor), "labels": target["labels"][:1]}

    changed, found = transform_sample(keep_first, *image_with((10, 10, 50, 40), (0, 0, 5, 5)))
    assert changed.shape == (3, 20, 130)
    assert found["boxes"].tolist() == [[10.0, 10.0, 50.0, 20.0]]  # clipped to the crop


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (lambda image, target: image, TypeError, r"something else than \(image, target\)"),
        (lambda image, target: (image, [target]), TypeError, r"something else than \(image, target\)"),
        (lambda image, target: (image, {"boxes": target["boxes"]}), TypeError, "a target with boxes and labels"),
        (lambda image, target: (image[0], target), TypeError, "an image tensor"),
        (lambda image, target: (image, {**target, "labels": target["labels"][:0]}), ValueError, "1 boxes but 0 labels"),
    ],
)
def test_transform_sample__refuses_what_a_callable_returns(
    transform: SampleTransform, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        transform_sample(transform, *image_with((10, 10, 50, 40)))


def test_transform_sample__vanishing_box_is_left_out() -> None:
    image, target = image_with((0, 0, 10, 10), (60, 20, 130, 90))
    _, found = transform_sample(v2.Resize((8, 12)), image, target)
    assert found["labels"].tolist() == [1]  # the first is 0.9 pixels high


def test_shortest_side__equals_a_resize_of_the_usual_layout(photos: list[Tensor]) -> None:
    image = photos[0].contiguous()
    target: Target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    ours, _ = transform_sample(ShortestSide([301]), image, target)
    assert min(ours.shape[-2:]) == 301
    assert torch.equal(ours, v2.functional.resize(image, list(ours.shape[-2:])))


def test_create_transforms__multiscale_sizes_on_a_real_photo(shared_data: Path) -> None:
    file = min((shared_data / "coco_mini" / "val2017").glob("*.jpg"))
    image = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
    target: Target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    transforms = create_transforms("multiscale")
    ratio = max(image.shape[-2:]) / min(image.shape[-2:])
    plain = 0
    for index in range(30):
        with seeded(0, 0, index):
            changed, _ = transform_sample(transforms, image, target)
        short, long = sorted(changed.shape[-2:])
        assert long <= 1333
        assert short in MULTISCALE_SIZES or long == 1333
        plain += abs(long / short - ratio) < 0.01
    assert 8 <= plain <= 22  # half of the images are not cropped


@pytest.mark.parametrize(
    ("sizes", "before_crop", "crop"),
    [(MULTISCALE_SIZES, [400, 500, 600], (384, 600)), ((160, 240), [120, 150, 180], (115, 180))],
    ids=["published", "small"],
)
def test_create_transforms__multiscale_crop(
    sizes: tuple[int, ...], before_crop: list[int], crop: tuple[int, int]
) -> None:
    choice = create_transforms("multiscale", sizes=sizes).transforms[1]
    shorter, window, resize = choice.transforms[1].transforms
    assert shorter.min_size == before_crop
    assert (window.min_side, window.max_side) == crop
    assert resize.min_size == list(sizes)


def test_create_transforms__lsj_gives_squares() -> None:
    image, target = image_with((10, 10, 50, 40))
    sizes = {transform_sample(create_transforms("lsj", crop_size=96), image, target)[0].shape for _ in range(10)}
    assert sizes == {(3, 96, 96)}


def test_create_transforms__lsj_fills_right_and_bottom() -> None:
    image = torch.full((3, 90, 130), 200, dtype=torch.uint8)
    target: Target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    square, _ = transform_sample(create_transforms("lsj", crop_size=130, scale_range=(0.5, 0.5)), image, target)
    assert (square[:, :45, :65] == 200).all()
    assert (square[:, 45:] == FILL).all()
    assert (square[:, :, 65:] == FILL).all()


def test_random_square_crop__lies_anywhere_in_a_larger_image() -> None:
    rows, columns = torch.meshgrid(torch.arange(90), torch.arange(130), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    target: Target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    corners = [transform_sample(RandomSquareCrop(30), image, target)[0][:2, 0, 0].tolist() for _ in range(100)]
    for axis, last in ((0, 60), (1, 100)):
        positions = [corner[axis] for corner in corners]
        assert min(positions) < 0.2 * last
        assert 0.8 * last < max(positions) <= last


def test_create_transforms__lsj_scales_are_uniform() -> None:
    jitter = create_transforms("lsj", crop_size=130, scale_range=(0.5, 2.0)).transforms[1]
    image, _ = image_with()
    widths = [jitter.make_params([image])["size"][1] / 130 for _ in range(300)]
    assert 0.5 <= min(widths) < 0.55
    assert 1.95 < max(widths) <= 2.0
    assert abs(float(np.mean(widths)) - 1.25) < 0.1


def test_random_size_crop__short_sides_are_kept() -> None:
    image, target = image_with((5, 5, 30, 20), height=40, width=100)
    changed, found = transform_sample(RandomSizeCrop(60, 80), image, target)
    assert changed.shape[-2] == 40
    assert 60 <= changed.shape[-1] <= 80
    assert found["boxes"][:, 3].tolist() in ([], [20.0])


def test_create_transforms__none() -> None:
    assert create_transforms("none") is None


def test_create_transforms__color_jitter_leaves_boxes() -> None:
    image, target = image_with((10, 10, 50, 40))
    changed, found = transform_sample(create_transforms("none", color_jitter=0.4), image, target)
    assert torch.equal(found["boxes"], target["boxes"])
    assert not torch.equal(changed, image)


@pytest.mark.parametrize("size", [(1, 2000), (2000, 2), (3, 7)])
def test_create_transforms__narrow_images_keep_a_pixel(size: tuple[int, int]) -> None:
    image, target = image_with(height=size[0], width=size[1])
    for preset, arguments in CHANGES:
        changed, _ = transform_sample(create_transforms(preset, **arguments), image, target)
        assert min(changed.shape[-2:]) >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "multi-scale"}, "did you mean 'multiscale'"),
        ({"preset": "multiscale", "sizes": []}, "sizes are"),
        ({"preset": "multiscale", "sizes": [0, 64]}, "sizes is"),
        (
            {"preset": "multiscale", "sizes": [640], "max_size": 333},
            "sizes are .640., max_size is 333",
        ),
        ({"preset": "lsj", "crop_size": 0}, "crop_size is 0"),
        ({"preset": "lsj", "scale_range": (2.0, 0.1)}, "scale_range is"),
        ({"preset": "none", "color_jitter": -0.1}, "color_jitter is -0.1"),
    ],
)
def test_create_transforms__refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_transforms(**arguments)


def test_seeded__same_numbers_give_the_same_draws_and_leave_the_generator() -> None:
    before = torch.random.get_rng_state()
    draws = []
    for key in [(1, 2, 3), (1, 2, 3), (1, 3, 2), (2, 2, 3)]:
        with seeded(*key):
            draws.append(float(torch.rand(())))
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeded__restores_the_generator_after_an_error() -> None:
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), seeded(0, 0, 0):
        raise RuntimeError("inside")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_scaled_size__rounds() -> None:
    assert scaled_size(480, 640, 800 / 480) == (800, 1067)
    assert scaled_size(1, 2000, 0.1) == (1, 200)


def test_transform_sample__image_resized_without_its_boxes_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "_warned", set())
    target = {"boxes": torch.tensor([[2.0, 2.0, 30.0, 20.0]]), "labels": torch.tensor([0])}
    for transform, said in (
        (v2.Resize((20, 25)), 0),
        (lambda image, target: (image[:, ::2, ::2], {**target, "boxes": target["boxes"].as_subclass(Tensor) / 2}), 0),
        (lambda image, target: (image[:, ::2, ::2], target), 1),
        (lambda image, target: (image[:, ::2, ::2], target), 1),
    ):
        transform_sample(transform, torch.zeros(3, 40, 50, dtype=torch.uint8), target)
        assert caplog.text.count("[LCD-D129] train_transforms made an image of 25x20 from one of 50x40") == said
