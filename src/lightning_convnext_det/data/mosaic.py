"""Mosaic augmentation: one training image from crops of four (YOLOv4, arXiv:2004.10934, section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_convnext_det.data.batch import Sample
from lightning_convnext_det.data.transforms import MIN_VISIBLE_SHARE
from lightning_convnext_det.types import Target

_CENTRE = (0.3, 0.7)  # where the four parts meet, as a fraction of width and height
_SCALE = (0.6, 1.2)  # of each of the four images
NUM_IMAGES = 4


def create_mosaic(samples: list[Sample]) -> Sample:
    """Put random crops of four images around a random point of a canvas as large as the first image.

    Each image is scaled by a random factor from 0.6 to 1.2, or more where it would not fill its part. A box is cut at
    the edge of its part; an object of which less than 40 % of the area remains becomes an ignored region (``iscrowd``),
    as in `RandomTile`. Draws from torch's CPU generator.

    >>> import torch
    >>> target = {"boxes": torch.tensor([[0.0, 0.0, 60.0, 40.0]]), "labels": torch.tensor([1]), "image_id": 7}
    >>> image, joined = create_mosaic([(torch.zeros(3, 40, 60, dtype=torch.uint8), target)] * 4)
    >>> image.shape, joined["image_id"], bool((joined["boxes"][:, 2] <= 60).all())
    (torch.Size([3, 40, 60]), 7, True)

    Args:
        samples: four images, uint8 [C, H, W] of any sizes, and targets with ``boxes`` float32 [N, 4] (x1, y1, x2, y2)
            in pixels of their image, ``labels`` int64 [N], and perhaps ``iscrowd`` bool [N].

    Returns:
        The canvas, uint8 [C, H, W], and the target of the first image with ``boxes``, ``labels`` and ``iscrowd`` of all
        parts.
    """
    image, first = samples[0]
    height, width = image.shape[-2:]
    canvas = torch.empty_like(image)
    middle_y, middle_x = (round(side * _draw(*_CENTRE)) for side in (height, width))
    boxes, labels, ignored = [], [], []
    for number, (part, target) in enumerate(samples):
        top, bottom = ((0, middle_y), (middle_y, height))[number // 2]
        left, right = ((0, middle_x), (middle_x, width))[number % 2]
        pixels, moved, share = _crop(part, target["boxes"], bottom - top, right - left)
        canvas[:, top:bottom, left:right] = pixels
        kept = share > 0
        boxes.append((moved + moved.new_tensor([left, top, left, top]))[kept])
        labels.append(target["labels"][kept])
        crowd = torch.as_tensor(target.get("iscrowd", torch.zeros(len(share)))).bool()
        ignored.append((crowd | (share < MIN_VISIBLE_SHARE))[kept])
    joined: Target = {
        **first, "boxes": torch.cat(boxes), "labels": torch.cat(labels), "iscrowd": torch.cat(ignored),
    }  # fmt: skip
    return canvas, joined


def _crop(image: Tensor, boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale an image at random and crop a window at random: its pixels, the boxes, and how much of each is visible."""
    old_height, old_width = image.shape[-2:]
    scale = max(_draw(*_SCALE), height / old_height, width / old_width)
    size = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    top, left = (int(torch.randint(side - part + 1, ())) for side, part in zip(size, (height, width), strict=True))
    scaled = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    ratio = boxes.new_tensor([size[1] / old_width, size[0] / old_height]).repeat(2)
    moved = boxes * ratio - boxes.new_tensor([left, top, left, top])
    clipped = torch.minimum(moved.clamp(min=0), moved.new_tensor([width, height, width, height]))
    return scaled[:, top : top + height, left : left + width], clipped, _areas(clipped) / _areas(moved).clamp(min=1e-6)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)


def _draw(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
