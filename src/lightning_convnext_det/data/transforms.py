"""Augmentation of training images and their boxes: six presets of torchvision v2 transforms.

``ShortestSide`` and ``LargeScaleJitter`` round sides to the nearest pixel, at least 1; torchvision's RandomShortestSize
and ScaleJitter round down, to 0 for very narrow images. All random numbers come from torch's CPU generator, which
``seeding.seeded`` sets for each image.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lightning_convnext_det.arguments import Count, NonNegative, Positive, check_arguments
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.types import Target

_logger = logging.getLogger(__name__)
_warned: set[str] = set()  # codes of warnings that this process has given

Preset = Literal["none", "flip", "multiscale", "lsj", "tiles", "mosaic"]
SampleTransform: TypeAlias = v2.Transform | Callable[[tv_tensors.Image, Target], tuple[tv_tensors.Image, Target]]
"""A transform of an image, uint8 [C, H, W], and its target; ``boxes`` is a ``tv_tensors.BoundingBoxes``."""
RESIZING_PRESETS: tuple[Preset, ...] = ("multiscale", "lsj")
"""Presets that set the final size of an image; the detector must not resize it again in training."""
MULTISCALE_SIZES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)  # DETR, arXiv:2005.12872, section 4
CROP_SIZE = 1024  # of the squares of ``lsj`` and the windows of ``tiles``
MIN_VISIBLE_SIDE = 1.0  # pixels; the proposal heads cannot regress a box without area
MIN_VISIBLE_SHARE = 0.4  # of an object's area in a window from which it is an object to learn
FILL = 114  # mean of ImageNet's mean colour 124, 116, 104: close to 0 once normalised, as the padding of detectors

# torchvision has no types: its classes are Any to the type checker
# mypy: disable-error-code="misc"


class ShortestSide(v2.RandomShortestSize):
    """Resize the shorter side to one of ``min_size``, or less if the longer side would exceed ``max_size``."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size of the output."""
        height, width = v2.query_size(flat_inputs)
        shortest = self.min_size[int(torch.randint(len(self.min_size), ()))]
        factor = shortest / min(height, width)
        if self.max_size is not None:
            factor = min(factor, self.max_size / max(height, width))
        return {"size": scaled_size(height, width, factor)}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Any:
        """Resize an image or its boxes."""
        return self._call_kernel(F.resize, _channels_innermost(inpt), size=params["size"], antialias=True)


class LargeScaleJitter(v2.Transform):
    """Large-scale jittering: resize to a random multiple of the size that fits into a square.

    Args:
        side: of the square, in pixels.
        scale_range: smallest and largest multiple; drawn uniformly.

    Reference:
        Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation",
        arXiv:2012.07177, section 3 and appendix A.
    """

    def __init__(self, side: int, scale_range: tuple[float, float] = (0.1, 2.0)) -> None:
        super().__init__()
        self.side = side
        self.scale_range = scale_range

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size of the output."""
        height, width = v2.query_size(flat_inputs)
        low, high = self.scale_range
        scale = low + (high - low) * float(torch.rand(()))
        return {"size": scaled_size(height, width, scale * self.side / max(height, width))}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Any:
        """Resize an image or its boxes."""
        return self._call_kernel(F.resize, _channels_innermost(inpt), size=params["size"], antialias=True)


class RandomSizeCrop(v2.Transform):
    """Crop a window whose height and width are drawn independently; a side shorter than ``min_side`` is kept.

    Args:
        min_side: smallest side of the crop in pixels.
        max_side: largest side of the crop in pixels.
    """

    def __init__(self, min_side: int, max_side: int) -> None:
        super().__init__()
        self.min_side = min_side
        self.max_side = max_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the window."""
        height, width = v2.query_size(flat_inputs)
        crop_height, crop_width = (
            int(torch.randint(min(self.min_side, side), min(self.max_side, side) + 1, ())) for side in (height, width)
        )
        return {
            "top": int(torch.randint(height - crop_height + 1, ())),
            "left": int(torch.randint(width - crop_width + 1, ())),
            "height": crop_height,
            "width": crop_width,
        }

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Any:
        """Crop an image or its boxes."""
        return self._call_kernel(F.crop, inpt, **params)


