from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from lightning_convnext_det.models.deformable_detr.criterion import Objects, Predictions, SetCriterion
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
from lightning_convnext_det.models.ignored_regions import find_ignored
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.models.rcnn.matcher import leave_out_ignored
from lightning_convnext_det.types import Target

RCNN = {"backbone": "test_convnext", "min_size": 64, "max_size": 96, "fpn_channels": 16, "box_head_features": 16}
DETR = {**{k: RCNN[k] for k in ("backbone", "min_size", "max_size")}, "num_queries": 8, "hidden_dim": 32}
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "faster": lambda: FasterRCNN(2, **RCNN),
    "faster, mmdetection": lambda: FasterRCNN(2, convention="mmdetection", **RCNN),
    "cascade": lambda: CascadeRCNN(2, box_head="two_fc", **RCNN),
    "detr": lambda: DeformableDETR(2, encoder_layers=1, decoder_layers=2, feedforward_dim=32, dropout=0.0, **DETR),
}


def inside_share(box: list[float], region: list[float]) -> float:
    """By hand, in float64."""
    width = max(0.0, min(box[2], region[2]) - max(box[0], region[0]))
    height = max(0.0, min(box[3], region[3]) - max(box[1], region[1]))
    return width * height / ((box[2] - box[0]) * (box[3] - box[1]))


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 50
    return torch.cat([corners, corners + 1 + torch.rand(count, 2, generator=generator) * 30], dim=1)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_find_ignored__as_a_loop(count: int) -> None:
    boxes, regions = random_boxes(300, 1), random_boxes(count, 2)
    wanted = [any(inside_share(b, r) >= 0.5 for r in regions.tolist()) for b in boxes.tolist()]
    assert 0 < sum(wanted) < 300
    assert find_ignored(boxes, regions).tolist() == wanted
    assert find_ignored(boxes.expand(2, 3, -1, -1), regions.expand(3, -1, -1))[1, 2].tolist() == wanted


def test_find_ignored__nothing() -> None:
    region = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    assert find_ignored(torch.zeros(0, 4), region).shape == (0,)
    assert find_ignored(region, torch.zeros(0, 4)).tolist() == [False]
    assert find_ignored(torch.tensor([[3.0, 3.0, 3.0, 5.0]]), region).tolist() == [False]
    assert find_ignored(region, torch.tensor([[3.0, 3.0, 3.0, 5.0]])).tolist() == [False]


def test_leave_out_ignored__objects_stay() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 16.0, 10.0]])
    target = {"ignored": torch.tensor([[0.0, 0.0, 10.0, 10.0]])}
    assert leave_out_ignored(torch.tensor([0, 2, 0]), boxes, target).tolist() == [-1, 2, 0]
    assert leave_out_ignored(torch.tensor([0, 2, 0]), boxes, {}).tolist() == [0, 2, 0]


def losses_of(detector: nn.Module, target: Target) -> dict[str, float]:
    torch.manual_seed(3)
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    return {name: float(x.detach()) for name, x in detector.train()([image], [target]).items()}


@pytest.mark.parametrize("name", list(BUILDERS))
def test_detector__whole_image_ignored(name: str) -> None:
    """Nothing in the image is background then, except for anchors that lie for more than half outside."""
    detector = BUILDERS[name]()
    nothing = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    region = Target(
        boxes=torch.tensor([[0.0, 0.0, 64.0, 64.0]]), labels=torch.tensor([1]), iscrowd=torch.tensor([True])
    )
    before, after = losses_of(detector, nothing), losses_of(detector, region)
    classification = [key for key in before if "classification" in key]
    assert classification
    assert all(before[key] > 0 and after[key] == 0 for key in classification)
    if name == "faster, mmdetection":  # whose anchors beyond the border are not left out
        assert after["loss_objectness"] > 0


def test_box_heads__sample_no_background_in_regions() -> None:
    detector = FasterRCNN(2, box_batch_size_per_image=64, **RCNN)
    proposals, objects = random_boxes(100, 4), torch.tensor([[2.0, 2.0, 20.0, 20.0]])
    target = Target(boxes=objects, labels=torch.tensor([1]), ignored=torch.tensor([[0.0, 0.0, 50.0, 50.0]]))
    sample = detector.roi_heads.sample([proposals], [target])[0]
    background = sample.boxes[sample.labels == 0].tolist()
    assert background
    assert all(inside_share(box, [0.0, 0.0, 50.0, 50.0]) < 0.5 for box in background)
    assert [2.0, 2.0, 20.0, 20.0] in sample.boxes[sample.labels == 1].tolist()  # the object in the region is learned


def test_criterion__as_a_loop_over_queries() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 2, 6, 3, generator=generator)
    boxes = torch.rand(2, 2, 6, 4, generator=generator) * 0.3 + 0.3
    objects = torch.tensor([[0.4, 0.4, 0.3, 0.3]]), torch.zeros(0, 4)
    labels = torch.tensor([2]), torch.zeros(0, dtype=torch.int64)
    regions = torch.zeros(0, 4), torch.tensor([[0.4, 0.4, 0.5, 0.5], [0.8, 0.8, 0.1, 0.1]])
    criterion = SetCriterion()
    plain = criterion(Predictions(logits, boxes), Objects.from_lists(objects, labels))
    found = criterion(Predictions(logits, boxes), Objects.from_lists(objects, labels, 1, regions))
    for layer, suffix in enumerate(("_aux0", "")):
        left_out = 0.0
        for box, query in zip(boxes[layer, 1].tolist(), logits[layer, 1], strict=True):
            x, y, width, height = box
            corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            if inside_share(corners, [0.15, 0.15, 0.65, 0.65]) >= 0.5:
                left_out += float(sigmoid_focal_loss(query, torch.zeros(3), reduction="sum"))
        assert left_out > 0
        expected = float(plain[f"loss_classification{suffix}"]) - 2 * left_out
        assert float(found[f"loss_classification{suffix}"]) == pytest.approx(expected, abs=1e-5)
        assert found[f"loss_box{suffix}"] == plain[f"loss_box{suffix}"]
