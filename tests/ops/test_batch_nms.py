import pytest
import torch
from torch import Tensor

from lightning_convnext_det.ops import batch_nms as batch_nms_module
from lightning_convnext_det.ops.batch_nms import batch_nms, fill_rows
from lightning_convnext_det.ops.nms import Separation, grouped_nms


def _candidates(count: int, images: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    corners = torch.rand(count, 2) * 800
    boxes = torch.cat((corners, corners + torch.rand(count, 2) * 100), dim=1).clamp(max=800)
    scores = torch.randperm(count) / max(count, 1)  # no two are equal
    return boxes, scores, torch.randint(groups, (count,)), torch.randint(images, (count,))


# below and above the number of boxes from which on torchvision takes them group by group, few groups and many
@pytest.mark.parametrize("separation", ["torchvision", "offset"])
@pytest.mark.parametrize("groups", [1, 5, 30])
@pytest.mark.parametrize(("count", "images"), [(0, 1), (1, 1), (700, 1), (1500, 1), (1, 3), (2000, 3), (4000, 2)])
@pytest.mark.parametrize("recorded", [False, True])
def test_batch_nms__keeps_what_grouped_nms_keeps_of_each_image(
    count: int, images: int, groups: int, separation: Separation, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(count + groups)
    boxes, scores, group, image = _candidates(count, images, groups)
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
