import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_convnext_det.ops import roi_align as roi_align_module
from lightning_convnext_det.ops.roi_align import MultiScaleRoIAlign, roi_align
from lightning_convnext_det.ops.roi_align_gather import roi_align_by_gather

GOLDENS = Path(__file__).parents[2] / ".." / "shared" / "goldens" / "units" / "units.safetensors"


def _boxes(count: int, height: float, width: float, images: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Boxes of all sizes [K, 5] that stick out on every side; the first tenth has no area, the second whole numbers."""
    centres = torch.rand(count, 2, dtype=dtype) * torch.tensor([width, height]) * 1.4 - 0.2 * min(height, width)
    half = torch.rand(count, 2, dtype=dtype) ** 3 * torch.tensor([width, height])
    half[: count // 10] = 0
    corners = torch.cat((centres - half, centres + half), dim=1)
    corners[count // 10 : count // 5] = corners[count // 10 : count // 5].round()
    return torch.cat((torch.randint(images, (count, 1)).to(dtype), corners), dim=1)


def _gather(features: Tensor, rois: Tensor, size: tuple[int, int], *options: object) -> Tensor:
    return roi_align_by_gather(features, rois, size, *options)  # type: ignore[arg-type]


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(13, 17), (1, 9), (8, 1)], ids=str)
def test_roi_align__values_and_gradients_equal_torchvision(
    size: tuple[int, int], sampling_ratio: int, aligned: bool, dtype: torch.dtype
) -> None:
    features = torch.randn(3, 5, *size, dtype=dtype, requires_grad=True)
    rois = _boxes(150, size[0] * 16, size[1] * 16, images=3, dtype=dtype)
    ours = _gather(features, rois, (7, 5), 1 / 16, sampling_ratio, aligned)
    expected = torchvision.ops.roi_align(features, rois, (7, 5), 1 / 16, sampling_ratio, aligned)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad(output, features, direction)[0] for output in (ours, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
def test_roi_align__samples_on_the_border(sampling_ratio: int, aligned: bool) -> None:
    # with one bin of one pixel, samples fall on the places where torchvision's rule changes (-1, 0, the last pixel's
    # centre, the edge of the map) and on either side of each
    places = torch.tensor([-1.0, -0.5, 0.0, 0.5, 4.0, 4.5, 5.0, 5.5])
    places = torch.cat((places, places - 1e-3, places + 1e-3)) - (0.0 if aligned else 0.5)
    x, y = torch.cartesian_prod(places, places).unbind(1)
    rois = torch.stack((torch.zeros_like(x), x, y, x + 1, y + 1), dim=1)
    features = torch.randn(1, 2, 5, 5) + 3  # away from 0, so that a sample that is left out is seen
    ours = _gather(features, rois, (1, 1), 1.0, sampling_ratio, aligned)
    expected = torchvision.ops.roi_align(features, rois, (1, 1), 1.0, sampling_ratio, aligned)
    assert (expected == 0).any()
    torch.testing.assert_close(ours, expected)


def test_roi_align__by_hand() -> None:
    features = torch.arange(16.0).view(1, 1, 4, 4)
    # two bins of two pixels with one sample each, which is the mean of four pixels
    pooled = _gather(features, torch.tensor([[0.0, 0, 0, 4, 4]]), (2, 2), 1.0, 1, True)
    torch.testing.assert_close(pooled, torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))


def test_roi_align__samples_exactly_a_pixel_apart() -> None:
    # samples exactly a pixel apart, which rounding puts on either side of a pixel's centre
    starts = torch.rand(500, 2) * 20 + torch.arange(500)[:, None] / 7
    lengths = torch.randint(1, 6, (500, 2)) * 7.0
    rois = torch.cat((torch.zeros(500, 1), starts, starts + lengths), dim=1)
    features = torch.randn(1, 3, 90, 100)
    expected = torchvision.ops.roi_align(features, rois, 7, 1.0, 0, False)
    torch.testing.assert_close(_gather(features, rois, (7, 7), 1.0, 0, False), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align__gradcheck(sampling_ratio: int) -> None:
    features = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = _boxes(6, 40, 48, images=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _gather(x, rois, (2, 3), 1 / 8, sampling_ratio, True), (features,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [5, 300], ids=["torchvision", "gather"])
def test_roi_align__half_precision(count: int, dtype: torch.dtype) -> None:
    features = torch.randn(2, 32, 30, 40).to(dtype).requires_grad_()
    rois = _boxes(count, 480, 640, images=2)
    pooled = roi_align(features, rois, 7, 1 / 16, 2)
    expected = torchvision.ops.roi_align(features.float(), rois, 7, 1 / 16, 2)
    assert pooled.dtype == dtype
    # a result rounded once is off by eps / 2; rounded weights add about as much, in units of the values read
    torch.testing.assert_close(pooled.float(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert (pooled.float() - expected).square().mean().sqrt() < torch.finfo(dtype).eps / 4
    (gradient,) = torch.autograd.grad(pooled.float().sum(), features)
    (exact,) = torch.autograd.grad(expected.sum(), features)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_roi_align__autocast_keeps_positions_exact() -> None:
    features, rois = torch.randn(1, 64, 30, 40), _boxes(100, 480, 640)
    expected = roi_align(features, rois, 7, 1 / 16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(roi_align(features, rois, 7, 1 / 16, 2), expected)


@pytest.mark.parametrize("sampling_ratio", [-1, 0, 2])
@pytest.mark.parametrize("channels", [1, 3000], ids=["torchvision", "gather"])
def test_roi_align__a_box_that_is_not_finite_pools_to_zero(channels: int, sampling_ratio: int) -> None:
    features = torch.rand(1, channels, 6, 6) + 1
    good, bad = [4.0, 4, 60, 60], [float("nan"), float("inf"), float("-inf")]
    boxes = torch.tensor([good] + [[*good[:i], x, *good[i + 1 :]] for i in range(4) for x in bad] + [good])
    pooled = roi_align(features, [boxes], (2, 2), 1 / 16, sampling_ratio)
    assert (pooled[[0, -1]] > 0).all()
    assert (pooled[1:-1] == 0).all()


@pytest.mark.parametrize("path", [roi_align, _gather])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align__no_boxes(path: Callable[..., Tensor], sampling_ratio: int) -> None:
    features = torch.randn(2, 4, 8, 8, requires_grad=True)
    pooled = path(features, torch.zeros(0, 5), (7, 7), 1 / 16, sampling_ratio, False)
    assert pooled.shape == (0, 4, 7, 7)
    pooled.sum().backward()
    assert features.grad is not None
    assert (features.grad == 0).all()


def test_roi_align__boxes_per_image_as_a_list() -> None:
    features, rois = torch.randn(3, 64, 20, 30), _boxes(90, 320, 480, images=3)
    rois = rois[rois[:, 0].argsort(stable=True)]
    listed = [rois[rois[:, 0] == image, 1:] for image in range(3)]
    assert torch.equal(roi_align(features, listed, 7, 1 / 16, 2), roi_align(features, rois, (7, 7), 1 / 16, 2))


def test_roi_align__memory_format_changes_nothing() -> None:
    features, rois = torch.randn(1, 64, 20, 30), _boxes(90, 320, 480)
    last = features.contiguous(memory_format=torch.channels_last)
    assert torch.equal(roi_align(last, rois, 7, 1 / 16, 2), roi_align(features, rois, 7, 1 / 16, 2))


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align__many_boxes_are_taken_in_chunks(sampling_ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, rois = torch.randn(1, 3, 20, 30, requires_grad=True), _boxes(90, 320, 480)
    expected = _gather(features, rois, (7, 7), 1 / 16, sampling_ratio, True)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), features)
    monkeypatch.setattr("lightning_convnext_det.ops.roi_align_gather._PAIRS_PER_CHUNK", 5000)
    pooled = _gather(features, rois, (7, 7), 1 / 16, sampling_ratio, True)
    assert torch.equal(pooled, expected)
    torch.testing.assert_close(torch.autograd.grad(pooled.square().sum(), features)[0], expected_gradient)


def test_roi_align__takes_the_gather_for_much_work_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def record(features: Tensor, *arguments: object) -> Tensor:
        calls.append(features)
        return _gather(features, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(roi_align_module, "roi_align_by_gather", record)
    features, rois = torch.randn(1, 64, 20, 30), _boxes(90, 320, 480)
    roi_align(features, rois, 7, 1 / 16, 2)
    assert len(calls) == 1
    roi_align(features, rois[:2], 7, 1 / 16, 2)
    monkeypatch.setenv("DISABLE_CUSTOM_KERNELS", "1")
    roi_align(features, rois, 7, 1 / 16, 2)
    assert len(calls) == 1


@pytest.mark.heavy
def test_roi_align__compiles_without_a_graph_break() -> None:
    features, rois = torch.randn(1, 64, 20, 30, requires_grad=True), _boxes(90, 320, 480)

    def pool(features: Tensor) -> Tensor:
        return roi_align(features, rois, 7, 1 / 16, 2) * 2

    compiled = torch.compile(pool, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features), pool(features))
    gradients = [torch.autograd.grad(f(features).square().sum(), features)[0] for f in (compiled, pool)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_roi_align__exports_as_torchvision() -> None:
    class Pool(nn.Module):
        def forward(self, features: Tensor, rois: Tensor) -> Tensor:
            return roi_align(features, rois, 7, 1 / 16, 2)

    features, rois = torch.randn(1, 64, 20, 30), _boxes(90, 320, 480)
    program = torch.export.export(Pool(), (features, rois), dynamic_shapes=({}, {0: torch.export.Dim("boxes")}))
    assert "torchvision.roi_align" in str(program.graph)
    torch.testing.assert_close(program.module()(features, rois[:50]), roi_align(features, rois[:50], 7, 1 / 16, 2))


@pytest.mark.parametrize(
    ("shape", "boxes", "message"),
    [
        ((4, 8, 8), torch.zeros(1, 5), "input must be [batch, channels, height, width], but its shape is [4, 8, 8]"),
        ((1, 4, 8, 8), torch.zeros(1, 4), "boxes as one tensor must be [K, 5]"),
        ((2, 4, 8, 8), [torch.zeros(1, 4)], "boxes are given for 1 images, but input holds 2"),
        ((1, 4, 8, 8), [torch.zeros(0)], "boxes of image 0 must be [L, 4], but their shape is [0]"),
        ((2, 4, 8, 8), torch.tensor([[2.0, 0, 0, 8, 8]]), "boxes name images 2 to 2, but input holds images 0 to 1"),
    ],
    ids=["no batch", "four columns", "an image without boxes", "flat boxes", "image 2 of 2"],
)
def test_roi_align__wrong_arguments(shape: tuple[int, ...], boxes: Tensor | list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        roi_align(torch.randn(shape), boxes, 7)


def test_roi_align__a_box_too_large_to_sample_every_pixel() -> None:
    rois = torch.tensor([[0.0, 0, 0, 8, 8], [0, 0, 0, 1e9, 8]]).repeat(100, 1)
    with pytest.raises(ValueError, match=re.escape("the bins of box 1 are 1.43e+08 pixels of the map long")):
        roi_align(torch.randn(1, 64, 8, 8), rois, 7, 1.0, 0)
    assert roi_align(torch.randn(1, 64, 8, 8), rois, 7, 1.0, 2).isfinite().all()


def test_roi_align__on_photos(photos: list[Tensor]) -> None:
    for photo in photos:
        image = photo[None] / 255
        rois = _boxes(300, image.shape[2], image.shape[3])
        expected = torchvision.ops.roi_align(image, rois, 7, 1.0, 2, True)
        torch.testing.assert_close(_gather(image, rois, (7, 7), 1.0, 2, True), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not GOLDENS.is_file(), reason="MMDetection's figures are not here")
def test_roi_align__equals_mmdetection() -> None:
    units = load_file(GOLDENS)
    pooled = _gather(units["roi_align.features"], units["roi_align.rois"], (7, 7), 0.125, 0, True)
    torch.testing.assert_close(pooled, units["roi_align.out"], rtol=0, atol=1e-5)


@pytest.mark.skipif(not GOLDENS.is_file(), reason="MMDetection's figures are not here")
def test_multi_scale_roi_align__assigns_mmdetection_levels() -> None:
    units = load_file(GOLDENS)
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 1, 0, aligned=True)
    # each level holds its own number, so that the pooled number is the level that was chosen
    maps = {str(i): torch.full((1, 1, 1024 >> i, 1024 >> i), float(i)) for i in range(4)}
    pooled = pooler(maps, [units["levels.boxes"]], [(4096, 4096)])
    assert torch.equal(pooled.flatten().round().long(), units["levels.out"])


def _pyramid(channels: int = 16) -> OrderedDict[str, Tensor]:
    return OrderedDict((str(i), torch.randn(2, channels, 96 >> i, 128 >> i, requires_grad=True)) for i in range(4))


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("names", [["0", "1", "2", "3"], ["1", "2"], ["2"]], ids=" ".join)
def test_multi_scale_roi_align__equals_torchvision(names: list[str], sampling_ratio: int) -> None:
    maps, sizes = _pyramid(), [(380, 500), (300, 512)]
    boxes = [_boxes(120, 384, 512)[:, 1:], _boxes(3, 384, 512)[:, 1:]]
    options = names, (7, 5), sampling_ratio
    results = []
    for pooler in (MultiScaleRoIAlign(*options), torchvision.ops.MultiScaleRoIAlign(*options)):
        pooled = pooler(maps, boxes, sizes)
        results.append([pooled, *torch.autograd.grad(pooled.square().sum(), [maps[name] for name in names])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_multi_scale_roi_align__aligned_moves_boxes_by_half_a_pixel_of_the_map() -> None:
    maps, boxes = OrderedDict([("0", torch.randn(1, 8, 32, 32))]), torch.rand(20, 4) * 40
    boxes[:, 2:] += boxes[:, :2] + 4
    pooled = MultiScaleRoIAlign(["0"], 7, 2, aligned=True)(maps, [boxes], [(128, 128)])
    moved = MultiScaleRoIAlign(["0"], 7, 2)(maps, [boxes - 2], [(128, 128)])  # stride 4, so half a pixel is 2
    torch.testing.assert_close(pooled, moved, rtol=1e-4, atol=1e-4)


def test_multi_scale_roi_align__bfloat16_and_no_boxes() -> None:
    maps = OrderedDict((name, features.bfloat16()) for name, features in _pyramid().items())
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    boxes = [_boxes(120, 384, 512)[:, 1:], torch.zeros(0, 4)]
    pooled = pooler(maps, boxes, [(384, 512)] * 2)
    assert pooled.dtype == torch.bfloat16
    exact = pooler({name: features.float() for name, features in maps.items()}, boxes, [(384, 512)] * 2)
    torch.testing.assert_close(pooled.float(), exact, rtol=0, atol=2 * torch.finfo(torch.bfloat16).eps)
    assert pooler(maps, [torch.zeros(0, 4)] * 2, [(384, 512)] * 2).shape == (0, 16, 7, 7)


def test_multi_scale_roi_align__takes_scales_from_every_batch() -> None:
    pooler, boxes = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2), [_boxes(20, 200, 250)[:, 1:]] * 2
    pooler({"0": torch.randn(2, 16, 12, 16), "1": torch.randn(2, 16, 6, 8)}, boxes, [(384, 512)] * 2)  # strides 32, 64
    maps = _pyramid()
    expected = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(maps, boxes, [(384, 512)] * 2)
    torch.testing.assert_close(pooler(maps, boxes, [(384, 512)] * 2), expected, rtol=1e-4, atol=1e-5)


def test_multi_scale_roi_align__serves_torchvision_detectors() -> None:
    backbone = nn.Conv2d(3, 8, 3, stride=16, padding=1)
    backbone.out_channels = 8  # type: ignore[assignment]
    anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(((32,),), ((1.0,),))
    results = []
    for pooler in (MultiScaleRoIAlign(["0"], 7, 2), torchvision.ops.MultiScaleRoIAlign(["0"], 7, 2)):
        torch.manual_seed(0)
        detector = torchvision.models.detection.FasterRCNN(
            backbone, 3, min_size=96, rpn_anchor_generator=anchors, box_roi_pool=pooler
        )
        with torch.no_grad():
            results.append(detector.eval()([torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(1))])[0])
    for key in ("boxes", "scores"):
        torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-4, atol=1e-3)


def test_multi_scale_roi_align__none_of_its_maps() -> None:
    with pytest.raises(ValueError, match=re.escape("no map of ['p2'] among those given, ['0', '1', '2', '3']")):
        MultiScaleRoIAlign(["p2"], 7, 2)(_pyramid(), [torch.zeros(0, 4)] * 2, [(384, 512)] * 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_roi_align__on_a_gpu(dtype: torch.dtype) -> None:
    features, rois = torch.randn(2, 32, 30, 40).to(dtype), _boxes(300, 480, 640, images=2)
    rois[0, 1] = float("nan")
    pooled = roi_align(features.cuda(), rois.cuda(), 7, 1 / 16, 2)
    assert pooled.dtype == dtype
    atol = max(1e-5, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(pooled.cpu(), roi_align(features, rois, 7, 1 / 16, 2), rtol=0, atol=atol)