class RandomSquareCrop(v2.Transform):
    """Crop to a square at a random position, and pad at the right and bottom where the image is smaller.

    Args:
        side: of the square in pixels.
        fill: grey value of the padding, 0 ... 255.
    """

    def __init__(self, side: int, fill: int = FILL) -> None:
        super().__init__()
        self.side = side
        self.fill = fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the window."""
        height, width = v2.query_size(flat_inputs)
        crop = {
            "top": int(torch.randint(max(height - self.side, 0) + 1, ())),
            "left": int(torch.randint(max(width - self.side, 0) + 1, ())),
            "height": min(height, self.side),
            "width": min(width, self.side),
        }
        return {"crop": crop, "padding": [0, 0, self.side - crop["width"], self.side - crop["height"]]}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Any:
        """Crop and pad an image or its boxes."""
        window = self._call_kernel(F.crop, inpt, **params["crop"])
        if not isinstance(window, tv_tensors.Image):
            return self._call_kernel(F.pad, window, padding=params["padding"])
        # F.pad would lay the channels outermost again, in three times the time
        square = window.new_full((self.side, self.side, 3), self.fill).permute(2, 0, 1)
        square[:, : window.shape[-2], : window.shape[-1]] = window
        return tv_tensors.wrap(square, like=inpt)


class RandomTile:
    """Crop a window of an image and its objects, as `tile_windows` would divide it, at a random position.

    In half of the cases the window contains the centre of a random object, if there are any: most windows of an aerial
    image are empty. Boxes are cut at its borders. An object of which less than 40 % of the area is visible becomes an
    ignored region (``iscrowd``): no object to learn, and no background. An image that is no larger stays as it is.

    >>> target = Target(boxes=torch.tensor([[0.0, 0.0, 9.0, 9.0]]), labels=torch.tensor([1]))
    >>> window, _ = RandomTile(64)(torch.zeros(3, 100, 200), target)
    >>> window.shape
    torch.Size([3, 64, 64])

    Args:
        side: of the window in pixels.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Crop an image [C, H, W], and cut its boxes."""
        boxes = as_corners(target["boxes"], image).as_subclass(Tensor)
        height, width = image.shape[-2:]
        center = None
        if len(boxes) and torch.rand(()) < 0.5:
            box = boxes[int(torch.randint(len(boxes), ()))]
            center = (box[:2] + box[2:]) / 2
        left = self._start(width, None if center is None else float(center[0]))
        top = self._start(height, None if center is None else float(center[1]))
        window = image[:, top : top + self.side, left : left + self.side]
        low, high = boxes.new_tensor([left, top]), boxes.new_tensor([left + window.shape[2], top + window.shape[1]])
        cut = torch.cat([boxes[:, :2].clamp(low, high), boxes[:, 2:].clamp(low, high)], dim=1)
        visible = (cut[:, 2:] - cut[:, :2]).prod(1)
        share = visible / (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-6)
        kept = visible > 0
        hidden = share < MIN_VISIBLE_SHARE - 1e-6  # of decimals such as 33.3, 40 % may be rounded to less
        crowd = torch.as_tensor(target.get("iscrowd", torch.zeros(len(boxes)))).bool() | hidden
        changed = Target(**{**target, "boxes": as_corners((cut - low.repeat(2))[kept], window)})
        changed["labels"], changed["iscrowd"] = target["labels"][kept], crowd[kept]
        return tv_tensors.wrap(window, like=image) if isinstance(image, tv_tensors.Image) else window, changed

    def _start(self, side: int, center: float | None) -> int:
        """Draw the first pixel of the window along one side; with a centre, of a window that contains it."""
        low, high = 0, max(side - self.side, 0)
        if center is not None:
            low, high = max(low, int(center) - self.side + 1), min(high, int(center))
        return int(torch.randint(low, max(low, high) + 1, ()))


def create_transforms(
    preset: Preset | SampleTransform,
    sizes: Sequence[Count] = MULTISCALE_SIZES,
    max_size: Count = 1333,
    crop_size: Count = 1024,
    scale_range: tuple[Positive, Positive] = (0.1, 2.0),
    vertical_flip: bool = False,
    color_jitter: NonNegative = 0.0,
) -> SampleTransform | None:
    """Build the augmentation of training images and their boxes.

    Args:
        preset: ``none``; ``flip``: horizontal flip with probability 0.5; ``multiscale``: flip, then resize to one of
            ``sizes``, in half of the cases after a random crop (DETR, arXiv:2005.12872); ``lsj``: flip, resize to 0.1
            to 2 times ``crop_size``, crop or pad to that square (arXiv:2012.07177); ``tiles``: flip, crop to a window
            of ``crop_size`` at the image's own resolution, see `RandomTile`; ``mosaic``: flip, of images that the
            dataset puts together from four, see `create_mosaic`. A transform or another callable on image and target
            is returned as it is.
        sizes: shorter sides for ``multiscale`` in pixels. Its crop scales with the largest of them; for 800, as in
            DETR, it is: resize to 400, 500 or 600, crop to 384 ... 600.
        max_size: largest longer side for ``multiscale`` in pixels.
        crop_size: side of the square for ``lsj`` and of the windows for ``tiles`` in pixels.
        scale_range: smallest and largest scale for ``lsj``.
        vertical_flip: also flip vertically with probability 0.5, e.g. for aerial or microscope images.
        color_jitter: change brightness, contrast and saturation by up to this factor; 0.4 is common.

    Returns:
        A transform of image and boxes; None if there is nothing to do.

    Raises:
        ValueError: if a preset is not known, a size is not positive, or a transform is combined with a flip or jitter.
    """
    check_arguments(create_transforms, locals())
    if not sizes or max_size < min(sizes):
        raise ArgumentError(f"sizes are {list(sizes)}, max_size is {max_size}; give one size or more, none above it")
    if scale_range[0] > scale_range[1]:
        raise ArgumentError(f"scale_range is {list(scale_range)}; give the smaller scale first")
    if callable(preset):
        if vertical_flip or color_jitter:
            raise ArgumentError("vertical_flip and color_jitter belong to presets; put them into your train_transforms")
        return preset
    steps: list[v2.Transform | RandomTile] = []
    if preset != "none":
        steps.append(v2.RandomHorizontalFlip())
    if vertical_flip:
        steps.append(v2.RandomVerticalFlip())
    if preset == "multiscale":
        resize = ShortestSide(list(sizes), max_size)
        unit = max(sizes) / 800
        shorter = ShortestSide([round(side * unit) for side in (400, 500, 600)])
        crop = RandomSizeCrop(round(384 * unit), round(600 * unit))
        steps.append(v2.RandomChoice([resize, v2.Compose([shorter, crop, resize])]))
    elif preset == "lsj":
        steps += [LargeScaleJitter(crop_size, scale_range), RandomSquareCrop(crop_size)]
    elif preset == "tiles":
        steps.append(RandomTile(crop_size))
    if color_jitter > 0:
        steps.append(v2.ColorJitter(brightness=color_jitter, contrast=color_jitter, saturation=color_jitter))
    return v2.Compose(steps) if steps else None


def transform_sample(transform: SampleTransform, image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Apply a transform to an image and its target, and remove boxes that are no longer visible.

    The transform gets a ``tv_tensors.Image`` and the target with its boxes as ``tv_tensors.BoundingBoxes``. It may
    remove boxes together with their labels, and return boxes in any format of ``BoundingBoxes``. A box stays if its
    visible part is at least 1 pixel wide and high. Neither argument is modified.

    Args:
        transform: a transform of torchvision v2, or any callable.
        image: uint8 [C, H, W].
        target: with ``boxes`` and ``labels``.

    Returns:
        The new image and its target: ``boxes``, ``labels``, ``iscrowd`` if the transform says so, and the ``image_id``
        and ``file_name`` that were given.

    Raises:
        TypeError: if the transform does not return an image and a target with ``boxes`` and ``labels``.
        ValueError: if it returns another number of labels than of boxes.
    """
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])
    outcome = transform(tv_tensors.Image(image), {**target, "boxes": boxes})
    if not (isinstance(outcome, tuple | list) and len(outcome) == 2 and isinstance(outcome[1], Mapping)):
        raise TypeError("train_transforms returned something else than (image, target)")
    pixels, found = outcome
    if not isinstance(pixels, Tensor) or pixels.dim() != 3 or not {"boxes", "labels"} <= found.keys():
        raise TypeError(
            "train_transforms returned something else than an image tensor [C, H, W] and a target with boxes and labels"
        )
    if len(found["boxes"]) != len(found["labels"]):
        raise ValueError(
            f"train_transforms returned {len(found['boxes'])} boxes but {len(found['labels'])} labels; "
            "remove a box together with its label"
        )
    _check_frame(found["boxes"], image, pixels)
    boxes = F.clamp_bounding_boxes(as_corners(found["boxes"], pixels)).as_subclass(Tensor)
    visible = (boxes[:, 2:] - boxes[:, :2] >= MIN_VISIBLE_SIDE).all(dim=1)
    labels = found["labels"].as_subclass(Tensor)[visible]
    changed: Target = {"boxes": boxes[visible], "labels": labels}
    if "iscrowd" in found and len(found["iscrowd"]) == len(visible):
        changed["iscrowd"] = found["iscrowd"].as_subclass(Tensor).bool()[visible]
    if "image_id" in target:
        changed["image_id"] = target["image_id"]
    if "file_name" in target:
        changed["file_name"] = target["file_name"]
    return pixels.as_subclass(Tensor), changed


