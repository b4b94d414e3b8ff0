"""Merge the detections of overlapping windows (tiles): an object that several windows see is found once.

Two detections of different windows belong to one object if they agree in the area that both windows see. A box that a
window has cut is compared with what the other window sees of the same area, so the half of an object matches its whole,
and two neighbours do not match although their boxes may overlap. Detections of one window are never merged with each
other: the detector itself has decided that they are different objects. What only windows found that cut it, although
another window sees all of it, is a wrong guess at a part, and dropped.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_convnext_det.ops.windows import find_cut_sides

TileMerge = Literal["nmm", "nms", "wbf"]
AGREEMENT = 0.5  # IoU in the common area: that of COCO's loosest match
CONTAINMENT = 0.7  # share of a cut box inside another, whose part it is located too badly for
_BOXES = 1024  # compared with all windows at a time
PART_AGREEMENT = 0.3  # IoU that it needs all the same: a wrong box of half the image contains every part in it


def merge_windows(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    sources: Tensor,
    windows: Tensor,
    method: TileMerge = "nmm",
    margin: float = 4.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the detections of all windows of an image into one list.

    >>> windows = torch.tensor([[0.0, 0.0, 100.0, 100.0], [80.0, 0.0, 180.0, 100.0]])
    >>> boxes = torch.tensor([[20.0, 10.0, 100.0, 30.0], [80.0, 10.0, 150.0, 30.0]])  # two parts of one object
    >>> merge_windows(boxes, torch.tensor([0.8, 0.9]), torch.tensor([0, 0]), torch.tensor([0, 1]), windows)
    (tensor([[ 20.,  10., 150.,  30.]]), tensor([0.9000]), tensor([0]))

    Args:
        boxes: corners (x1, y1, x2, y2) in pixels of the image, float [N, 4].
        scores: confidences, float [N].
        labels: classes, int64 [N]; only detections of one class are merged.
        sources: index of the window in which each was found, int64 [N].
        windows: corners in pixels of the image, [W, 4]; together they cover the image. One may be the whole image.
        method: box and score of an object that several windows see. ``nmm`` (non-maximum merging) and ``nms`` take the
            highest score; ``wbf`` its mean over the smallest windows that see the object whole, where one that does not
            find it counts 0. Of boxes that no window has cut, if there are any, those of the smallest windows count:
            ``nmm`` and ``nms`` take the one of highest score, ``wbf`` their mean weighted by score. If all are cut,
            ``nmm`` and ``wbf`` take the box around them, ``nms`` the largest part, and all the highest score.
        margin: how close to a window's border a box counts as cut, in pixels.

    Returns:
        Boxes, scores and labels by descending score.
    """
    if len(boxes) == 0:
        return boxes, scores, labels
    device = boxes.device
    windows = windows.to("cpu", torch.float32)
    on_cpu, places, frames = boxes.cpu(), sources.cpu(), windows[sources.cpu()]
    cut = find_cut_sides(on_cpu, frames, windows[:, 2:].amax(0), margin).any(dim=1)
    clusters = _cluster(on_cpu, labels.cpu(), places, windows, cut)
    new_boxes, new_scores = on_cpu.clone(), scores.cpu().clone()
    size = (frames[:, 2:] - frames[:, :2]).prod(dim=1)
    for members in clusters:
        if len(members) > 1:
            of_object = torch.tensor(members)
            merged = _merged_box(on_cpu[of_object], new_scores[of_object], cut[of_object], size[of_object], method)
            new_boxes[members[0]] = merged
            if method != "wbf":
                new_scores[members[0]] = new_scores[of_object].max()
    rows = torch.tensor([members[0] for members in clusters])
    if method == "wbf":
        new_scores[rows] = _mean_scores(clusters, new_boxes[rows], new_scores, cut, size, windows, margin)
    all_cut = torch.tensor([bool(cut[members].all()) for members in clusters])
    unconfirmed = _count_tiles(new_boxes[rows[all_cut]], windows, margin) > 0
    rows = rows[~all_cut.masked_scatter(all_cut, unconfirmed)]
    rows = rows[new_scores[rows].argsort(descending=True, stable=True)]
    return new_boxes[rows].to(device), new_scores[rows].to(device), labels[rows.to(device)]


def _mean_scores(
    clusters: list[list[int]], boxes: Tensor, scores: Tensor, cut: Tensor, size: Tensor, windows: Tensor, margin: float
) -> Tensor:
    """Mean score over the tiles that see an object whole, 0 where one misses it; the highest where only others do."""
    tile = (windows[:, 2:] - windows[:, :2]).prod(dim=1).min()
    mean = torch.zeros(len(clusters))
    seen = _count_tiles(boxes, windows, margin)
    for i, members in enumerate(clusters):
        rows = torch.tensor(members)
        voters = scores[rows][~cut[rows] & (size[rows] == tile)]
        mean[i] = voters.sum() / max(len(voters), int(seen[i])) if len(voters) else scores[rows].max()
    return mean


