"""What all detectors have in common."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_convnext_det.errors import DataError
from lightning_convnext_det.models.deformable_detr.dino import DINO
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.types import Target

SMALL = {"backbone": "test_convnext", "min_size": 64, "max_size": 96, "score_threshold": 0.0}
RCNN = {**SMALL, "fpn_channels": 16, "box_head_features": 16, "rpn_post_nms_top_n": (50, 50)}
DETR = {**SMALL, "num_queries": 8, "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 1, "feedforward_dim": 32}
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "faster": lambda **options: FasterRCNN(3, **{**RCNN, **options}),
    "cascade": lambda **options: CascadeRCNN(3, **{**RCNN, "box_head": "two_fc", **options}),
    "dino": lambda **options: DINO(3, **{**DETR, **options}),
    "detr": lambda **options: DeformableDETR(3, **{**DETR, **options}),
}
IMAGES = torch.rand(2, 3, 60, 80, generator=torch.Generator().manual_seed(1))
TARGETS: list[Target] = [
    {"boxes": torch.tensor([[5.0, 5.0, 40.0, 45.0]]), "labels": torch.tensor([2])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


@pytest.fixture(params=list(BUILDERS))
def build(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    return BUILDERS[request.param]


def total(detector: nn.Module, images: Any, targets: Any) -> float:
    torch.manual_seed(7)  # what the samplers draw
    losses = detector.train()(images, targets)
    return float(sum(x.detach() for x in losses.values()))


@torch.no_grad()
def detect(detector: nn.Module, images: Any) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = detector.eval()(images)
    return found


def assert_equal(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert len(one["boxes"])
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "labels", "scores"))


def test_detector__images_in_a_list_or_stacked(build: Callable[..., nn.Module]) -> None:
    detector = build(dropout=0.0) if build is BUILDERS["detr"] else build()
    assert_equal(detect(detector, IMAGES), detect(detector, list(IMAGES)))
    assert_equal(detect(detector, tuple(IMAGES)), detect(detector, list(IMAGES)))
    assert total(detector, IMAGES, TARGETS) == total(detector, list(IMAGES), TARGETS)


@pytest.mark.parametrize("image", [np.zeros((64, 64, 3), np.uint8), "photo.jpg", None])
def test_detector__names_an_image_that_is_no_tensor(build: Callable[..., nn.Module], image: object) -> None:
    with pytest.raises(TypeError, match=r"^images\[1\] is of type (ndarray|str|NoneType); a detector takes tensors"):
        build().eval()([torch.zeros(3, 64, 64), image])


def test_detector__targets_of_torchvision_train_alike(build: Callable[..., nn.Module]) -> None:
    detector = build(dropout=0.0) if build is BUILDERS["detr"] else build()
    boxes = torch.tensor([[5, 5, 40, 45], [0, 60, 60, 60]], dtype=torch.int64)
    theirs = [
        {
            "boxes": boxes,
            "labels": torch.tensor([2, 1], dtype=torch.int32),
            "iscrowd": torch.tensor([0, 1]),  # of a region without area: no background is ignored
            "area": torch.tensor([1400.0, 3600.0], dtype=torch.float64),
            "image_id": torch.tensor([4]),
            "masks": torch.zeros(2, 60, 80, dtype=torch.uint8),
        },
        {"boxes": torch.tensor([]), "labels": torch.tensor([]), "image_id": 5},
    ]
    assert total(detector, IMAGES, theirs) == total(detector, IMAGES, TARGETS)
    assert "masks" in theirs[0]
    assert theirs[0]["boxes"] is boxes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, r"LCD-I030.*images\[0\] holds floats from .* to 25\d; give it in 0..1, divided by 255, or"),
        (lambda x: (x - 0.45) / 0.225, r"LCD-I030.*images\[0\] holds floats from -.*not normalised: the detector does"),
        (lambda x: x / 0 * 0, r"LCD-I031.*images\[0\] has pixels that are not finite"),
    ],
    ids=["0..255", "normalised", "not finite"],
)
def test_detector__floats_of_another_range_are_refused(
    build: Callable[..., nn.Module], change: Callable[[Tensor], Tensor], message: str
) -> None:
    detector = build()
    with pytest.raises(DataError, match=message):
        detect(detector, list(change(IMAGES)))
    with pytest.raises(DataError, match=message):
        total(detector, list(change(IMAGES)), TARGETS)
    detect(detector, [(IMAGES[0] * 255).to(torch.uint8)])
    detect(detector, list(IMAGES * 1.2 - 0.1))  # what bicubic resizing may overshoot


def test_detector__one_image_without_a_list(build: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"shape \[60, 80\]; expected \[3, height, width\], in a list or stacked"):
        detect(build(), IMAGES[0])


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_detector__other_numbers_of_channels(build: Callable[..., nn.Module], channels: int) -> None:
    detector = build(in_chans=channels)
    images = torch.rand(2, channels, 60, 80)
    assert len(detect(detector, images)[0]["boxes"])
    assert torch.isfinite(torch.tensor(total(detector, images, TARGETS)))


def test_detector__selection_can_be_read_and_set(build: Callable[..., nn.Module]) -> None:
    detector = build(score_threshold=0.25, nms="soft", nms_threshold=0.6, soft_nms_sigma=0.4, detections_per_image=7)
    assert detector.score_threshold == 0.25
    assert detector.nms == "soft"
    assert detector.nms_threshold == 0.6
    assert detector.soft_nms_sigma == 0.4
    assert detector.detections_per_image == 7
    detector.score_threshold, detector.nms, detector.detections_per_image = 0.0, "none", 5
    found = detect(detector, IMAGES)[0]
    assert len(found["scores"]) == 5
    detector.score_threshold = float(found["scores"][2])
    assert len(detect(detector, IMAGES)[0]["scores"]) in (2, 3)  # whether a score equal to the threshold counts
    assert (detect(detector, IMAGES)[0]["scores"] >= detector.score_threshold).all()
    detector.score_threshold, detector.nms, detector.nms_threshold = 0.0, "hard", 0.0
    detector.detections_per_image = 100
    boxes = detect(detector, IMAGES)[0]
    detector.nms_threshold = 1.0
    assert len(detect(detector, IMAGES)[0]["boxes"]) >= len(boxes["boxes"])


@pytest.mark.parametrize("name", ["faster", "cascade"])
def test_detector__torchvisions_names_of_its_thresholds(name: str) -> None:
    detector = BUILDERS[name]()
    heads = list(getattr(detector.roi_heads, "stages", [detector.roi_heads]))
    heads[-1].score_thresh, heads[-1].nms_thresh, heads[-1].detections_per_img = 0.1, 0.2, 3
    assert (detector.score_threshold, detector.nms_threshold, detector.detections_per_image) == (0.1, 0.2, 3)
    detector.nms_threshold = 0.4
    assert heads[0].nms_thresh == 0.4
    assert len(detect(detector, IMAGES)[0]["boxes"]) <= 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("score_threshold", 1.5, "score_threshold is 1.5; it must be at least 0 and at most 1"),
        ("score_threshold", -0.1, "score_threshold is -0.1"),
        ("score_threshold", "high", "score_threshold is 'high'"),
        ("nms", "gentle", "nms is 'gentle'; choose hard, soft or none"),
        ("nms_threshold", float("nan"), "nms_threshold is nan"),
        ("soft_nms_sigma", 0, "soft_nms_sigma is 0; it must be above 0"),
        ("detections_per_image", 0, "detections_per_image is 0; it must be at least 1"),
    ],
)
def test_detector__values_out_of_range_are_refused(
    build: Callable[..., nn.Module], name: str, value: Any, message: str
) -> None:
    detector = build()
    before = getattr(detector, name)
    with pytest.raises(ValueError, match=message):
        setattr(detector, name, value)
    assert getattr(detector, name) == before
    with pytest.raises(ValueError, match=message):
        build(**{name: value})


def save_and_load(detector: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(detector, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "duplicate", [save_and_load, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["save", "copy", "pickle"]
)
def test_detector__whole_object_saved_copied_pickled(
    build: Callable[..., nn.Module], duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    detector = build()
    before = (detector.nms, detector.detections_per_image)
    other = duplicate(detector)
    assert_equal(detect(other, IMAGES), detect(detector, IMAGES))
    other.nms, other.detections_per_image = "soft", 3
    assert len(detect(other, IMAGES)[0]["boxes"]) == 3  # and the original is as it was
    assert (detector.nms, detector.detections_per_image) == before
    other.train()(list(IMAGES), TARGETS)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-5)], ids=str
)
def test_detector__weights_of_another_precision(
    build: Callable[..., nn.Module], dtype: torch.dtype, tolerance: float
) -> None:
    detector = build().to(dtype)
    reference = copy.deepcopy(detector).float()  # of the same, rounded weights
    for one, other in zip(detect(detector, IMAGES), detect(reference, IMAGES), strict=True):
        assert (one["boxes"].dtype, one["scores"].dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(one["scores"][:5], other["scores"][:5], atol=tolerance, rtol=0)
    losses = detector.train()(list(IMAGES), TARGETS)
    assert all(loss.dtype in (torch.float32, dtype) and loss.isfinite() for loss in losses.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_detector__moves_images_and_targets_to_its_device(build: Callable[..., nn.Module]) -> None:
    detector = build().cuda()
    assert detect(detector, list(IMAGES))[0]["boxes"].is_cuda
    for images in (IMAGES, IMAGES.cuda()):
        for device in ("cpu", "cuda"):
            targets = [{key: value.to(device) for key, value in target.items()} for target in TARGETS]
            assert torch.isfinite(torch.tensor(total(detector, images, targets)))
