import pytest
import torch
from torchvision.ops import nms

from lightning_convnext_det.ops import batch_nms as batch_nms_module
from lightning_convnext_det.ops.batch_nms import batch_nms, fill_rows
from lightning_convnext_det.ops.nms import Separation, grouped_nms
from tests.ops.samples import candidates


# below and above the number of boxes from which on torchvision takes them group by group, few groups and many
@pytest.mark.parametrize("separation", ["torchvision", "offset"])
@pytest.mark.parametrize("groups", [1, 5, 30])
@pytest.mark.parametrize(("count", "images"), [(0, 1), (1, 1), (700, 1), (1500, 1), (1, 3), (2000, 3), (4000, 2)])
@pytest.mark.parametrize("recorded", [False, True])
def test_batch_nms__keeps_what_grouped_nms_keeps_of_each_image(
    count: int, images: int, groups: int, separation: Separation, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(count + groups)
    boxes, scores, group, image = candidates(count, images, groups)
    monkeypatch.setattr(batch_nms_module, "is_recording", lambda: recorded)
    keep = batch_nms(boxes, scores, group, image, images, 0.5, separation, groups)
    for number in range(images):
        rows = torch.where(image == number)[0]
        expected = rows[grouped_nms(boxes[rows], scores[rows], group[rows], 0.5, separation)]
        assert torch.equal(keep[image[keep] == number], expected)


def test_fill_rows__by_hand() -> None:
    values = torch.tensor([[5.0], [4.0], [3.0], [2.0], [1.0]])
    images = torch.tensor([2, 0, 2, 2, 0])
    used = torch.tensor([True, False, True, True, True])
    (rows,), count = fill_rows([values], images, used, num_images=3, length=2)
    assert rows[..., 0].tolist() == [[1, 0], [0, 0], [5, 3]]
    assert count.tolist() == [1, 0, 2]


def test_fill_rows__nothing() -> None:
    (rows,), count = fill_rows([torch.zeros(0, 4)], torch.zeros(0, dtype=torch.int64), torch.zeros(0) > 0, 2, 3)
    assert rows.shape == (2, 3, 4)
    assert count.tolist() == [0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("groups", [1, 5, 80])
@pytest.mark.parametrize(("count", "images"), [(0, 2), (1, 1), (4000, 1), (20000, 16), (20000, 1)])
def test_batch_nms__on_a_gpu_keeps_what_the_cpu_keeps(count: int, images: int, groups: int) -> None:
    torch.manual_seed(count + groups)
    arguments = candidates(count, images, groups)
    keep = batch_nms(*(a.cuda() for a in arguments), images, 0.5, num_groups=groups)
    boxes, scores, group, image = arguments
    for number in range(images):
        rows = torch.where(image == number)[0]
        parts = [rows[group[rows] == g] for g in range(groups)]
        expected = torch.cat([part[nms(boxes[part], scores[part], 0.5)] for part in parts])
        expected = expected[scores[expected].argsort(descending=True)]
        own = keep.cpu()
        assert torch.equal(own[image[own] == number], expected)


@pytest.mark.parametrize("way", ["loop", "recorded", "moved apart"])
@pytest.mark.parametrize(("count", "groups"), [(0, 1), (40, 1), (900, 5)])
def test_batch_nms__as_if_boxes_that_are_not_used_were_not_there(
    way: str, count: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(count)
    boxes, scores, group, image = candidates(count, 3, groups)
    used = torch.rand(count) < 0.6
    rows = torch.where(used)[0]
    expected = rows[batch_nms(boxes[rows], scores[rows], group[rows], image[rows], 3, 0.5, "torchvision", groups)]
    monkeypatch.setattr(batch_nms_module, "is_recording", lambda: way == "recorded")
    if way == "moved apart":
        keep = batch_nms_module._nms_of_all(boxes, scores, group, image, 0.5, used)
        assert used[keep].int().diff().le(0).all()  # the others come last
        keep = keep[used[keep]]
    else:
        keep = batch_nms(boxes, scores, group, image, 3, 0.5, "torchvision", groups, used)
    for number in range(3):
        assert torch.equal(keep[image[keep] == number], expected[image[expected] == number])


@pytest.mark.parametrize(("device", "boxes", "parts"), [("cpu", 9000, 1), ("meta", 9000, 3), ("meta", 30000, 5)])
def test_group_images__as_many_as_one_nms_takes(device: str, boxes: int, parts: int) -> None:
    groups = batch_nms_module.group_images(5, torch.zeros(5, boxes, device=device), "torchvision")
    assert len(groups) == parts
    assert [i for part in groups for i in range(5)[part]] == list(range(5))
