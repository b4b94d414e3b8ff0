"""A training step by MMDetection's convention against losses written from the papers in float64.

The samplers draw at random, so they are given room for every anchor and proposal; the rest must then agree. Taken from
the detector are only what its layers compute for given boxes, and the proposals.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.types import Target
from tests.models.rcnn.goldens import stages_of

Array = npt.NDArray[np.float64]
EVERYTHING = 10**6
SMALL = {
    "backbone": "test_convnext",
    "min_size": 90,
    "max_size": 160,
    "fpn_channels": 16,
    "box_head_features": 32,
    "rpn_batch_size_per_image": EVERYTHING,
    "box_batch_size_per_image": EVERYTHING,
    "rpn_positive_fraction": 0.5,
    "box_positive_fraction": 0.5,
    "convention": "mmdetection",
    "drop_path_rate": 0.0,
}
IMAGES = [torch.rand(3, 90, 140), torch.rand(3, 90, 100)]
OBJECTS = [
    # large, small (no anchor overlaps it by 0.7), two that share their best anchors, one at the border
    ([[20, 15, 90, 80], [100, 40, 109, 52], [30, 30, 62, 60], [31, 29, 63, 62], [0, 50, 30, 90]], [0, 2, 1, 0, 2]),
    ([], []),
]


def iou(a: Array, b: Array) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def giou(a: Array, b: Array) -> float:
    """arXiv:1902.09630, algorithm 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union - (hull - union) / hull


def encode(box: Array, truth: Array, stds: tuple[float, ...]) -> Array:
    w, h, tw, th = box[2] - box[0], box[3] - box[1], truth[2] - truth[0], truth[3] - truth[1]
    dx = ((truth[0] + truth[2]) - (box[0] + box[2])) / 2 / w
    dy = ((truth[1] + truth[3]) - (box[1] + box[3])) / 2 / h
    return np.array([dx, dy, math.log(tw / w), math.log(th / h)]) / np.array(stds)


def decode(box: Array, deltas: Array, stds: tuple[float, ...]) -> Array:
    dx, dy, dw, dh = deltas * np.array(stds)
    limit = math.log(1000 / 16)
    x, y = (box[0] + box[2]) / 2 + dx * (box[2] - box[0]), (box[1] + box[3]) / 2 + dy * (box[3] - box[1])
    w = (box[2] - box[0]) * math.exp(min(max(dw, -limit), limit)) / 2
    h = (box[3] - box[1]) * math.exp(min(max(dh, -limit), limit)) / 2
    return np.array([x - w, y - h, x + w, y + h])


def match(boxes: Array, truths: Array, high: float, low: float, own: float | None) -> list[int]:
    """Object of each box, -1 for background, -2 for neither; ``own`` is the least IoU of an object's best box."""
    table = np.array([[iou(b, t) for b in boxes] for t in truths]).reshape(len(truths), len(boxes))
    result = []
    for column in range(len(boxes)):
        best = int(table[:, column].argmax()) if len(truths) else -1
        overlap = table[best, column] if len(truths) else 0.0
        result.append(best if overlap >= high and best >= 0 else -1 if overlap < low else -2)
    for row in range(len(truths) if own is not None else 0):
        highest = table[row].max()
        # float32 overlaps that tie are not always equal in float64
        for column in np.flatnonzero(table[row] > highest - 1e-7) if highest >= own else ():
            result[int(column)] = row
    return result


def lay_anchors(maps: list[Tensor]) -> Array:
    rows = []
    for stride, (height, width) in zip((4, 8, 16, 32, 64), [m.shape[-2:] for m in maps], strict=True):
        for y in range(height):
            for x in range(width):
                for ratio in (0.5, 1.0, 2.0):
                    w, h = 8 * stride / math.sqrt(ratio) / 2, 8 * stride * math.sqrt(ratio) / 2
                    rows.append([x * stride - w, y * stride - h, x * stride + w, y * stride + h])
    return np.array(rows)


def rpn_losses(
    maps: list[Tensor], cls: list[Tensor], reg: list[Tensor], truths: list[Array], inside: bool, beta: float | None
) -> tuple[float, float]:
    anchors, sizes = lay_anchors(maps), [(90, 140), (90, 100)]
    objectness, boxes, count = 0.0, 0.0, 0
    for i, (truth, (height, width)) in enumerate(zip(truths, sizes, strict=True)):
        logits = np.concatenate([c[i].permute(1, 2, 0).reshape(-1).double().numpy() for c in cls])
        deltas = np.concatenate([r[i].permute(1, 2, 0).reshape(-1, 4).double().numpy() for r in reg])
        if inside:
            used = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
        else:  # cells beyond the image's own padding to a multiple of 32
            centres = (anchors[:, :2] + anchors[:, 2:]) / 2
            used = (centres[:, 0] < math.ceil(width / 32) * 32 - 1e-6) & (centres[:, 1] < math.ceil(height / 32) * 32)
        rows = np.flatnonzero(used)
        matches = match(anchors[rows], truth, 0.7, 0.3, 0.3)
        positives = sum(m >= 0 for m in matches)
        negatives = sum(m == -1 for m in matches)
        count += max(positives, 1) + max(negatives, 1)
        for row, m in zip(rows, matches, strict=True):
            if m == -2:
                continue
            objectness += math.log1p(math.exp(-logits[row])) if m >= 0 else math.log1p(math.exp(logits[row]))
            if m >= 0:
                gap = np.abs(deltas[row] - encode(anchors[row], truth[m], (1, 1, 1, 1)))
                boxes += (gap if beta is None else np.where(gap < beta, gap**2 / 2 / beta, gap - beta / 2)).sum()
    return objectness / count, boxes / count


