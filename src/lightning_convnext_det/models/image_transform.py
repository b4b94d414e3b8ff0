"""Image transform of every detector: images of any size to one normalised batch, and boxes back to the images.

Every detector holds one `ImageTransform`, so the resize rule and the normalisation travel with the weights. Resizing
is bilinear, with zeros at the right and the bottom, and follows torchvision's ``GeneralizedRCNNTransform`` (normalised
images in floating point, sizes rounded down), OpenCV (8-bit images, sizes rounded to the nearest), both without
antialiasing, or detectron2 with Pillow (8-bit images, antialiased, sizes rounded to the nearest).
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_convnext_det.errors import DataError
from lightning_convnext_det.ops.host_numbers import send
from lightning_convnext_det.ops.resize import resize_like_opencv, resize_like_pillow
from lightning_convnext_det.ops.tracing import is_recording
from lightning_convnext_det.types import Detection, Target

Resize = Literal["torchvision", "opencv", "pillow"]
# the statistics that almost every timm backbone is trained with (timm.data.IMAGENET_DEFAULT_MEAN and _STD)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OVERSHOOT = 0.25  # what resizing with bicubic or Lanczos weights may add beyond 0 and 1


class ImageTransform(nn.Module):
    """Resizes, normalises and pads images to a batch, and scales boxes to the resized images and back.

    >>> transform = ImageTransform(min_size=64, max_size=96)
    >>> images = [torch.rand(3, 32, 40), torch.zeros(3, 64, 64, dtype=torch.uint8)]
    >>> batch, sizes, _ = transform(images)
    >>> batch.shape, batch.dtype, sizes
    (torch.Size([2, 3, 64, 96]), torch.float32, [(64, 80), (64, 64)])
    >>> found = {"boxes": torch.tensor([[0.0, 0.0, 80.0, 64.0]]), "labels": torch.tensor([0]), "scores": torch.ones(1)}
    >>> transform.restore([found], sizes[:1], [(32, 40)])[0]["boxes"]
    tensor([[ 0.,  0., 40., 32.]])

    Args:
        min_size: length of the shorter side after resizing, in pixels; of several, one is drawn per image in training
            and the last is used in evaluation.
        max_size: limit of the longer side, in pixels.
        image_mean: mean of each channel of images in 0..1; of red, green and blue for any number of channels, see
            `channel_statistics`.
        image_std: standard deviation of each channel.
        in_chans: channels of the images.
        size_divisible: pad both sides to a multiple of this.
        fixed_size: (height, width) that every batch is padded to, after images are resized to fit into it.
        resize: ``torchvision`` interpolates normalised images; ``opencv`` and ``pillow`` interpolate 8-bit ones to the
            same bits as these libraries, floating point images are then rounded to 8 bits first.
        smallest_side: pad both sides to at least this.

    Attributes:
        resize_in_training: False when the data loader has chosen the sizes already (multi-scale crops, jitter).
    """

    def __init__(
        self,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        in_chans: int = 3,
        size_divisible: int = 32,
        fixed_size: Sequence[int] | None = None,
        resize: Resize = "torchvision",
        smallest_side: int = 1,
    ) -> None:
        super().__init__()
        self.min_sizes = [min_size] if isinstance(min_size, int) else list(min_size)
        self.max_size = max_size
        if not self.min_sizes or min(self.min_sizes) < 1 or max_size < 1:
            raise ValueError(f"min_size and max_size must be at least 1 pixel, got {min_size} and {max_size}")
        if len(image_mean) != len(image_std):
            raise ValueError(f"image_mean has {len(image_mean)} channels, image_std has {len(image_std)}")
        if fixed_size and (len(fixed_size) != 2 or any(side < 1 or side % size_divisible for side in fixed_size)):
            raise ValueError(
                f"fixed_size is {list(fixed_size)}; expected (height, width), multiples of {size_divisible}"
            )
        self.fixed_size = tuple(fixed_size) if fixed_size else None
        self.image_mean = channel_statistics(image_mean, in_chans)
        self.image_std = channel_statistics(image_std, in_chans)
        self.size_divisible, self.smallest_side = size_divisible, smallest_side
        self.resize = resize
        self.resize_in_training = True

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None
    ) -> tuple[Tensor, list[tuple[int, int]], list[Target] | None]:
        """Make a batch.

        Args:
            images: uint8 or float in 0..1, each [C, H, W] of its own size, or stacked [B, C, H, W].
            targets: their objects, boxes in pixels of these images; not modified.

        Returns:
            The batch float32 [B, C, H', W'], the (height, width) of every resized image without its padding, and the
            targets with boxes in pixels of the resized images.

        Raises:
            TypeError: if an image is neither uint8 nor floating point.
            DataError: if floating point pixels are not in 0..1.
            ValueError: if an image is not [C, H, W] with as many channels as the normalisation.
        """
        if not len(images):
            raise ValueError("images is empty; give at least one image")
        check_range(images)
        resized = [self._prepare(image, i) for i, image in enumerate(images)]
        sizes = [(x.shape[-2], x.shape[-1]) for x in resized]
        if targets is None:
            return self._batch(resized), sizes, None
        moved = []
        for image, target, size in zip(images, targets, sizes, strict=True):
            original = image.shape[-2], image.shape[-1]
            changed = Target(**{**target, "boxes": scale_boxes(target["boxes"].to(torch.float32), original, size)})
            if "ignored" in target:
                changed["ignored"] = scale_boxes(target["ignored"], original, size)
            moved.append(changed)
        return self._batch(resized), sizes, moved

    def restore(
        self, detections: list[Detection], sizes: Sequence[tuple[int, int]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[Detection]:
        """Scale boxes from the resized images of ``sizes`` (height, width) to those of ``original_sizes``."""
        return [
            Detection(boxes=scale_boxes(d["boxes"], size, original), labels=d["labels"], scores=d["scores"])
            for d, size, original in zip(detections, sizes, original_sizes, strict=True)
        ]

    def _prepare(self, image: Tensor, index: int) -> Tensor:
        """Check, resize and normalise one image, float32 [C, H', W']."""
        if image.dim() != 3 or image.shape[0] != len(self.image_mean):
            raise ValueError(
                f"images[{index}] has shape {list(image.shape)}; expected [{len(self.image_mean)}, height, width], "
                "in a list or stacked"
            )
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"images[{index}] is {image.dtype}; expected uint8 or floating point in 0..1")
        size = self.new_size(image.shape[-2], image.shape[-1])
        if self.resize != "torchvision":
            if size != image.shape[-2:]:
                pixels = image if image.dtype == torch.uint8 else (image * 255).round().clamp(0, 255).to(torch.uint8)
                image = (
                    resize_like_opencv(pixels, size) if self.resize == "opencv" else resize_like_pillow(pixels, size)
                )
            return self._normalize(image, 255.0)
        image = self._normalize(image, 1.0)  # before resizing, as torchvision does: the same bits
        if size == image.shape[-2:]:
            return image
        return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]

    def _normalize(self, image: Tensor, full_scale: float) -> Tensor:
        """Normalise an image brought to 0..full_scale; the scale decides only how the result is rounded."""
        here = 255.0 if image.dtype == torch.uint8 else 1.0
        # decoders write the channels innermost; the copy turns them, as mixed layouts would cost more below
        image = image.to(torch.float32, memory_format=torch.contiguous_format)
        if here != full_scale:
            image = image / here if full_scale == 1 else image / here * full_scale
        mean, std = (
            send([x * full_scale for x in numbers], image.device, image.dtype)[:, None, None]
            for numbers in (self.image_mean, self.image_std)
        )
        return (image - mean).div_(std)

    def new_size(self, height: int, width: int) -> tuple[int, int]:
        """Choose height and width that an image of these sides is resized to; drawn, in training with several."""
        if self.training and not self.resize_in_training and not self.fixed_size:
            return height, width
        choice = int(torch.randint(len(self.min_sizes), ())) if self.training and len(self.min_sizes) > 1 else -1
        scale = min(self.min_sizes[choice] / min(height, width), self.max_size / max(height, width))
        if self.training and not self.resize_in_training:
            scale = 1.0
        if self.fixed_size:
            scale = min(scale, self.fixed_size[0] / height, self.fixed_size[1] / width)
        rounding = 0.0 if self.resize == "torchvision" else 0.5
        return max(1, int(height * scale + rounding)), max(1, int(width * scale + rounding))

    def _batch(self, images: list[Tensor]) -> Tensor:
        height = _round_up(max(self.smallest_side, *(x.shape[-2] for x in images)), self.size_divisible)
        width = _round_up(max(self.smallest_side, *(x.shape[-1] for x in images)), self.size_divisible)
        height, width = self.fixed_size or (height, width)
        batch = images[0].new_zeros(len(images), len(self.image_mean), height, width)
        for slot, image in zip(batch, images, strict=True):
            slot[:, : image.shape[-2], : image.shape[-1]] = image
        return batch


def channel_statistics(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Adapt means or standard deviations of red, green and blue to images of another number of channels.

    As timm does with the first convolution of pretrained weights (``adapt_input_conv``): one channel stands for all
    three, more repeat them.

    >>> channel_statistics((0.5, 0.4, 0.3), 4)
    (0.5, 0.4, 0.3, 0.5)

    Args:
        values: one for each channel, one for all of them, or three for red, green and blue.
        channels: of the images.

    Raises:
        ValueError: if there is another number of values.
    """
    if len(values) == channels:
        return tuple(values)
    if len(values) not in (1, 3):
        raise ValueError(f"image_mean and image_std have {len(values)} values, but in_chans is {channels}")
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[i % len(values)] for i in range(channels))


