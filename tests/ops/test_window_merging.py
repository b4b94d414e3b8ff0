import pytest
import torch
from torch import Tensor

from lightning_convnext_det.ops.window_merging import TileMerge, merge_windows

LEFT, RIGHT, WHOLE = (0, 0, 100, 100), (80, 0, 180, 100), (0, 0, 180, 100)


def merge(
    found: list[tuple[int, list[float], float]],
    method: TileMerge = "nmm",
    windows: tuple[tuple[int, ...], ...] = (LEFT, RIGHT, WHOLE),
) -> list[tuple[list[float], float]]:
    """Merge detections (window, box, score) of one class."""
    boxes, scores, _ = merge_windows(
        torch.tensor([box for _, box, _ in found]).float(),
        torch.tensor([score for _, _, score in found]),
        torch.zeros(len(found), dtype=torch.int64),
        torch.tensor([window for window, _, _ in found]),
        torch.tensor(windows),
        method,
        margin=2.0,
    )
    return [(box, round(score, 6)) for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("nmm", ([78, 10, 97, 30], 0.7)),  # the window's box of highest score
        ("nms", ([78, 10, 97, 30], 0.7)),
        ("wbf", ([0.6 * 78 + 0.4 * 84, 10, 97, 30], 0.5)),  # of the windows, not of the whole image
    ],
)
def test_merge_windows__an_object_in_both_windows(method: TileMerge, expected: tuple[list[float], float]) -> None:
    found = merge([(0, [78, 10, 97, 30], 0.6), (1, [84, 10, 97, 30], 0.4), (2, [80, 10, 99, 30], 0.7)], method)
    assert len(found) == 1
    assert found[0][0] == pytest.approx(expected[0])
    assert found[0][1] == expected[1]


@pytest.mark.parametrize("windows", [(LEFT, RIGHT), (LEFT, RIGHT, WHOLE)])
def test_merge_windows__wbf_counts_tiles_that_miss_an_object(windows: tuple[tuple[int, ...], ...]) -> None:
    both_see = (0, [84, 10, 97, 30], 0.8)
    assert merge([both_see], "wbf", windows) == [([84, 10, 97, 30], 0.4)]
    assert merge([both_see], "nmm", windows) == [([84, 10, 97, 30], 0.8)]
    for only_one_sees in ([10, 10, 40, 30], [70, 10, 97, 30], [81, 10, 97, 30]):  # elsewhere, and at the other's border
        assert merge([(0, [*only_one_sees], 0.8)], "wbf", windows) == [([*only_one_sees], 0.8)]
    # a part does not count: the left window cuts the object, the right one sees all of it
    assert merge([(0, [84, 10, 100, 30], 0.9), (1, [84, 10, 103, 30], 0.6)], "wbf", windows) == [
        ([84, 10, 103, 30], 0.6)
    ]
    # only the whole image finds it, which is no tile
    if len(windows) == 3:
        assert merge([(2, [84, 10, 97, 30], 0.6)], "wbf", windows) == [([84, 10, 97, 30], 0.6)]


@pytest.mark.parametrize(
    ("method", "expected"), [("nmm", [20, 10, 150, 31]), ("nms", [20, 10, 100, 30]), ("wbf", [20, 10, 150, 31])]
)
def test_merge_windows__two_parts_of_an_object(method: TileMerge, expected: list[float]) -> None:
    parts = [(0, [20, 10, 100, 30], 0.6), (1, [80, 10, 150, 31], 0.9)]
    assert merge(parts, method) == [(expected, 0.9)]


def test_merge_windows__a_whole_object_replaces_its_parts() -> None:
    parts = [(0, [20, 10, 100, 30], 0.9), (1, [80, 10, 150, 30], 0.8), (2, [19, 9, 151, 31], 0.7)]
    assert merge(parts) == [([19, 9, 151, 31], 0.9)]


def test_merge_windows__a_sliver_belongs_to_the_object_around_it() -> None:
    # the right window sees 4 pixels of an object and takes them for 5 by 15: an IoU of 0.4
    found = merge([(0, [50, 10, 84, 40], 0.8), (1, [80, 15, 85, 30], 0.6)], windows=(LEFT, RIGHT))
    assert found == [([50, 10, 84, 40], 0.8)]


def test_merge_windows__neighbours_whose_boxes_overlap_stay_two() -> None:
    # each window finds both; the right one cuts the first object, the left one the second
    first, second = [50.0, 10.0, 95.0, 40.0], [82.0, 10.0, 130.0, 40.0]
    found = merge(
        [(0, first, 0.9), (0, [82, 10, 100, 40], 0.8), (1, [80, 10, 95, 40], 0.7), (1, second, 0.6)],
        windows=(LEFT, RIGHT),
    )
    assert sorted(box for box, _ in found) == [first, second]


