"""Inference on single images and lists."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self, cast, overload

import torch
from PIL import Image
from torch import nn

from lightning_convnext_det.arguments import Count, Fraction, check_arguments, check_class_names
from lightning_convnext_det.errors import ArgumentError, DivergenceError
from lightning_convnext_det.inference.images import ImageSource, read_source
from lightning_convnext_det.inference.prediction import Prediction
from lightning_convnext_det.modules import load_module
from lightning_convnext_det.ops.nms import NMSMethod
from lightning_convnext_det.suggestions import suggest
from lightning_convnext_det.types import Detection
from lightning_convnext_det.visualization import SCORE_THRESHOLD


class Predictor:
    """Finds objects in an image or a list of images.

    An image is a path, a Pillow image, an array [H, W, 3] in RGB or a tensor [3, H, W], uint8 or floats in 0..1; the
    result is a `Prediction` whose boxes are corners (x1, y1, x2, y2) in pixels of that image.

    >>> import torch
    >>> from lightning_convnext_det import FasterRCNN, Predictor
    >>> detector = FasterRCNN(2, backbone="test_convnext", min_size=64, max_size=96)
    >>> predictor = Predictor(detector, ["cat", "dog"], score_threshold=0.5)
    >>> found = predictor(torch.zeros(3, 60, 80, dtype=torch.uint8))
    >>> found
    Prediction of 0 objects in an image of 80x60
    >>> len(predictor([torch.rand(3, 60, 80), torch.rand(3, 90, 70)]))
    2

    Args:
        detector: the network; each call leaves its mode, device and ``nms`` as they were.
        class_names: in order of label.
        category_ids: the dataset's own ids, in order of label (default: the labels).
        device: where to compute; ``auto`` is a CUDA device if there is one, else the CPU (default: the detector's
            own). Another device than the detector's costs a move of the weights at each call.
        score_threshold: leave out boxes with a lower score; ``best`` leaves out those below the threshold of their
            class in ``score_thresholds``. The detector's own threshold applies before.
        classes: names of the classes to keep (default: all).
        batch_size: images that go through the network at once.
        precision: ``bf16-mixed`` is faster where the device computes in bfloat16; boxes and scores stay float32.
        nms: kind of NMS: ``hard``, ``soft`` or ``none`` (default: the detector's own).
        score_thresholds: the best threshold of each class in order of label, as modules have them after a training;
            None stands for 0.3.

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
        score_threshold: Fraction | Literal["best"] | None = None,
        classes: Sequence[str] | None = None,
        batch_size: Count = 8,
        precision: Literal["32-true", "bf16-mixed"] = "32-true",
        nms: NMSMethod | None = None,
        score_thresholds: Sequence[Fraction | None] | None = None,
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
        self.score_thresholds = _best_thresholds(score_threshold, score_thresholds, self.class_names)
        self.classes = list(self.class_names if classes is None else classes)
        self._kept = torch.tensor([self._label(name) for name in self.classes], dtype=torch.int64)
        self.batch_size = batch_size
        self.precision = precision

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        score_threshold: float | Literal["best"] | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int = 8,
        precision: Literal["32-true", "bf16-mixed"] = "32-true",
        nms: NMSMethod | None = None,
    ) -> Self:
        """Load the detector, its classes and their ids from a checkpoint of this package; needs no network or dataset.

        Args:
            path: a local file.
            device: where to compute; ``auto`` is a CUDA device if there is one, else the CPU.
            score_threshold: leave out boxes with a lower score; ``best`` leaves out those below the threshold of their
                class that the checkpoint holds. The detector's own threshold applies before.
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
            score_thresholds=module.score_thresholds,
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
            return self._predict([cast(ImageSource, images)], ["the image"])[0]
        found = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            found += self._predict(batch, [f"images[{start + i}]" for i in range(len(batch))])
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
            score_threshold: boxes with a lower score are not drawn (default: the predictor's own; if it has none, the
                best of their class, or 0.3 where that is not known).
        """
        found = self._predict([image], ["the image"])[0] if prediction is None else prediction
        own = None if self.score_threshold == "best" else self.score_threshold
        return found._draw(read_source(image, "the image"), own if score_threshold is None else score_threshold, font)

    def _predict(self, sources: Sequence[ImageSource], names: Sequence[str]) -> list[Prediction]:
        images = [read_source(source, name) for source, name in zip(sources, names, strict=True)]
        amp = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")
        with _borrowed(self.detector, self.device, self.nms), torch.inference_mode(), amp:
            detections: list[Detection] = self.detector([image.to(self.device) for image in images])
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        return [self._prediction(*found) for found in zip(detections, sources, sizes, strict=True)]

    def _prediction(self, detection: Detection, source: ImageSource, size: tuple[int, int]) -> Prediction:
        labels, scores = detection["labels"].cpu(), detection["scores"].to("cpu", torch.float32)
        given = None if self.score_threshold in (None, "best") else [self.score_threshold] * len(self.class_names)
        least = self.score_thresholds if self.score_threshold == "best" else cast(list[float] | None, given)
        kept = torch.isin(labels, self._kept)
        if least is not None:
            kept &= scores >= torch.tensor(least)[labels]
        # indexing makes ordinary tensors of those that inference mode made; a user may change them
        return Prediction(
            detection["boxes"].to("cpu", torch.float32)[kept],
            labels[kept],
            scores[kept],
            self.class_names,
            self.category_ids,
            source,
            size,
            drawn_from=least or self.score_thresholds or SCORE_THRESHOLD,
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


def _best_thresholds(
    score_threshold: float | str | None, best: Sequence[float | None] | None, class_names: list[str]
) -> list[float] | None:
    """The best thresholds, with the default of drawings for classes that have none."""
    if best is None and score_threshold == "best":
        raise ArgumentError(
            "score_threshold is 'best', but no thresholds are known; a training with validation stores them in its "
            "checkpoints, and so does convnext-det thresholds CKPT --data.root DIR"
        )
    if best is not None and len(best) != len(class_names):
        raise ArgumentError(f"score_thresholds has {len(best)} entries, but class_names has {len(class_names)}")
    return None if best is None else [SCORE_THRESHOLD if value is None else value for value in best]


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