def stage_losses(
    logits: Array,
    deltas: Array,
    boxes: Array,
    labels: list[int],
    truths: list[Array],
    stds: tuple[float, ...],
    kind: str,
) -> tuple[float, float]:
    """Losses of classes (0 is background) and boxes; ``truths`` are the objects' boxes of all samples with one."""
    classes, regression, positive = 0.0, 0.0, iter(truths)
    for row, label in enumerate(labels):
        shifted = logits[row] - logits[row].max()
        classes += math.log(np.exp(shifted).sum()) - shifted[label]
        if label:
            own, truth = deltas[row].reshape(-1, 4)[label], next(positive)
            if kind == "giou":
                regression += 1 - giou(decode(boxes[row], own, stds), truth)
            else:
                regression += np.abs(own - encode(boxes[row], truth, stds)).sum()
    return classes / len(labels), regression / len(labels)


def heads_losses(
    detector: FasterRCNN,
    features: dict[str, Tensor],
    proposals: list[Array],
    truths: list[Array],
    own: float | None,
    kind: str,
) -> list[tuple[float, float]]:
    all_stds = [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]
    sizes, losses = [(90, 140), (90, 100)], []
    for stage, stds, high in zip(stages_of(detector), all_stds, (0.5, 0.6, 0.7), strict=False):
        samples, labels, wanted, added = [], [], [], []
        for boxes, truth, (_, classes) in zip(proposals, truths, OBJECTS, strict=True):
            matches = match(boxes, truth, high, high, own) + list(range(len(truth)))
            samples.append(np.concatenate((boxes, truth)))
            labels += [0 if m < 0 else classes[m] + 1 for m in matches]
            wanted += [truth[m] for m in matches if m >= 0]
            added.append(np.arange(len(matches)) >= len(boxes))
        given = [torch.from_numpy(s).float() for s in samples]
        logits, deltas = (x.double().numpy() for x in stage.predict(features, given, sizes))
        rows = np.concatenate(samples)
        losses.append(stage_losses(logits, deltas, rows, labels, wanted, stds, kind))
        best = [label or int(logits[row, 1:].argmax()) + 1 for row, label in enumerate(labels)]
        moved = np.array([decode(b, deltas[r].reshape(-1, 4)[best[r]], stds) for r, b in enumerate(rows)])
        parts = np.split(moved, np.cumsum([len(s) for s in samples])[:-1])
        proposals = [
            np.stack([p[:, 0].clip(0, w), p[:, 1].clip(0, h), p[:, 2].clip(0, w), p[:, 3].clip(0, h)], 1)[~is_truth]
            for p, (h, w), is_truth in zip(parts, sizes, added, strict=True)
        ]
    return losses


def freeze_batch_norm(detector: FasterRCNN) -> None:
    """Make heads with BatchNorm compute the same however often they are asked."""
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()


def faster() -> FasterRCNN:
    return FasterRCNN(3, **SMALL, rpn_post_nms_top_n=(60, 1000))


def cascade(head: str) -> Callable[[], FasterRCNN]:
    return lambda: CascadeRCNN(3, **SMALL, box_head=head, rpn_post_nms_top_n=(60, 1000))


@pytest.mark.parametrize(
    "build", [faster, cascade("two_fc"), cascade("four_conv")], ids=["faster", "cascade-two_fc", "cascade-four_conv"]
)
def test_losses__equal_those_of_the_papers(build: Callable[[], FasterRCNN]) -> None:
    torch.manual_seed(2)
    detector = build().train()
    freeze_batch_norm(detector)
    with torch.no_grad():
        for parameter in detector.roi_heads.parameters():  # the last layers start so small that nothing would show
            if parameter.dim() == 2 and parameter.shape[0] in (4, 16):
                parameter.normal_(std=0.3)
        detector.rpn.head.bbox_pred.weight.normal_(std=0.05)
    targets: list[Target] = [
        {"boxes": torch.tensor(b, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(c, dtype=torch.int64)}
        for b, c in OBJECTS
    ]
    images = IMAGES
    seen: list[tuple[dict[str, Tensor], list[Tensor]]] = []
    original = detector.roi_heads.forward

    def watch(features: dict[str, Tensor], proposals: list[Tensor], *rest: object) -> object:
        seen.append((features, [p.clone() for p in proposals]))
        return original(features, proposals, *rest)

    detector.roi_heads.forward = watch
    losses = {name: float(value.detach()) for name, value in detector(images, targets).items()}
    features, proposals = seen[0]
    is_cascade = isinstance(detector, CascadeRCNN)
    truths = [np.array(b, dtype=np.float64).reshape(-1, 4) for b, _ in OBJECTS]
    with torch.no_grad():
        maps = list(features.values())
        cls, reg = detector.rpn.head(maps)
        expected = dict(
            zip(
                ("loss_objectness", "loss_rpn_box"),
                rpn_losses(maps, cls, reg, truths, is_cascade, 1 / 9 if is_cascade else None),
                strict=True,
            )
        )
        rows = [p.double().numpy() for p in proposals]
        stages = heads_losses(
            detector, features, rows, truths, None if is_cascade else 0.5, "giou" if is_cascade else "l1"
        )
    if is_cascade:
        for i, (weight, (classes, boxes)) in enumerate(zip((1, 0.5, 0.25), stages, strict=True), 1):
            expected |= {f"loss_classification_{i}": weight * classes, f"loss_box_{i}": weight * 10 * boxes}
    else:
        expected |= {"loss_classification": stages[0][0], "loss_box": stages[0][1]}
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert value > 1e-4, name
        assert losses[name] == pytest.approx(value, rel=2e-5), name