@pytest.mark.parametrize("method", ["nmm", "nms", "wbf"])
def test_merge_windows__a_part_that_another_window_would_see_whole_is_dropped(method: TileMerge) -> None:
    # the left window cuts it, the right one sees all of it and finds nothing
    assert merge([(0, [85, 10, 100, 30], 0.9)], method, (LEFT, RIGHT)) == []
    assert merge([(0, [85, 10, 100, 30], 0.9)], method) == []  # the pass over the whole image does not confirm it
    # in the first case it reaches out of what the right window sees, in the second it touches that window's border
    for kept in ([70.0, 10.0, 100.0, 30.0], [81.0, 10.0, 100.0, 30.0]):
        assert merge([(0, kept, 0.9)], method, (LEFT, RIGHT)) == [(kept, 0.9)]


def test_merge_windows__a_wrong_box_of_the_whole_image_takes_no_parts() -> None:
    # it contains all that the windows cut, but is not of the same size within any of them
    wrong = (2, [5, 2, 175, 98], 0.3)
    cut_twice = [(0, [70, 10, 100, 30], 0.9), (1, [80, 10, 110, 30], 0.8)]
    others = [(0, [10, 60, 30, 80], 0.7), (1, [80, 50, 100, 60], 0.6), (0, [78, 50, 100, 60], 0.5)]
    found = merge([wrong, *cut_twice, *others])
    assert ([5, 2, 175, 98], 0.3) in found
    assert ([70, 10, 110, 30], 0.9) in found
    assert len(found) == 4


def test_merge_windows__detections_of_one_window_stay_apart() -> None:
    twins = [(0, [10, 10, 40, 40], 0.9), (0, [11, 10, 41, 40], 0.8)]
    assert len(merge(twins)) == 2
    assert len(merge([*twins, (2, [10, 10, 40, 40], 0.7)])) == 2  # and the whole image matches one of them


def test_merge_windows__single_detections_keep_their_bits() -> None:
    torch.manual_seed(0)
    boxes = torch.rand(5, 2) * 20 + torch.arange(5)[:, None] * 15
    boxes = torch.cat([boxes, boxes + 9.3], dim=1)
    scores = torch.rand(5).sort(descending=True).values
    labels = torch.arange(5)
    found = merge_windows(boxes, scores, labels, torch.zeros(5, dtype=torch.int64), torch.tensor([LEFT, RIGHT]))
    assert all(torch.equal(x, y) for x, y in zip(found, (boxes, scores, labels), strict=True))


def uncut_detections(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Objects far apart, each found by one to three of three windows with small errors; none is at a border."""
    generator = torch.Generator().manual_seed(seed)
    boxes, scores, sources = [], [], []
    for i in range(40):
        corner = torch.tensor([85.0 + 120 * (i % 8), 85.0 + 120 * (i // 8)])
        for source in range(3):
            if torch.rand((), generator=generator) < 0.6:
                low = corner + torch.rand(2, generator=generator) * 3
                boxes.append(torch.cat([low, low + 30 + torch.rand(2, generator=generator) * 3]))
                scores.append(torch.rand((), generator=generator))
                sources.append(source)
    return torch.stack(boxes), torch.stack(scores), torch.tensor(sources)


@pytest.mark.parametrize("seed", range(3))
def test_merge_windows__equals_the_nms_of_supervision_where_nothing_is_cut(seed: int) -> None:
    supervision = pytest.importorskip("supervision")
    boxes, scores, sources = uncut_detections(seed)
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    windows = torch.tensor([[0, 0, 2000, 2000]] * 3)
    found = merge_windows(boxes, scores, labels, sources, windows, "nms")
    theirs = supervision.Detections(boxes.numpy(), confidence=scores.numpy(), class_id=labels.numpy()).with_nms(0.5)
    order = theirs.confidence.argsort()[::-1]
    assert torch.equal(found[0], torch.from_numpy(theirs.xyxy[order].copy()))
    assert torch.equal(found[1], torch.from_numpy(theirs.confidence[order].copy()))


def test_merge_windows__joins_the_parts_that_supervision_joins() -> None:
    supervision = pytest.importorskip("supervision")
    boxes = torch.tensor([[20.0, 10, 100, 30], [80, 10, 110, 30], [5, 60, 100, 90], [80, 60, 179, 90]])
    scores, sources = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 1, 0, 1])
    theirs = supervision.Detections(boxes.numpy(), confidence=scores.numpy(), class_id=sources.numpy() * 0).with_nmm(
        0.15, overlap_metric=supervision.OverlapMetric.IOS
    )
    found = merge_windows(boxes, scores, sources * 0, sources, torch.tensor([LEFT, RIGHT]))[0]
    assert sorted(found.tolist()) == sorted(theirs.xyxy.tolist()) == [[5, 60, 179, 90], [20, 10, 110, 30]]


def test_merge_windows__of_nothing_is_nothing() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    boxes, scores, labels = merge_windows(torch.zeros(0, 4), torch.zeros(0), empty, empty, torch.tensor([LEFT]))
    assert (boxes.shape, len(scores), labels.dtype) == ((0, 4), 0, torch.int64)
