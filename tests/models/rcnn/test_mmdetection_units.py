"""Single parts of the MMDetection convention against what MMDetection and mmcv compute."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from lightning_convnext_det.models.image_transform import ImageTransform
from lightning_convnext_det.models.rcnn.anchors import PyramidAnchors
from lightning_convnext_det.models.rcnn.box_coder import create_box_coder
from lightning_convnext_det.ops.nms import apply_nms, grouped_nms
from lightning_convnext_det.ops.resize import resize_like_opencv
from lightning_convnext_det.ops.roi_align import MultiScaleRoIAlign, roi_align
from tests.models.rcnn.goldens import GOLDENS, needs_goldens

pytestmark = needs_goldens


@pytest.fixture(scope="module")
def units() -> dict[str, Tensor]:
    return load_file(GOLDENS / "units" / "units.safetensors")


@pytest.fixture(scope="module")
def info() -> dict[str, Any]:
    return json.loads((GOLDENS / "units" / "units.json").read_text())


def test_anchors__equal(units: dict[str, Tensor], info: dict[str, Any]) -> None:
    strides = [4, 8, 16, 32, 64]
    anchors = PyramidAnchors([(8 * s,) for s in strides], (0.5, 1.0, 2.0), rounded=False, strides=strides)
    for i, cell in enumerate(anchors.cell_anchors):
        assert torch.equal(cell, units[f"anchors.base{i}"])
    maps = [torch.zeros(1, 1, *size) for size in info["anchors"]["sizes"]]
    for i, placed in enumerate(anchors(tuple(info["anchors"]["padded"]), maps)):
        assert torch.equal(placed, units[f"anchors.level{i}"])


@pytest.mark.parametrize("out", ["out0", "out1", "out2", "out3"])
def test_decode__equal(units: dict[str, Tensor], info: dict[str, Any], out: str) -> None:
    coder = create_box_coder(tuple(info["decode"]["stds"][out]), "mmdetection")
    moved = coder.decode_single(units["decode.deltas"], units["decode.rois"]).unflatten(1, (-1, 4))  # [N, K, 4]
    clipped = clip_boxes_to_image(moved, info["decode"]["max_shape"])
    # processors round the last bit of exp, which every side is multiplied by, and of fused sums differently
    extent = (moved[..., :2].abs() + moved[..., 2:].abs()).repeat(1, 1, 2)
    error = (clipped - units[f"decode.{out}"].unflatten(1, (-1, 4))).abs()
    assert (error <= 2 * torch.finfo(torch.float32).eps * extent).all()


def test_encode__inverts_decode(units: dict[str, Tensor]) -> None:
    coder = create_box_coder((0.1, 0.1, 0.2, 0.2), "mmdetection")
    boxes, deltas = units["decode.rois"][5:].double(), units["decode.deltas"][5:, :4].double().clamp(-3, 3)
    torch.testing.assert_close(coder.encode_single(coder.decode_single(deltas, boxes), boxes), deltas)


def test_levels__equal(units: dict[str, Tensor]) -> None:
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 0, strides=[4, 8, 16, 32], margin="side")
    levels = pooler._assign_levels(units["levels.boxes"], [1 / 4, 1 / 8, 1 / 16, 1 / 32])
    assert torch.equal(levels, units["levels.out"])


@pytest.mark.parametrize("custom_kernels", ["0", "1"])
def test_roi_align__equal(units: dict[str, Tensor], custom_kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_CUSTOM_KERNELS", custom_kernels)
    # as many channels as make the gathered way worth it
    features = units["roi_align.features"].repeat(1, 32, 1, 1)
    found = roi_align(features, units["roi_align.rois"], 7, 1 / 8, 0, True)
    torch.testing.assert_close(found, units["roi_align.out"].repeat(1, 32, 1, 1), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("name", "threshold"), [("rpn", 0.7), ("rcnn", 0.5), ("edge", 0.5)])
def test_grouped_nms__equal(units: dict[str, Tensor], name: str, threshold: float) -> None:
    boxes, scores, groups = (units[f"nms_{name}.{key}"] for key in ("boxes", "scores", "ids"))
    assert torch.equal(grouped_nms(boxes, scores, groups, threshold, "offset"), units[f"nms_{name}.keep"])


def test_suppress__many_classes_equal(units: dict[str, Tensor]) -> None:
    boxes, scores = units["multiclass.boxes"].unflatten(1, (80, 4)), units["multiclass.scores"]
    row, label = torch.where(scores[:, :-1] > 0.05)
    found = apply_nms(boxes[row, label], scores[row, label], label, "hard", 0.5, 0.5, "offset")
    assert torch.equal(torch.cat((found[0], found[1][:, None]), dim=1)[:100], units["multiclass.dets"])
    assert torch.equal(found[2][:100], units["multiclass.labels"])


def test_new_size__equal(info: dict[str, Any]) -> None:
    for width, height, longer, shorter, new_width, new_height in info["rescale"]["rows"]:
        # the scale's two numbers count as long and short edge, in either order
        transform = ImageTransform(min(longer, shorter), max(longer, shorter), resize="opencv").eval()
        assert transform.new_size(height, width) == (new_height, new_width)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_resize_like_opencv__equal(units: dict[str, Tensor], i: int) -> None:
    image, expected = (units[f"resize{i}.{key}"].permute(2, 0, 1) for key in ("image", "out"))
    assert torch.equal(resize_like_opencv(image, tuple(expected.shape[1:])), expected)


def test_resize_like_opencv__whole_image() -> None:
    """Both a smaller and a larger image, every pixel."""
    for model in ("mask_rcnn_convnext_mini", "cascade_rcnn_convnext_mini"):
        meta = json.loads((GOLDENS / model / "meta.json").read_text())["cases"]["small_a"]
        golden = load_file(GOLDENS / model / "small_a.safetensors")["resized_rgb_uint8"].permute(2, 0, 1)
        image = torch.from_numpy(np.array(Image.open(GOLDENS / "images" / meta["image"]).convert("RGB")))
        assert torch.equal(resize_like_opencv(image.permute(2, 0, 1), tuple(golden.shape[1:])), golden)
