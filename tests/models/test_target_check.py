from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes

from lightning_convnext_det.errors import DataError
from lightning_convnext_det.models import target_check
from lightning_convnext_det.models.target_check import prepare_targets

CPU = torch.device("cpu")
CORNERS = [[1.0, 2.0, 30.0, 40.0], [5.0, 6.0, 9.0, 20.0]]


def prepare(**target: Any) -> dict[str, Tensor]:
    return dict(prepare_targets([torch.zeros(3, 64, 64)], [target], 3, CPU)[0])


@pytest.mark.parametrize(
    "boxes",
    [
        torch.tensor(CORNERS),
        torch.tensor(CORNERS, dtype=torch.float64),
        torch.tensor(CORNERS, dtype=torch.float16),
        torch.tensor(CORNERS, dtype=torch.int64),
        torch.tensor(CORNERS, dtype=torch.uint8),
        BoundingBoxes(CORNERS, format="XYXY", canvas_size=(64, 64)),
        BoundingBoxes([[1, 2, 29, 38], [5, 6, 4, 14]], format="XYWH", canvas_size=(64, 64)),
        BoundingBoxes([[15.5, 21, 29, 38], [7, 13, 4, 14]], format="CXCYWH", canvas_size=(64, 64)),
    ],
    ids=["float32", "float64", "float16", "int64", "uint8", "XYXY", "XYWH", "CXCYWH"],
)
def test_prepare_targets__boxes_of_any_kind(boxes: Tensor) -> None:
    before = boxes.clone()
    found = prepare(boxes=boxes, labels=torch.tensor([0, 2], dtype=torch.int32))
    assert type(found["boxes"]) is Tensor
    assert found["boxes"].dtype == torch.float32
    assert found["boxes"].tolist() == CORNERS
    assert found["labels"].dtype == torch.int64
    assert found["labels"].tolist() == [0, 2]
    assert torch.equal(boxes, before)


@pytest.mark.parametrize("boxes", [torch.tensor([]), torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64)])
@pytest.mark.parametrize("labels", [torch.tensor([]), torch.zeros(0, dtype=torch.int64)])
def test_prepare_targets__no_boxes(boxes: Tensor, labels: Tensor) -> None:
    found = prepare(boxes=boxes, labels=labels)
    assert (found["boxes"].shape, found["boxes"].dtype) == ((0, 4), torch.float32)
    assert (found["labels"].shape, found["labels"].dtype) == ((0,), torch.int64)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_prepare_targets__crowd_regions_are_left_out(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[5.0, 5.0, 5.0, 9.0], *CORNERS])  # the crowd region has no area, which does not matter
    crowd = torch.tensor([1, 0, 0], dtype=dtype)
    found = prepare(boxes=boxes, labels=torch.tensor([9, 0, 1]), iscrowd=crowd, area=torch.ones(3), image_id=4)
    assert found["boxes"].tolist() == CORNERS
    assert found["labels"].tolist() == [0, 1]
    assert found["ignored"].tolist() == [[5.0, 5.0, 5.0, 9.0]]
    assert "ignored" not in prepare(boxes=boxes[1:], labels=torch.tensor([0, 1]), iscrowd=torch.zeros(2))
    assert len(prepare(boxes=boxes, labels=torch.tensor([0, 0, 0]), iscrowd=torch.ones(3))["boxes"]) == 0


@pytest.mark.parametrize("extra", [{}, {"image_id": 7}, {"image_id": torch.tensor([7])}, {"image_id": torch.tensor(7)}])
def test_prepare_targets__image_id_in_any_form(extra: dict[str, Any]) -> None:
    assert prepare(boxes=torch.tensor(CORNERS), labels=torch.tensor([0, 1]), **extra)["labels"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"labels": torch.zeros(0)}, "LCD-D112.*target of image 0 of the batch has no 'boxes'; it has 'labels'"),
        ({"boxes": torch.zeros(0, 4), "class": 1}, "has no 'labels'; it has 'boxes', 'class'"),
        ({"boxes": torch.zeros(4), "labels": torch.zeros(1)}, r"LCD-D112.*boxes \[4\] and labels \[1\]"),
        ({"boxes": torch.tensor(CORNERS), "labels": torch.tensor([0])}, "LCD-D112.*2 boxes but 1 labels"),
        ({"boxes": torch.tensor(CORNERS), "labels": torch.tensor([0.0, 1.0])}, "LCD-D112.*labels are torch.float32"),
        (
            {"boxes": torch.tensor(CORNERS), "labels": torch.tensor([0, 1]), "iscrowd": torch.tensor([1])},
            r"LCD-D112.*2 boxes but iscrowd is \[1\]",
        ),
        ({"boxes": torch.tensor(CORNERS), "labels": torch.tensor([0, 3])}, "LCD-D110.*label 3 in image 0 of the batch"),
        ({"boxes": torch.tensor([[5, 5, 5, 9]]), "labels": torch.tensor([0])}, "LCD-D101.*has no area"),
    ],
)
def test_prepare_targets__mistakes(target: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(**target)


def test_prepare_targets__one_target_per_image() -> None:
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}
    with pytest.raises(ValueError, match="got 2 images and 1 targets"):
        prepare_targets(torch.zeros(2, 3, 8, 8), [target], 3, CPU)
    with pytest.raises(ValueError, match="give a list with one target per image"):
        prepare_targets(torch.zeros(2, 3, 8, 8), target, 3, CPU)


def test_prepare_targets__boxes_of_another_frame_are_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_check, "_warned", set())
    image, label = torch.zeros(3, 40, 50), torch.tensor([0])
    for box, said in (([20, 10, 60, 30], 0), ([40, 10, 90, 30], 1), ([40, 10, 90, 30], 1)):  # 0.75 and 0.2 inside
        (found,) = prepare_targets([image], [{"boxes": torch.tensor([box]), "labels": label}], 1, torch.device("cpu"))
        assert found["boxes"].tolist() == [box]
        assert caplog.text.count("[LCD-D105] target box") == said