def _count_tiles(boxes: Tensor, windows: Tensor, margin: float) -> Tensor:
    """How many of the smallest windows see a box and do not cut it, int64 [N]."""
    size = (windows[:, 2:] - windows[:, :2]).prod(dim=1)
    tiles = windows[size == size.min()]  # the pass over the whole image may be too coarse for the object
    counts = []
    for some in torch.split(boxes, _BOXES):
        pairs = some.repeat_interleave(len(tiles), 0), tiles.repeat(len(some), 1)
        cut = find_cut_sides(*pairs, windows[:, 2:].amax(0), margin).any(dim=1).view(-1, len(tiles))
        low, high = tiles[:, :2] - margin, tiles[:, 2:] + margin
        inside = ((some[:, None, :2] >= low) & (some[:, None, 2:] <= high)).all(dim=2)
        counts.append((inside & ~cut).sum(dim=1))
    return torch.cat(counts)


def _merged_box(boxes: Tensor, scores: Tensor, cut: Tensor, size: Tensor, method: TileMerge) -> Tensor:
    """The box of one object from those that the windows give, [4]."""
    if cut.all():
        if method == "nms":
            return boxes[(boxes[:, 2:] - boxes[:, :2]).prod(dim=1).argmax()]
        return torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])
    finest = ~cut & (size == size[~cut].min())  # the pass over the whole image sees an object smaller than a tile does
    boxes, scores = boxes[finest], scores[finest]
    if method == "wbf":
        weights = scores / scores.sum().clamp(min=1e-12)
        return (boxes * weights[:, None]).sum(0)
    return boxes[scores.argmax()]


def _cluster(boxes: Tensor, labels: Tensor, sources: Tensor, windows: Tensor, cut: Tensor) -> list[list[int]]:
    """Group detections of one object, at most one of each window; the closest pairs are joined first."""
    first, second, affinity = _pairs(boxes, labels, sources, windows, cut)
    order = affinity.argsort(descending=True, stable=True)
    group = list(range(len(boxes)))
    members = [[i] for i in group]
    seen = [1 << source for source in sources.tolist()]  # the windows of a group, as bits
    for i, j in zip(first[order].tolist(), second[order].tolist(), strict=True):
        a, b = group[i], group[j]
        if a == b or seen[a] & seen[b]:
            continue
        a, b = (a, b) if len(members[a]) >= len(members[b]) else (b, a)
        for member in members[b]:
            group[member] = a
        members[a] += members[b]
        seen[a] |= seen[b]
        members[b] = []
    return [group_members for group_members in members if group_members]


def _pairs(
    boxes: Tensor, labels: Tensor, sources: Tensor, windows: Tensor, cut: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of detections that may be of one object: two indices int64 [P] and how well they agree, float [P]."""
    low, high = torch.maximum(windows[:, None, :2], windows[:, :2]), torch.minimum(windows[:, None, 2:], windows[:, 2:])
    overlaps = (low < high).all(dim=2)  # only these can see the same object
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for source in sorted(set(sources.tolist())):
        rows = (sources == source).nonzero()[:, 0]
        others = ((sources > source) & overlaps[source, sources]).nonzero()[:, 0]
        affinity = _affinity(
            boxes[rows], cut[rows], windows[source], boxes[others], cut[others], windows[sources[others]]
        )
        affinity = affinity * (labels[rows, None] == labels[others])
        i, j = affinity.nonzero(as_tuple=True)
        found.append((rows[i], others[j], affinity[i, j]))
    first, second, affinity = (torch.cat(parts) for parts in zip(*found, strict=True))
    return first, second, affinity


def _affinity(boxes: Tensor, cut: Tensor, window: Tensor, others: Tensor, others_cut: Tensor, frames: Tensor) -> Tensor:
    """How well detections of one window agree with those of others, [N, M]: above 1 by IoU, up to 1 by containment."""
    low, high = torch.maximum(window[:2], frames[:, :2]), torch.minimum(window[2:], frames[:, 2:])  # seen by both
    high = torch.maximum(low, high)
    a_low, a_high = (torch.clamp(x[:, None], low, high) for x in (boxes[:, :2], boxes[:, 2:]))  # [N, M, 2]
    b_low, b_high = torch.clamp(others[:, :2], low, high), torch.clamp(others[:, 2:], low, high)  # [M, 2]
    shared = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(dim=2)
    union = (a_high - a_low).prod(dim=2) + (b_high - b_low).prod(dim=1) - shared
    agreement = shared / union.clamp(min=1e-12)
    sides = torch.minimum(boxes[:, None, 2:], others[:, 2:]) - torch.maximum(boxes[:, None, :2], others[:, :2])
    inside = sides.clamp(min=0).prod(dim=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)[:, None].clamp(min=1e-12)
    other_areas = (others[:, 2:] - others[:, :2]).prod(dim=1).clamp(min=1e-12)
    contained = torch.maximum(inside / areas * cut[:, None], inside / other_areas * others_cut)
    is_part = (contained >= CONTAINMENT) & (agreement >= PART_AGREEMENT)
    weak = torch.where(is_part, contained.clamp(max=1), torch.zeros(()))
    return torch.where(agreement >= AGREEMENT, 1 + agreement, weak)