def _check_frame(boxes: object, image: Tensor, pixels: Tensor) -> None:
    """Warn once per process of a transform that changes the size of the image and leaves the boxes as they were."""
    before, after = tuple(image.shape[-2:]), tuple(pixels.shape[-2:])
    is_old = isinstance(boxes, tv_tensors.BoundingBoxes) and tuple(boxes.canvas_size) == before
    if before != after and is_old and "LCD-D129" not in _warned:
        _warned.add("LCD-D129")
        _logger.warning(
            "[LCD-D129] train_transforms made an image of %dx%d from one of %dx%d and left its boxes in the frame of "
            "the old one; change them alike, and return them as a plain tensor, or with the new canvas_size",
            *after[::-1], *before[::-1],
        )  # fmt: skip


def as_corners(boxes: Tensor, image: Tensor) -> tv_tensors.BoundingBoxes:
    """Boxes of any torchvision format as corners (x1, y1, x2, y2); plain tensors are corners already."""
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        return F.convert_bounding_box_format(boxes, new_format="XYXY")
    return tv_tensors.BoundingBoxes(boxes.reshape(-1, 4), format="XYXY", canvas_size=image.shape[-2:])


def scaled_size(height: int, width: int, factor: float) -> tuple[int, int]:
    """Height and width times a factor, rounded, at least 1."""
    return max(1, round(height * factor)), max(1, round(width * factor))


def _channels_innermost(inpt: Tensor) -> Any:
    """Lay an image out channels last, as ours are; resizing then takes half of the time, this copy included."""
    if not isinstance(inpt, tv_tensors.Image):
        return inpt
    return tv_tensors.wrap(inpt.permute(1, 2, 0).contiguous().permute(2, 0, 1), like=inpt)
