"""Inference on images, lists, folders and videos; with windows, test-time augmentation and ensembles."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Literal, Self, cast, overload
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor, nn

from lightning_convnext_det.arguments import Count, Fraction, check_arguments, check_class_names
from lightning_convnext_det.data.io.pixels import Channels, GreyRange
from lightning_convnext_det.data.io.regions import RegionImage
from lightning_convnext_det.errors import ArgumentError, DivergenceError
from lightning_convnext_det.inference.images import ImageSource, PixelFormat, read_source
from lightning_convnext_det.inference.prediction import Prediction
from lightning_convnext_det.inference.sources import (
    SourceImage,
    check_is_one,
    list_sources,
    progress_bar,
    read_batches,
)
from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.fused import FusedDetector, augment_detector
from lightning_convnext_det.models.tiling import Overlap
from lightning_convnext_det.modules import load_module
from lightning_convnext_det.modules.registry import load_members
from lightning_convnext_det.ops.nms import NMSMethod
from lightning_convnext_det.ops.window_merging import TileMerge
from lightning_convnext_det.suggestions import suggest
from lightning_convnext_det.types import Detection
from lightning_convnext_det.visualization import SCORE_THRESHOLD

_logger = logging.getLogger(__name__)
_locks: WeakKeyDictionary[nn.Module, Lock] = WeakKeyDictionary()  # of the detectors in use
_looking_up = Lock()


class Predictor:
    """Finds objects in an image, in a list of images, or in folders and videos of any length (`stream`).

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
        tiles: find objects in windows of this side in pixels, and in the whole image (default: no windows).
        tile_overlap: share of a window that the next one covers at least.
        tile_merge: box of an object that several windows see: ``nmm``, ``nms`` or ``wbf``, see `merge_windows`.
        tta: fuse the detections in several views of each image, e.g. ``flip,scales=0.8:1.0:1.25`` (default: one view).
        progress: show a progress bar for more than 20 images, where standard error is a terminal.
        value_range: values of 16-bit grey files and Pillow images that become 0 and 255; those outside are clipped
            (default: 0 and 65535, with a warning).

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
        tiles: Count | None = None,
        tile_overlap: Overlap = 0.2,
        tile_merge: TileMerge = "nmm",
        tta: str | None = None,
        progress: bool = True,
        value_range: tuple[int, int] | None = None,
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
        self.classes = [classes] if isinstance(classes, str) else list(self.class_names if classes is None else classes)
        self._kept = torch.tensor([self._label(name) for name in self.classes], dtype=torch.int64)
        self.batch_size = batch_size
        self.precision = precision
        self.tiles, self.tile_overlap, self.tile_merge, self.tta = tiles, tile_overlap, tile_merge, tta
        self.progress = progress
        channels = next((part.in_chans for part in detector.modules() if isinstance(part, TimmPyramid)), 3)
        if value_range is not None and value_range[0] >= value_range[1]:
            raise ArgumentError(f"value_range is {list(value_range)}; give the lower value first")
        grey = None if value_range is None else GreyRange(*value_range, clip=True)
        self.pixel_format = PixelFormat(cast(Channels, channels), grey, tiles)
        self._augmented()  # refuses views that cannot be read

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path | Sequence[str | Path],
        device: str | torch.device = "auto",
        score_threshold: float | Literal["best"] | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int = 8,
        precision: Literal["32-true", "bf16-mixed"] = "32-true",
        nms: NMSMethod | None = None,
        tiles: int | None = None,
        tile_overlap: float = 0.2,
        tile_merge: TileMerge = "nmm",
        tta: str | None = None,
        progress: bool = True,
        value_range: tuple[int, int] | None = None,
    ) -> Self:
        """Load the detector, its classes and their ids from a checkpoint of this package; needs no network or dataset.

        Args:
            path: a local file; several are an ensemble, whose detections are fused. Their classes must be the same.
            device: where to compute; ``auto`` is a CUDA device if there is one, else the CPU.
            score_threshold: leave out boxes with a lower score; ``best`` leaves out those below the threshold of their
                class that the checkpoint holds, which are not those of fused scores (``tta``, an ensemble). The
                detector's own threshold applies before.
            classes: names of the classes to keep (default: all).
            batch_size: images that go through the network at once.
            precision: ``32-true`` or ``bf16-mixed``.
            nms: kind of NMS: ``hard``, ``soft`` or ``none`` (default: as in the checkpoint).
            tiles: find objects in windows of this side in pixels, and in the whole image (default: no windows).
            tile_overlap: share of a window that the next one covers at least.
            tile_merge: box of an object that several windows see: ``nmm``, ``nms`` or ``wbf``.
            tta: fuse the detections in several views of each image, e.g. ``flip,scales=0.8:1.0:1.25``.
            progress: show a progress bar for more than 20 images, where standard error is a terminal.
            value_range: values of 16-bit grey that become 0 and 255 (default: those of the training).

        Raises:
            CheckpointError: if the file is missing, damaged or not of this package.
            ValueError: if another argument cannot be used.
            DivergenceError: if a weight is not finite.
        """
        paths = [path] if isinstance(path, str | Path) else list(path)
        if not paths:
            raise ArgumentError("there is no path; give that of a checkpoint, or several for an ensemble")
        first, *others = paths
        module, place = load_module(first), _device(device)
        members = load_members(others, module)
        if score_threshold == "best" and (members or tta):
            raise ArgumentError(
                "score_threshold is 'best', but a checkpoint's thresholds are not those of fused scores (tta, an "
                "ensemble); give a number: convnext-det thresholds with --tta or --ensemble prints the best ones"
            )
        detector = FusedDetector([module.detector, *members]) if members else module.detector
        predictor = cls(
            detector.to(place),
            module.class_names,
            module.category_ids,
            device=place,
            score_threshold=score_threshold,
            classes=classes,
            batch_size=batch_size,
            precision=precision,
            nms=nms,
            score_thresholds=None if members or tta else module.score_thresholds,
            tiles=tiles,
            tile_overlap=tile_overlap,
            tile_merge=tile_merge,
            tta=tta,
            progress=progress,
            value_range=value_range,
        )
        predictor.pixel_format = _follow_training(predictor.pixel_format, module.grey_range)
        return predictor

    @overload
    def __call__(self, images: ImageSource) -> Prediction: ...  # type: ignore[overload-overlap]  # a str is one path
    @overload
    def __call__(self, images: Sequence[ImageSource]) -> list[Prediction]: ...
    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> Prediction | list[Prediction]:
        """Find objects in an image, or in a list of images of any kinds and sizes.

        Args:
            images: files and Pillow images are turned upright by their EXIF orientation; arrays [H, W, 3] are RGB
                (OpenCV reads BGR: reverse the last axis); tensors are [3, H, W]; both uint8 or floats in 0..1. In a
                list, paths may also name folders, patterns, ``.txt`` lists and videos, see `stream`.

        Returns:
            For an image a `Prediction`, for a list a list. Boxes are in pixels of the upright image.

        Raises:
            DataError: if an image cannot be read, or its shape or pixels are not those of an RGB image.
            TypeError: if an item is not an image.
            ValueError: if a single path names several images.
        """
        if isinstance(images, list | tuple):
            return list(self.stream(images))
        check_is_one(images)
        pixels = read_source(images, "the image", pixel_format=self.pixel_format)
        return self._predict([SourceImage(cast(ImageSource, images), pixels)])[0]

    def stream(self, images: ImageSource | Iterable[ImageSource], recursive: bool = False) -> Iterator[Prediction]:
        """Find objects in images as they come, ``batch_size`` at a time; for folders and videos of any length.

        Args:
            images: an image, a list or an iterator of images. A path may be that of a folder, a pattern such as
                ``photos/*.jpg``, a ``.txt`` file with one path in each line, or a video (needs PyAV), whose frames are
                named ``clip.mp4#000123``. Of these, what cannot be read is named in a warning and left out.
            recursive: also take what is below the folders.

        Yields:
            A `Prediction` for each image, in order.

        Raises:
            DataError: if an image that is given itself cannot be read, or none of a folder's.
            TypeError: if an item is not an image.
        """
        sources = list_sources(images, recursive)
        with progress_bar(sources, self.progress) as bar:
            for batch in read_batches(sources, self.batch_size, self.pixel_format):
                yield from self._predict(batch)
                bar.advance(bar.task_ids[0], len(batch))

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
            font: TrueType file for class names (default: Pillow's own, or an installed one that can write them).
            score_threshold: boxes with a lower score are not drawn (default: the predictor's own; if it has none, the
                best of their class, or 0.3 where that is not known).
        """
        found = self(image) if prediction is None else prediction
        own = None if self.score_threshold == "best" else self.score_threshold
        pixels = read_source(image, "the image", pixel_format=self.pixel_format)
        return found.draw_on(pixels, own if score_threshold is None else score_threshold, font)

    def _augmented(self) -> nn.Module:
        return augment_detector(
            self.detector, self.tiles, self.tile_overlap, self.tile_merge, self.tta, self.batch_size
        )

    def _predict(self, batch: Sequence[SourceImage]) -> list[Prediction]:
        amp = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")
        with _borrowed(self.detector, self.device, self.nms), torch.inference_mode(), amp:
            detections: list[Detection] = self._augmented()([image.pixels.to(self.device) for image in batch])
        return [self._prediction(found, *image) for found, image in zip(detections, batch, strict=True)]

    def _prediction(self, detection: Detection, source: ImageSource, pixels: Tensor | RegionImage) -> Prediction:
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
            (pixels.shape[1], pixels.shape[2]),
            drawn_from=least or self.score_thresholds or SCORE_THRESHOLD,
            pixel_format=self.pixel_format,
        )

    def _label(self, name: str) -> int:
        if name not in self.class_names:
            raise ArgumentError(f"classes: the detector has no class '{name}'; {suggest(name, self.class_names)}")
        return self.class_names.index(name)


def _follow_training(given: PixelFormat, trained: tuple[int, int, bool] | None) -> PixelFormat:
    """Read 16-bit grey as the training did; where another range is given, say so."""
    if trained is None:
        return given
    if given.grey is None:
        return given._replace(grey=GreyRange(*trained))
    if given.grey[:2] != trained[:2]:
        _logger.warning("value_range %s replaces the checkpoint's %s", given.grey[:2], trained[:2])
    return given


@contextmanager
def _borrowed(detector: nn.Module, device: torch.device, nms: NMSMethod | None) -> Iterator[None]:
    """Set a detector up for inference, and give its modes, device and ``nms`` back: a training may go on with it.

    One thread at a time: another would find them, or the sizes of a view, as this one has set them.
    """
    with _looking_up:
        lock = _locks.setdefault(detector, Lock())
    with lock, _set_up(detector, device, nms):
        yield


@contextmanager
def _set_up(detector: nn.Module, device: torch.device, nms: NMSMethod | None) -> Iterator[None]:
    training = {module: module.training for module in detector.modules()}
    home = _device_of(detector)
    members = list(detector.detectors) if isinstance(detector, FusedDetector) else [detector]
    own_nms = [getattr(member, "nms", None) for member in members]
    try:
        detector.eval()
        if home != device:
            detector.to(device)
        for member in members if nms is not None else ():
            member.nms = nms  # type: ignore[assignment]  # every detector has the choice
        yield
    finally:
        for member, own in zip(members, own_nms, strict=True) if nms is not None else ():
            member.nms = own  # type: ignore[assignment]
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
