import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_convnext_det.ops.box_fusion import weighted_box_fusion

SIZE = 640.0


def random_detections(seed: int, num_detectors: int, num_boxes: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The same objects found with errors of a few pixels by each detector, and others that only one finds."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num_boxes, 2, generator=generator, dtype=torch.float64) * 500
    objects = torch.cat([corners, corners + 40 + 80 * torch.rand(num_boxes, 2, generator=generator)], dim=1)
    labels = torch.randint(4, (num_boxes,), generator=generator)
    boxes, scores, classes = [], [], []
    for _ in range(num_detectors):
        kept = torch.rand(num_boxes, generator=generator) > 0.3
        noise = 5 * torch.randn(num_boxes, 4, generator=generator, dtype=torch.float64)
        boxes.append((objects + noise).clamp(0, SIZE)[kept])
        scores.append(torch.rand(num_boxes, generator=generator, dtype=torch.float64)[kept])
        classes.append(labels[kept])
    return boxes, scores, classes


@pytest.mark.parametrize("seed", range(8))
def test_weighted_box_fusion__equals_ensemble_boxes(seed: int) -> None:
    reference = pytest.importorskip("ensemble_boxes").weighted_boxes_fusion
    boxes, scores, labels = random_detections(seed, num_detectors=1 + seed % 4, num_boxes=60)
    found = weighted_box_fusion(boxes, scores, labels, iou_threshold=0.55)
    expected = reference([(b / SIZE).numpy() for b in boxes], [s.numpy() for s in scores], [x.numpy() for x in labels])
    order = np.argsort(-expected[1], kind="stable")
    assert np.abs(found[1].numpy() - expected[1][order]).max() < 1e-6
    assert np.abs(found[0].numpy() / SIZE - expected[0][order]).max() < 1e-6
    assert found[2].tolist() == expected[2][order].astype(int).tolist()


def test_weighted_box_fusion__by_hand() -> None:
    boxes = [torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[0.0, 0.0, 10.0, 12.0], [50.0, 50.0, 60.0, 60.0]])]
    scores, labels = [torch.tensor([0.9]), torch.tensor([0.3, 0.8])], [torch.tensor([0]), torch.tensor([0, 1])]
    found_boxes, found_scores, found_labels = weighted_box_fusion(boxes, scores, labels)
    assert torch.allclose(found_boxes, torch.tensor([[0.0, 0.0, 10.0, 10.5], [50.0, 50.0, 60.0, 60.0]]))
    assert torch.allclose(found_scores, torch.tensor([0.6, 0.4]))  # the second is known to one of two detectors
    assert found_labels.tolist() == [0, 1]


def test_weighted_box_fusion__of_nothing_is_nothing() -> None:
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    boxes, scores, labels = weighted_box_fusion(*([one, one] for one in nothing))
    assert (boxes.shape, scores.shape, labels.shape) == ((0, 4), (0,), (0,))
    assert (boxes.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_weighted_box_fusion__leaves_out_scores_of_zero() -> None:
    box, labels = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 2), torch.tensor([0, 1])
    boxes, scores, _ = weighted_box_fusion([box], [torch.tensor([0.0, 0.5])], [labels])
    assert (len(boxes), scores.tolist()) == (1, [0.5])


def test_weighted_box_fusion__refuses_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="of 1, 1 and 0 detectors"):
        weighted_box_fusion([torch.zeros(0, 4)], [torch.zeros(0)], [])
