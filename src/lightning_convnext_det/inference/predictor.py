"""Inference on single images and lists: files, Pillow images, NumPy arrays and tensors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from lightning_convnext_det.arguments import Count, Fraction, check_arguments, check_class_names
from lightning_convnext_det.data.io.decode import MAX_ASPECT, MIN_SIDE, read_image, to_rgb_tensor
from lightning_convnext_det.errors import ArgumentError, DataError, DivergenceError
from lightning_convnext_det.inference.prediction import Prediction
from lightning_convnext_det.models.image_transform import OVERSHOOT
from lightning_convnext_det.modules import load_module
from lightning_convnext_det.ops.nms import NMSMethod
from lightning_convnext_det.suggestions import suggest
from lightning_convnext_det.types import Detection
from lightning_convnext_det.visualization import SCORE_THRESHOLD, class_colors, draw_detections

ImageSource = str | Path | Image.Image | NDArray[np.uint8] | NDArray[np.float32] | NDArray[np.float64] | Tensor
"""A file, a Pillow image, an array [H, W, 3] in RGB or a tensor [3, H, W]; uint8 or floats in 0..1."""


class Predictor:
    """Finds objects in an image or a list of images.

    An image is a path, a Pillow image, an array [H, W, 3] in RGB or a tensor [3, H, W], uint8 or floats in 0..1; the
    result is a `Prediction` whose boxes are corners (x1, y1, x2, y2) in pixels of that image.

    >>> import torch
    >>> from lightning_convnext_det import FasterRCNN, Predictor
    >>> detector = FasterRCNN(2, backbone="test_convnext", min_size=64, max_size=96)
    >>> predictor = Predictor(detector, ["cat", "dog"], score_threshold=0.5)
    >>> found = predictor(torch.zeros(3, 60, 80, dtype=torch.uint8))
    >>> sorted(found)
    ['boxes', 'category_ids', 'labels', 'names', 'scores']
    >>> len(predictor([torch.rand(3, 60, 80), torch.rand(3, 90, 70)]))
    2

    Args:
        detector: the network; each call leaves its mode, device and ``nms`` as they were.
        class_names: in order of label.
        category_ids: the dataset's own ids, in order of label (default: the labels).
        device: where to compute; ``auto`` is a CUDA device if there is one, else the CPU (default: the detector's
            own). Another device than the detector's costs a move of the weights at each call.
        score_threshold: leave out boxes with a lower score; the detector's own threshold applies before.
        classes: names of the classes to keep (default: all).
        batch_size: images that go through the network at once.
        precision: ``bf16-mixed`` is faster where the device computes in bfloat16; boxes and scores stay float32.
        nms: kind of NMS: ``hard``, ``soft`` or ``none`` (default: the detector's own).

    Raises:
        ValueError: if names and ids do not fit the detector or each other, or a number is out of range.
        DivergenceError: if a weight is not finite.
    """

    def __init__(
        self,
        detector: nn.Module,
        class_names: Sequence[str],
        category_ids: Sequence[int] | None = None,
        device: str | torch.device | None = None,
        score_threshold: Fraction | None = None,
        classes: Sequence[str] | None = None,
        batch_size: Count = 8,
        precision: Literal["32-true", "bf16-mixed"] = "32-true",
        nms: NMSMethod | None = None,
    ) -> None:
        check_arguments(Predictor.__init__, locals())
        check_class_names(class_names)
        self.class_names = list(class_names)
        self.category_ids = list(range(len(self.class_names)) if category_ids is None else category_ids)
        _check_lengths(detector, self.class_names, self.category_ids)
        _check_weights(detector)
        self.device = _device_of(detector) if device is None else _device(device)
        self.detector = detector
        self.nms = nms
        self.score_threshold = score_threshold
        self.classes = list(self.class_names if classes is None else classes)
        self._kept = torch.tensor([self._label(name) for name in self.classes], dtype=torch.int64)
        self.batch_size = batch_size
        self.precision = precision

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        score_threshold: float | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int = 8,
        precision: Literal["32-true", "bf16-mixed"] = "32-true",
        nms: NMSMethod | None = None,
    ) -> Self:
        """Load the detector, its classes and their ids from a checkpoint of this package; needs no network or dataset.

        Args:
            path: a local file.
            device: where to compute; ``auto`` is a CUDA device if there is one, else the CPU.
            score_threshold: leave out boxes with a lower score; the detector's own threshold applies before.
            classes: names of the classes to keep (default: all).
            batch_size: images that go through the network at once.
            precision: ``32-true`` or ``bf16-mixed``.
            nms: kind of NMS: ``hard``, ``soft`` or ``none`` (default: as in the checkpoint).

        Raises:
            CheckpointError: if the file is missing, damaged or not of this package.
            ValueError: if another argument cannot be used.
            DivergenceError: if a weight is not finite.
        """
        module = load_module(path)
        place = _device(device)
        return cls(
            module.detector.to(place),
            module.class_names,
            module.category_ids,
            device=place,
            score_threshold=score_threshold,
            classes=classes,
            batch_size=batch_size,
            precision=precision,
            nms=nms,
        )

    @overload
    def __call__(self, images: ImageSource) -> Prediction: ...  # type: ignore[overload-overlap]  # a str is one path
    @overload
    def __call__(self, images: Sequence[ImageSource]) -> list[Prediction]: ...
    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> Prediction | list[Prediction]:
        """Find objects in an image, or in a list of images of any kinds and sizes.

        Args:
            images: files and Pillow images are turned upright by their EXIF orientation; arrays [H, W, 3] are RGB
                (OpenCV reads BGR: reverse the last axis); tensors are [3, H, W]; both uint8 or floats in 0..1.

        Returns:
            For an image a `Prediction`, for a list a list. Boxes are in pixels of the upright image.

        Raises:
            DataError: if an image cannot be read, or its shape or pixels are not those of an RGB image.
            TypeError: if an item is not an image.
        """
        if not isinstance(images, list | tuple):
            return self._predict([_read(images, "the image")])[0]
        found = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            found += self._predict([_read(image, f"images[{i}]") for i, image in enumerate(batch, start)])
        return found

    def draw(
        self,
        image: ImageSource,
        prediction: Prediction | None = None,
        font: str | None = None,
        score_threshold: float | None = None,
    ) -> Image.Image:
        """Draw the detections of an image on a copy of it.

        Args:
            image: the image, as in a call.
            prediction: its detections (default: found now).
            font: TrueType file for class names that Pillow's own font (Latin script) cannot write.
            score_threshold: boxes with a lower score are not drawn (default: the predictor's own, or 0.3 if it has
                none; a Deformable DETR always finds a hundred boxes, most of them with scores near 0).
        """
        pixels = _read(image, "the image")
        found = self._predict([pixels])[0] if prediction is None else prediction
        thresholds = (score_threshold, self.score_threshold, SCORE_THRESHOLD)
        drawn = found["scores"] >= next(threshold for threshold in thresholds if threshold is not None)
        names = [name for name, is_drawn in zip(found["names"], drawn.tolist(), strict=True) if is_drawn]
        colors = class_colors(self.class_names)
        return draw_detections(pixels, found["boxes"][drawn], names, found["scores"][drawn], colors, font)

    def _predict(self, images: list[Tensor]) -> list[Prediction]:
        amp = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")
        with _borrowed(self.detector, self.device, self.nms), torch.inference_mode(), amp:
            detections: list[Detection] = self.detector([image.to(self.device) for image in images])
        return [self._prediction(detection) for detection in detections]

    def _prediction(self, detection: Detection) -> Prediction:
        labels, scores = detection["labels"].cpu(), detection["scores"].to("cpu", torch.float32)
        kept = torch.isin(labels, self._kept) & (scores >= (self.score_threshold or 0.0))
        # indexing makes ordinary tensors of those that inference mode made; a user may change them
        labels = labels[kept]
        return Prediction(
            boxes=detection["boxes"].to("cpu", torch.float32)[kept],
            labels=labels,
            scores=scores[kept],
            names=[self.class_names[label] for label in labels.tolist()],
            category_ids=torch.tensor(self.category_ids, dtype=torch.int64)[labels],
        )

    def _label(self, name: str) -> int:
        if name not in self.class_names:
            raise ArgumentError(f"classes: the detector has no class '{name}'; {suggest(name, self.class_names)}")
        return self.class_names.index(name)


@contextmanager
def _borrowed(detector: nn.Module, device: torch.device, nms: NMSMethod | None) -> Iterator[None]:
    """Set a detector up for inference, and give its modes, device and ``nms`` back: a training may go on with it."""
    training = {module: module.training for module in detector.modules()}
    home, own_nms = _device_of(detector), getattr(detector, "nms", None)
    try:
        detector.eval()
        if home != device:
            detector.to(device)
        if nms is not None:
            detector.nms = nms  # type: ignore[assignment]  # every detector has the choice
        yield
    finally:
        if nms is not None:
            detector.nms = own_nms  # type: ignore[assignment]
        if home != device:
            detector.to(home)
        for module, mode in training.items():
            module.training = mode


def _check_lengths(detector: nn.Module, class_names: list[str], category_ids: list[int]) -> None:
    num_classes = getattr(detector, "num_classes", len(class_names))
    if len(class_names) != num_classes:
        raise ArgumentError(f"class_names has {len(class_names)} entries, but the detector has {num_classes} classes")
    if len(category_ids) != len(class_names):
        raise ArgumentError(f"category_ids has {len(category_ids)} entries, but class_names has {len(class_names)}")


def _check_weights(detector: nn.Module) -> None:
    for name, value in detector.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise DivergenceError(f"[LCD-N002] weight '{name}' is not finite, so nothing is found; use other weights")


def _device_of(detector: nn.Module) -> torch.device:
    first = next(detector.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device  # with its index: cuda:0
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"device '{name}' cannot be used ({reason}); 'auto' takes what there is") from None


def _read(image: object, name: str) -> Tensor:
    """The pixels of an image, uint8 or float32 in 0..1, [3, H, W]; ``name`` is what messages call it."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        pixels = to_rgb_tensor(image, name=name)
    elif isinstance(image, np.ndarray):
        pixels = _read_array(image, name)
    elif isinstance(image, Tensor):
        pixels = _read_tensor(image, name)
    else:
        raise TypeError(
            f"{name} is of type {type(image).__name__}; give a path, a Pillow image, an array [height, width, 3], "
            "a tensor [3, height, width], or a list of these"
        )
    height, width = pixels.shape[1:]
    if min(height, width) < MIN_SIDE:
        raise DataError(f"[LCD-I022] {name} is {width}x{height}; each side needs {MIN_SIDE} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise DataError(f"[LCD-I021] {name} is {width}x{height}; one side is over {MAX_ASPECT:.0f} x the other")
    return pixels


def _read_array(image: NDArray[np.generic], name: str) -> Tensor:
    if image.ndim != 3 or image.shape[2] != 3:
        raise _shape_error(name, "array", image.shape)
    if image.dtype.kind != "f" and image.dtype != np.uint8:
        raise DataError(f"[LCD-I032] {name} holds {image.dtype} pixels; give uint8, or floats in 0..1")
    # a copy: torch warns of arrays that cannot be written to, and refuses those that run backwards
    copy = np.array(image, np.uint8 if image.dtype == np.uint8 else np.float32, order="C")
    return _checked(torch.from_numpy(copy).permute(2, 0, 1), name)


def _read_tensor(image: Tensor, name: str) -> Tensor:
    if image.dim() != 3 or image.shape[0] != 3:
        raise _shape_error(name, "tensor", image.shape)
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise DataError(f"[LCD-I032] {name} holds {image.dtype} pixels; give torch.uint8, or floats in 0..1")
    return _checked(image.detach().to(torch.float32), name)


def _shape_error(name: str, kind: Literal["array", "tensor"], shape: Sequence[int]) -> DataError:
    last = kind == "array"
    channels, opposite = (shape[-1:], shape[:1]) if last else (shape[:1], shape[-1:])
    if len(shape) == 4:
        remedy = "give several images as a list: list(x)"
    elif len(shape) == 2 or channels == (1,):
        remedy = "repeat the grey channel three times"
    elif len(shape) == 3 and channels == (4,):
        remedy = f"drop the alpha channel: {'x[..., :3]' if last else 'x[:3]'}"
    elif len(shape) == 3 and opposite == (3,):
        remedy = f"channels come {'last: x.transpose(1, 2, 0)' if last else 'first: x.permute(2, 0, 1)'}"
    else:
        remedy = "convert it"
    expected = "[height, width, 3]" if last else "[3, height, width]"
    return DataError(f"[LCD-I032] {name} has shape {list(shape)}; expected {expected} in RGB: {remedy}")


def _checked(pixels: Tensor, name: str) -> Tensor:
    """The pixels, if they are uint8 or finite floats in 0..1."""
    if pixels.dtype == torch.uint8 or pixels.numel() == 0:
        return pixels
    low, high = (x.item() for x in pixels.aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):  # aminmax passes nan on
        raise DataError(f"[LCD-I031] {name} holds pixels that are not finite")
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise DataError(
            f"[LCD-I030] {name} holds floats from {low:.3g} to {high:.3g}; give uint8, or floats in 0..1 that are not "
            "normalised: the detector does that"
        )
    return pixels
