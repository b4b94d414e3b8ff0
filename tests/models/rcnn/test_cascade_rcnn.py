import inspect

import pytest
import torch
from torch import Tensor, nn

from lightning_convnext_det.models.rcnn.box_losses import DecodedBoxLoss
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.types import Target

SMALL = {"min_size": 64, "max_size": 96, "fpn_channels": 32, "box_head_features": 32}


def tiny(**options: object) -> CascadeRCNN:
    return CascadeRCNN(3, backbone="test_convnext", **{**SMALL, **options})


def target(boxes: list[list[float]], labels: list[int]) -> Target:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


@pytest.mark.heavy
@pytest.mark.parametrize("base", ["mmdetection", "torchvision"])
@pytest.mark.parametrize("box_loss", ["giou", "l1", "smooth_l1"])
def test_cascade_rcnn__every_parameter_has_a_gradient(base: str, box_loss: str) -> None:
    detector = tiny(convention={"base": base, "box_loss": box_loss})
    losses = detector([torch.rand(3, 50, 70), torch.rand(3, 64, 64)], [target([[5, 5, 40, 45]], [2]), target([], [])])
    names = [f"loss_{kind}_{stage}" for stage in (1, 2, 3) for kind in ("classification", "box")]
    assert list(losses) == ["loss_objectness", "loss_rpn_box", *names]
    assert all(x > 0 for x in losses.values())
    sum(losses.values()).backward()
    assert [n for n, p in detector.named_parameters() if p.grad is None] == []


def test_cascade_rcnn__images_without_objects() -> None:
    detector = tiny()
    losses = detector([torch.rand(3, 50, 70)], [target([], [])])
    assert [n for n, x in losses.items() if x == 0] == ["loss_rpn_box", *(f"loss_box_{i}" for i in (1, 2, 3))]
    sum(losses.values()).backward()
    assert [n for n, p in detector.named_parameters() if p.grad is None] == []


def test_cascade_rcnn__no_proposals() -> None:
    detector = tiny(rpn_score_threshold=1.0)
    losses = detector([torch.rand(3, 64, 64)], [target([], [])])
    assert all(x.isfinite() for x in losses.values())
    detector([torch.rand(3, 64, 64)], [target([[5, 5, 40, 45]], [2])])["loss_box_3"].backward()
    with torch.no_grad():
        found = detector.eval()([torch.rand(3, 64, 64), torch.rand(3, 64, 64)])
    assert [d["boxes"].shape for d in found] == [(0, 4), (0, 4)]


def test_cascade_rcnn__one_stage_is_faster_rcnn() -> None:
    cascade = tiny(stage_iou_thresholds=[0.5], stage_loss_weights=[1.0], box_head="two_fc", score_threshold=0.0).eval()
    faster = FasterRCNN(3, "test_convnext", **SMALL, convention="mmdetection", score_threshold=0.0).eval()
    faster.load_state_dict({k.replace(".stages.0.", "."): v for k, v in cascade.state_dict().items()})
    image = torch.rand(3, 64, 80)
    with torch.no_grad():
        ours, theirs = cascade([image])[0], faster([image])[0]
    assert len(ours["boxes"]) == 100
    assert all(torch.equal(ours[key], theirs[key]) for key in ("boxes", "labels", "scores"))


def test_cascade_rcnn__stages_train_on_what_the_one_before_has_moved() -> None:
    detector = tiny(box_batch_size_per_image=64)
    seen: list[list[Tensor]] = []
    for stage in detector.roi_heads.stages:
        stage.box_roi_pool = Watch(stage.box_roi_pool, seen)
    detector([torch.rand(3, 64, 64)], [target([[5, 5, 40, 45], [20, 20, 60, 60]], [2, 0])])
    truth = torch.tensor([[5.0, 5, 40, 45], [20, 20, 60, 60]])
    first, second, third = (boxes[0] for boxes in seen)
    assert len(first) == 64
    # the objects' own boxes are left out and added anew, so a stage sees at most as many as the one before
    assert len(second) <= 64
    assert len(third) <= len(second)
    assert not torch.equal(first[: len(second)], second)
    for boxes in (first, second, third):
        own = (boxes[:, None] == truth).all(dim=2).sum(dim=0)
        assert own.le(1).all()
        assert boxes.min() >= 0
        assert boxes.max() <= 64


class Watch(nn.Module):
    """Remembers the boxes that a pooler is given."""

    def __init__(self, pooler: nn.Module, seen: list[list[Tensor]]) -> None:
        super().__init__()
        self.pooler, self.seen = pooler, seen

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Tensor:
        self.seen.append(boxes)
        return self.pooler(features, boxes, shapes)


def test_cascade_rcnn__float32_edges_under_bfloat16() -> None:
    detector = tiny(score_threshold=0.0).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = detector([torch.rand(3, 60, 80)])[0]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train()([torch.rand(3, 60, 80)], [target([[10, 20, 61, 50]], [1])])
    assert {x.dtype for x in losses.values()} == {torch.float32}


def test_cascade_rcnn__nms_can_be_changed() -> None:
    detector = tiny(score_threshold=0.0, nms_threshold=0.1).eval()
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        hard = detector([image])[0]
        detector.nms = "none"
        assert len(detector([image])[0]["boxes"]) > len(hard["boxes"])


def test_cascade_rcnn__its_defaults_are_its_own_where_the_command_line_hands_on_those_of_faster_rcnn() -> None:
    faster, cascade = (inspect.signature(callee).parameters for callee in (FasterRCNN, CascadeRCNN))
    shared = set(faster) & set(cascade) - {"self", "num_classes"}
    assert {name: faster[name].default for name in shared} == {name: cascade[name].default for name in shared}
    detector = tiny()
    stage = detector.roi_heads.stages[0]
    assert isinstance(stage.box_loss, DecodedBoxLoss)  # GIoU
    assert stage.box_loss_weight == 10
    assert stage.box_roi_pool.aligned
    assert len(stage.box_head) == 7  # four convolutions, flatten, one layer and its activation
    crossing = torch.tensor([[-1.0, 5, 20, 20], [5, 5, 20, 20]])
    assert detector.rpn.usable_anchors(crossing, (32, 32)).tolist() == [False, True]


def test_cascade_rcnn__mistakes() -> None:
    with pytest.raises(ValueError, match="stage_iou_thresholds has 2 stages, stage_loss_weights 3; expected the same"):
        tiny(stage_iou_thresholds=[0.5, 0.6])
    with pytest.raises(TypeError, match="box_fg_iou_threshold is for Faster R-CNN; give stage_iou_thresholds"):
        tiny(box_fg_iou_threshold=0.6)
    with pytest.raises(ValueError, match="box_head is 'fc'; choose two_fc or four_conv"):
        tiny(box_head="fc")
    with pytest.raises(ValueError, match="convention is 'detectron2'; choose torchvision or mmdetection"):
        tiny(convention="detectron2")
