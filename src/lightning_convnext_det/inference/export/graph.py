"""What an exported file computes: from images of one size to their detections, as one module for ``torch.export``.

Sizes that depend on the image are computed by tensors in float64, in the order in which `ImageTransform` computes them,
so that they are rounded alike; ``item`` turns them into numbers that the exporter knows by name only.
"""

import copy
import warnings
from collections.abc import Collection
from contextlib import redirect_stderr
from io import StringIO
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.inference.export.backbones import recordable_backbones
from lightning_convnext_det.models.image_transform import ImageTransform
from lightning_convnext_det.ops.tracing import Attention, record_attention

Part = Literal["resize", "normalise"]
Axis = Literal["batch", "height", "width"]
LARGEST_SIDE = 1 << 16


class ExportGraph(nn.Module):
    """Images [B, C, H, W] of one size to boxes [B, K, 4], scores [B, K], labels [B, K] and count [B].

    Boxes are corners (x1, y1, x2, y2) in pixels of the images given, float32; scores float32; labels int64 from 0;
    rows are by descending score, and zeros beyond count. K is the detector's ``detections_per_image``.

    >>> import torch
    >>> from lightning_convnext_det import DeformableDETR
    >>> detector = DeformableDETR(2, "test_convnext", num_queries=8, hidden_dim=32, encoder_layers=1, decoder_layers=1,
    ...                           min_size=64, max_size=96)
    >>> boxes, scores, labels, count = ExportGraph(detector)(torch.zeros(2, 3, 60, 90, dtype=torch.uint8))
    >>> boxes.shape, count.tolist()
    (torch.Size([2, 100, 4]), [16, 16])

    Args:
        detector: any detector of this package; a copy of it is kept, in evaluation mode.
        include: ``resize``: images are resized by the detector's rule; ``normalise``: images are uint8, else float32
            and normalised already.

    Raises:
        ArgumentError: if the detector cannot be exported.
    """

    def __init__(self, detector: nn.Module, include: Collection[Part] = ("resize", "normalise")) -> None:
        super().__init__()
        if not hasattr(detector, "forward_tensors"):
            raise ArgumentError(f"{type(detector).__name__} has no forward_tensors, so it cannot be exported")
        if getattr(detector, "nms", "none") == "soft":
            raise ArgumentError("nms='soft' cannot be exported; set nms to 'hard' or 'none'")
        self.detector = copy.deepcopy(detector).cpu().float().eval()
        # with gradients torch.export folds matrix products, without it would fix the batch: decompositions.should_fold
        self.detector.requires_grad_(True)
        transform = self.detector.transform
        assert isinstance(transform, ImageTransform)  # every detector has one
        self.transform = transform
        self.include = frozenset(include)
        if transform.resize == "pillow" and "resize" in self.include:
            raise ArgumentError("resize='pillow' cannot be exported; include 'normalise' alone and resize by Pillow")
        if transform.resize == "opencv" and self.include == {"resize"}:
            raise ArgumentError("resize='opencv' works on 8-bit images: include 'normalise' with 'resize', or neither")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the objects in images [B, C, H, W]."""
        height, width = images.shape[-2:]
        # of vectors: OpenVINO expands a number without axes to one with an axis
        side = torch.cat([torch.full((1,), n, dtype=torch.float64) for n in (height, width)]).to(images.device)  # [2]
        new, tiles = self.new_sizes(side)
        batch, size = self._prepare(images, side, new)
        frame = [n * self.transform.size_divisible for n in self._tiles(tiles, height, width)]
        batch = F.pad(batch, (0, frame[1] - size[1], 0, frame[0] - size[0]))
        sizes = new[None].expand(images.shape[0], 2)
        boxes, scores, labels, count = self.detector.forward_tensors(batch, sizes)  # type: ignore[operator]
        limits = side.flip(0).repeat(2).to(torch.float32)  # width, height, width, height
        ratio = (side / new.to(torch.float64)).flip(0).repeat(2).to(torch.float32)
        return (boxes * ratio).clamp(min=0).minimum(limits), scores, labels, count

    def new_sizes(self, side: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width after resizing in pixels and in multiples of the padding, both int64 [2].

        Args:
            side: height and width of the images, float64 [2]; in float32 they are what OpenVINO computes.
        """
        new = side
        if "resize" in self.include:
            rule = self.transform
            # of tensors: torch divides a number by a tensor as the number times the reciprocal, which rounds twice
            shorter, longer = (torch.full_like(side[0], n) for n in (rule.min_sizes[-1], rule.max_size))
            scale = torch.minimum(shorter / side.min(), longer / side.max())
            if rule.fixed_size:
                scale = torch.minimum(scale, (side.new_tensor(rule.fixed_size) / side).min())
            new = (side * scale + (0.5 if rule.resize == "opencv" else 0.0)).floor().clamp(min=1)
        new = new.to(torch.int64)
        frame = new.clamp(min=self.transform.smallest_side)
        return new, (frame + self.transform.size_divisible - 1) // self.transform.size_divisible

    def _prepare(self, images: Tensor, side: Tensor, new: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Resize and normalise images; also return their new height and width."""
        rule, height, width = self.transform, images.shape[-2], images.shape[-1]
        if "resize" not in self.include:
            return (self.normalise(images, 1.0) if "normalise" in self.include else images), (height, width)
        size = rule.new_size(height, width) if _are_known(height, width) else _name_numbers(new, 1)
        if rule.resize == "opencv":
            return self.normalise(_resize_like_opencv(images, size, side, new), 255.0), size
        if "normalise" in self.include:
            images = self.normalise(images, 1.0)
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False), size

    def _tiles(self, tiles: Tensor, height: int, width: int) -> tuple[int, int]:
        multiple = self.transform.size_divisible
        if self.transform.fixed_size:
            return self.transform.fixed_size[0] // multiple, self.transform.fixed_size[1] // multiple
        if _are_known(height, width):
            size = self.transform.new_size(height, width) if "resize" in self.include else (height, width)
            rows, columns = (-(-max(side, self.transform.smallest_side) // multiple) for side in size)
            return rows, columns
        return _name_numbers(tiles, 2)  # maps of one pixel have other rules of broadcasting

    def leave_to_file(
        self, images: Tensor, batch_size: int = 1, size: tuple[int | None, int | None] = (None, None)
    ) -> Tensor:
        """Do with uint8 images [1, C, H, W] what the file leaves to its caller; it takes the result [B, C, H', W'].

        Args:
            images: one image, uint8.
            batch_size: how often it is repeated.
            size: (height, width) that the file is fixed to.
        """
        height, width = images.shape[-2:]
        if "resize" not in self.include:
            height, width = self.transform.new_size(height, width)
        wanted = size[0] or height, size[1] or width
        if wanted != images.shape[-2:]:
            resized = F.interpolate(images.float(), wanted, mode="bilinear", align_corners=False)
            images = resized.round().to(torch.uint8)
        images = images.repeat(batch_size, 1, 1, 1)
        return images if "normalise" in self.include else self.normalise(images, 1.0)

    def normalise(self, images: Tensor, full_scale: float) -> Tensor:
        """Normalise images [B, C, H, W] of 0..255, brought to 0..full_scale before."""
        images = images.to(torch.float32)
        if full_scale == 1.0:
            images = images / 255.0
        mean = images.new_tensor([m * full_scale for m in self.transform.image_mean])[:, None, None]
        std = images.new_tensor([s * full_scale for s in self.transform.image_std])[:, None, None]
        return (images - mean) / std


def record(
    graph: ExportGraph, example: Tensor, dynamic: Collection[Axis] = ("batch", "height", "width"),
    attention: Attention = "gather",
) -> torch.export.ExportedProgram:  # fmt: skip
    """Record the graph with ``torch.export``.

    Args:
        graph: what to record.
        example: images of the graph's dtype [B, C, H, W]; axes that are not ``dynamic`` keep its length.
        dynamic: axes of any length.
        attention: operator of deformable attention.

    Raises:
        ArgumentError: if the detector's backbone cannot be recorded so.
    """
    axes = {
        number: torch.export.Dim.DYNAMIC
        for number, name in ((0, "batch"), (2, "height"), (3, "width"))
        if name in dynamic
    }
    try:
        with (
            warnings.catch_warnings(), torch.no_grad(), record_attention(attention), recordable_backbones(),
            redirect_stderr(StringIO()),  # where torch prints the whole graph before it raises an error
        ):  # fmt: skip
            warnings.simplefilter("ignore", FutureWarning)  # torchvision's NMS asks torch in a way that is deprecated
            return torch.export.export(graph, (example,), dynamic_shapes=(axes or None,), strict=False)
    except (torch._dynamo.exc.UserError, RuntimeError, TypeError, ValueError) as error:  # whatever the backbone does
        reason = str(error).strip().splitlines()[0][:200]
        raise ArgumentError(
            f"[LCD-X002] the detector cannot be exported with {', '.join(dynamic) or 'nothing'} free ({reason}); "
            "leave axes out of dynamic, e.g. dynamic=batch with an image_size"
        ) from error


def _are_known(*lengths: int) -> bool:
    return all(type(length) is int for length in lengths)


def _name_numbers(values: Tensor, least: int) -> tuple[int, int]:
    """Turn two integers of a tensor into numbers that an exporter knows by name, with their limits."""
    height, width = (values[i].item() for i in range(2))
    for number in (height, width):
        torch._check(number >= least)
        torch._check(number <= LARGEST_SIDE)
    return height, width  # type: ignore[return-value]  # of integers


def _resize_like_opencv(images: Tensor, size: tuple[int, int], side: Tensor, new: Tensor) -> Tensor:
    """Do what `ops.resize.resize_like_opencv` does, by operators that every exporter has; uint8 [B, C, H, W] to int32.

    Where the size stays, all weights are 0 and 1, so that the pixels stay, too.
    """
    steps = torch.ones_like(side) / (new.to(torch.float64) / side)  # in this order, as OpenCV rounds
    (top, bottom), (above, below) = _neighbours(side[0], size[0], steps[0])
    (left, right), (before, after) = _neighbours(side[1], size[1], steps[1])
    # at the left and right border OpenCV sets the weights, at the top and bottom it repeats the row
    before, after = torch.where(left == right, 1 << 11, before), torch.where(left == right, 0, after)
    pixels = images.to(torch.int32)
    pixels = (pixels.index_select(3, left) * before + pixels.index_select(3, right) * after) // 16
    upper = pixels.index_select(2, top) * above[:, None] // 65536
    lower = pixels.index_select(2, bottom) * below[:, None] // 65536
    return (upper + lower + 2) // 4


def _neighbours(length: Tensor, new_length: int, step: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    position = ((torch.arange(new_length, dtype=torch.float64) + 0.5) * step - 0.5).to(torch.float32)
    first = position.floor()
    fraction = position - first
    last = length.to(torch.int64) - 1
    lower, upper = (first.to(torch.int64) + i for i in (0, 1))
    indices = lower.clamp(min=0).minimum(last), upper.clamp(min=0).minimum(last)
    weights = [(w * (1 << 11)).round().to(torch.int32) for w in (1 - fraction, fraction)]
    return indices, (weights[0], weights[1])