def check_tensors(images: object) -> None:
    """Refuse what is not a list of tensors or a stacked one.

    Raises:
        TypeError: naming the image, its type and what to do.
    """
    if isinstance(images, Tensor):
        return
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise TypeError(f"images is of type {type(images).__name__}; give a list of tensors [channels, height, width]")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(
                f"images[{i}] is of type {type(image).__name__}; a detector takes tensors [channels, height, width], a "
                "Predictor also files, Pillow images and arrays"
            )


def check_range(images: Sequence[Tensor] | Tensor) -> None:
    """Refuse floating point images in 0..255 and normalised ones, whose objects a detector would not recognise.

    One transfer from the device for the whole batch, none if all images are uint8.

    Raises:
        DataError: naming the image and what to do.
    """
    floats = [(i, image) for i, image in enumerate(images) if image.is_floating_point() and image.numel()]
    if not floats or torch.compiler.is_compiling() or is_recording():
        return
    extremes = torch.stack([torch.stack(image.detach().aminmax()).float() for _, image in floats]).tolist()
    for (i, _), (low, high) in zip(floats, extremes, strict=True):
        if low != low or high != high:
            raise DataError(f"[LCD-I031] images[{i}] has pixels that are not finite; correct or remove the image")
        if low < -OVERSHOOT:
            remedy = "give it in 0..1 and not normalised: the detector does that"
        elif high > 1 + OVERSHOOT:
            remedy = "give it in 0..1, divided by 255, or as uint8"
        else:
            continue
        raise DataError(f"[LCD-I030] images[{i}] holds floats from {low:.3g} to {high:.3g}; {remedy}")


def scale_boxes(boxes: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Scale boxes [N, 4] (x1, y1, x2, y2) from an image of (height, width) ``size`` to one of ``new_size``."""
    new, old = (torch.tensor([width, height], dtype=boxes.dtype) for height, width in (new_size, size))
    return boxes * send((new / old).repeat(2), boxes.device)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
