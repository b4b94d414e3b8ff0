"""A detector that is exact: it sees objects that are drawn in colours of their own."""

import torch
from scipy.ndimage import find_objects
from torch import Tensor, nn

from lightning_convnext_det.types import Detection


class ColorDetector(nn.Module):
    """Finds each object exactly, as far as the image shows it: red and green are its number, blue is its class.

    Objects below ``smallest`` pixels of the image scaled to ``side`` are overlooked, as small ones are by detectors
    that resize.
    """

    def __init__(self, side: int | None = None, smallest: float = 0.0) -> None:
        super().__init__()
        self.side, self.smallest = side, smallest
        self.seen: list[tuple[int, int]] = []

    def forward(self, images: list[Tensor]) -> list[Detection]:
        self.seen += [(image.shape[-2], image.shape[-1]) for image in images]
        return [self.find(image) for image in images]

    def find(self, image: Tensor) -> Detection:
        number, classes = (image[0].int() * 256 + image[1].int()).numpy(), image[2].numpy()
        scale = 1.0 if self.side is None else self.side / max(image.shape[-2:])
        boxes, labels = [], []
        for i, place in enumerate(find_objects(number), 1):
            if place is None or max(s.stop - s.start for s in place) * scale < self.smallest:
                continue
            boxes.append([place[1].start, place[0].start, place[1].stop, place[0].stop])
            labels.append(int(classes[place][number[place] == i][0]))
        scores = torch.linspace(0.9, 0.5, len(boxes)) if boxes else torch.zeros(0)
        found = torch.tensor(boxes).float().reshape(-1, 4)
        return Detection(boxes=found, labels=torch.tensor(labels).long(), scores=scores)


def draw(height: int, width: int, boxes: list[tuple[int, int, int, int]], label: int = 1) -> Tensor:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for i, (left, top, right, bottom) in enumerate(boxes, 1):
        image[:, top:bottom, left:right] = torch.tensor([i // 256, i % 256, label], dtype=torch.uint8)[:, None, None]
    return image


def found_boxes(detection: Detection) -> list[tuple[int, ...]]:
    return sorted(tuple(box) for box in detection["boxes"].round().int().tolist())
