"""What a `Predictor` finds in one image: access by object, selection, drawings and files."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_convnext_det.arguments import Fraction, check_arguments
from lightning_convnext_det.data.io.regions import RegionImage, reduce_for_drawing
from lightning_convnext_det.data.writers.annotations import (
    COLUMNS,
    labelme_json,
    path_from,
    table_row,
    voc_xml,
    yolo_text,
)
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.inference.images import ImageSource, PixelFormat, read_source
from lightning_convnext_det.metrics.coco_results import CocoResult, coco_results
from lightning_convnext_det.suggestions import suggest
from lightning_convnext_det.types import Detection
from lightning_convnext_det.visualization import SCORE_THRESHOLD, class_colors, draw_detections

if TYPE_CHECKING:
    import supervision

FileFormat = Literal["coco", "csv", "yolo", "voc", "labelme"]
_KEYS = ("boxes", "labels", "scores", "names", "category_ids")
_SUFFIXES: dict[str, FileFormat] = {".json": "coco", ".csv": "csv", ".txt": "yolo", ".xml": "voc"}
_DRAWINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class DetectedObject(NamedTuple):
    """One object of a `Prediction`."""

    box: tuple[float, float, float, float]
    """Corners x1, y1, x2, y2 in pixels of the image."""
    score: float
    name: str
    label: int
    category_id: int
    """The dataset's own id of the class."""


class Prediction:
    """The objects found in one image, by descending score; tensors are on the CPU.

    >>> found = Prediction(
    ...     torch.tensor([[10.0, 20.0, 50.0, 60.0], [0.0, 0.0, 30.0, 30.0]]), torch.tensor([1, 0]),
    ...     torch.tensor([0.75, 0.5]), ["cat", "dog"], image=torch.zeros(3, 100, 100, dtype=torch.uint8))
    >>> len(found), found.names, found["scores"].tolist()
    (2, ['dog', 'cat'], [0.75, 0.5])
    >>> for one in found:
    ...     print(one.name, one.score, one.box)
    dog 0.75 (10.0, 20.0, 50.0, 60.0)
    cat 0.5 (0.0, 0.0, 30.0, 30.0)
    >>> found[:1], found[found.scores < 0.6].names, found.filter(classes=["dog"]).boxes.shape
    (Prediction of 1 object (1 dog) in an image of 100x100, ['cat'], torch.Size([1, 4]))
    >>> found.plot().size
    (300, 300)

    ``found["boxes"]`` is ``found.boxes``, as of a `Detection`; ``dict(found)`` has ``boxes``, ``labels``, ``scores``,
    ``names`` and ``category_ids``. Notebooks show the drawing.

    Args:
        boxes: corners (x1, y1, x2, y2) in pixels of the image, float32 [N, 4].
        labels: class indices, int64 [N].
        scores: confidences in [0, 1], float32 [N].
        class_names: of all classes, in order of label.
        category_ids: the dataset's own ids of all classes, in order of label (default: the labels).
        image: the image or its file; it is read when it is needed, and not copied.
        image_size: its height and width, where they are known already.
        drawn_from: boxes of a lower score are not drawn; one number, or one for each class.
        pixel_format: how the image is read, as the detector reads it (default: RGB).

    Raises:
        ValueError: if the lengths differ.
    """

    def __init__(
        self,
        boxes: Tensor,
        labels: Tensor,
        scores: Tensor,
        class_names: Sequence[str],
        category_ids: Sequence[int] | None = None,
        image: ImageSource | None = None,
        image_size: tuple[int, int] | None = None,
        drawn_from: Fraction | Sequence[Fraction] = SCORE_THRESHOLD,
        pixel_format: PixelFormat = PixelFormat(),  # noqa: B008  # it cannot be changed
    ) -> None:
        check_arguments(Prediction.__init__, locals())
        if not len(boxes) == len(labels) == len(scores):
            raise ArgumentError(f"there are {len(boxes)} boxes, {len(labels)} labels and {len(scores)} scores")
        self.boxes, self.labels, self.scores = boxes, labels, scores
        self.class_names = list(class_names)
        self.class_ids = list(range(len(self.class_names)) if category_ids is None else category_ids)
        self.image, self.pixel_format = image, pixel_format
        self.drawn_from = list(drawn_from) if isinstance(drawn_from, Sequence) else [drawn_from] * len(class_names)
        if image_size is not None:
            self.image_size = image_size

    @cached_property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image, turned upright.

        Raises:
            ValueError: if the prediction has neither a size nor an image.
        """
        _, height, width = self._pixels().shape
        return height, width

    @property
    def names(self) -> list[str]:
        """The class of each object."""
        return [self.class_names[label] for label in self.labels.tolist()]

    @property
    def category_ids(self) -> Tensor:
        """The dataset's own id of each object's class, int64 [N]."""
        return torch.tensor(self.class_ids, dtype=torch.int64)[self.labels]

    # ---- access

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[DetectedObject]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: Literal["names"]) -> list[str]: ...
    @overload
    def __getitem__(self, index: Literal["boxes", "labels", "scores", "category_ids"]) -> Tensor: ...
    @overload
    def __getitem__(self, index: int) -> DetectedObject: ...
    @overload
    def __getitem__(
        self, index: slice | Tensor | NDArray[np.int64] | NDArray[np.bool_] | Sequence[int] | Sequence[bool]
    ) -> "Prediction": ...
    def __getitem__(self, index: Any) -> "Tensor | list[str] | DetectedObject | Prediction":  # see the overloads
        """A field by its name, an object by its number, or a `Prediction` of some objects by slice, mask or numbers."""
        if isinstance(index, str):
            if index not in _KEYS:
                raise KeyError(index)
            field: Tensor | list[str] = getattr(self, index)
            return field
        if isinstance(index, int | np.integer):
            return self._object(int(index))
        if isinstance(index, slice):
            index = list(range(len(self))[index])  # tensors have no steps below 0
        # a copy: torch refuses arrays that run backwards, as of numpy.argsort(...)[::-1]
        chosen = torch.as_tensor(index.copy() if isinstance(index, np.ndarray) else index).cpu()
        chosen = chosen[None] if chosen.dim() == 0 else chosen  # of scores.argmax()
        return self._select(chosen if chosen.numel() else torch.zeros(0, dtype=torch.int64))

    def keys(self) -> tuple[str, ...]:
        """The names of the fields, so that ``dict(prediction)`` and ``**prediction`` have them."""
        return _KEYS

    def filter(self, score: Fraction | None = None, classes: Sequence[str] | None = None) -> "Prediction":
        """The objects of at least a score, and of some classes; with a score, all of them are drawn.

        Raises:
            ValueError: if there is no such class, or the score is not in 0..1.
        """
        check_arguments(Prediction.filter, locals())
        kept = torch.ones(len(self), dtype=torch.bool)
        if classes is not None:
            chosen = [classes] if isinstance(classes, str) or not isinstance(classes, Iterable) else classes
            kept &= torch.isin(self.labels, torch.tensor([self._label(name) for name in chosen], dtype=torch.int64))
        if score is None:
            return self._select(kept)
        found = self._select(kept & (self.scores >= score))
        found.drawn_from = [0.0] * len(self.class_names)
        return found

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common())
        where = f"'{self.image}'" if isinstance(self.image, str | Path) else "an image"
        if "image_size" in vars(self) or not isinstance(self.image, str | Path | None):
            where += " of {1}x{0}".format(*self.image_size)
        what = f"{len(self)} object{'s' * (len(self) != 1)}{f' ({counts})' if counts else ''}"
        return f"Prediction of {what} in {where}"

    # ---- drawings and files

    def plot(self, score_threshold: Fraction | None = None, font: str | None = None) -> Image.Image:
        """Draw the objects on a copy of the image, or of a TIFF file that was read in tiles, reduced to 4096 pixels.

        Args:
            score_threshold: objects of a lower score are not drawn (default: the predictor's; if it has none, that of
                their class in the checkpoint, or 0.3).
            font: TrueType file for class names (default: Pillow's own, or an installed one that can write them).

        Raises:
            ValueError: if the prediction has no image.
        """
        check_arguments(Prediction.plot, locals())
        return self.draw_on(self._pixels(), score_threshold, font)

    def save(self, path: str | Path, format: FileFormat | None = None, image_id: int = 1) -> None:
        """Write the objects to a file: an image with those drawn that `plot` draws, or all of them as data.

        Args:
            path: its suffix tells what it holds: ``.png``, ``.jpg``, ... a drawing; ``.json`` COCO results; ``.csv`` a
                table; ``.txt`` YOLO's labels; ``.xml`` Pascal VOC's annotations.
            format: ``coco``, ``csv``, ``yolo``, ``voc`` or ``labelme``, whatever the suffix.
            image_id: of the image, in COCO results and tables.

        Raises:
            ValueError: if the suffix tells nothing, or an image is needed and not known.
        """
        check_arguments(Prediction.save, locals())
        path = Path(path)
        kind = format or _SUFFIXES.get(path.suffix.lower())
        if kind is not None:
            path.write_text(
                self._as_text(kind, image_id, path.parent), encoding="utf-8", errors="backslashreplace", newline=""
            )
        elif path.suffix.lower() in _DRAWINGS:
            self.plot().save(path)
        else:
            known = ", ".join((*_DRAWINGS, *_SUFFIXES))
            raise ArgumentError(f"'{path}' has none of the suffixes {known}; choose one of them, or give the format")

    def to_coco(self, image_id: int = 1) -> list[CocoResult]:
        """COCO results: a record with ``image_id``, ``category_id``, ``bbox`` and ``score`` for each object.

        Args:
            image_id: the dataset's own id of the image.
        """
        return coco_results(self._detection(), image_id, self._file_name(image_id), self.class_names, self.class_ids)

    def to_supervision(self) -> "supervision.Detections":
        """Detections of the package supervision, for its trackers, zones and annotators.

        Raises:
            ImportError: if supervision is not installed.
        """
        try:
            import supervision
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "to_supervision needs the extra supervision: pip install 'lightning-convnext-det[supervision]'"
            ) from None
        return supervision.Detections(
            xyxy=self.boxes.detach().numpy(),
            confidence=self.scores.detach().numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def _repr_png_(self) -> bytes | None:
        if self.image is None:
            return None
        with io.BytesIO() as file:
            self.plot().save(file, "png")
            return file.getvalue()

    def _as_text(self, kind: FileFormat, image_id: int, folder: Path) -> str:
        name, found = self._file_name(image_id), self._detection()
        if kind == "csv":
            with io.StringIO() as file:
                rows = [table_row(record) for record in self.to_coco(image_id)]
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
                return file.getvalue()
        texts: dict[str, Callable[[], str]] = {
            "coco": lambda: json.dumps(self.to_coco(image_id), indent=1) + "\n",
            "yolo": lambda: yolo_text(found, self.image_size),
            "voc": lambda: voc_xml(found, self.image_size, name, self.class_names),
            "labelme": lambda: labelme_json(found, self.image_size, path_from(folder, name), self.class_names),
        }
        return texts[kind]()

    def draw_on(
        self, pixels: Tensor | RegionImage, score_threshold: float | None = None, font: str | None = None
    ) -> Image.Image:
        """Draw the objects on a copy of an image, uint8 or float in 0..1 [1, 3 or 4, H, W]; arguments as in `plot`."""
        least = self.drawn_from if score_threshold is None else [score_threshold] * len(self.class_names)
        drawn = self._select(self.scores >= torch.tensor(least)[self.labels])
        colors = class_colors(self.class_names)
        seen, boxes = reduce_for_drawing(pixels, drawn.boxes)
        return draw_detections(seen, boxes, drawn.names, drawn.scores, colors, font)

    def _pixels(self) -> Tensor | RegionImage:
        if self.image is None:
            raise ArgumentError("this prediction does not know its image; a Predictor's does")
        return read_source(self.image, "the image", pixel_format=self.pixel_format)

    # ---- helpers

    def _select(self, index: Tensor) -> "Prediction":
        chosen = Prediction(
            self.boxes[index],
            self.labels[index],
            self.scores[index],
            self.class_names,
            self.class_ids,
            self.image,
            vars(self).get("image_size"),
            self.drawn_from,
            self.pixel_format,
        )
        return chosen

    def _object(self, i: int) -> DetectedObject:
        x1, y1, x2, y2 = self.boxes[i].tolist()
        label = int(self.labels[i])
        name, category_id = self.class_names[label], self.class_ids[label]
        return DetectedObject((x1, y1, x2, y2), float(self.scores[i]), name, label, category_id)

    def _detection(self) -> Detection:
        return Detection(boxes=self.boxes.detach(), labels=self.labels, scores=self.scores.detach())

    def _file_name(self, image_id: int) -> str:
        return str(self.image) if isinstance(self.image, str | Path) else str(image_id)

    def _label(self, name: str) -> int:
        if not isinstance(name, str):
            raise ArgumentError(
                f"classes holds {name}; give names of classes, or select by found.category_ids == {name}"
            )
        if name not in self.class_names:
            raise ArgumentError(f"there is no class '{name}'; {suggest(name, self.class_names)}")
        return self.class_names.index(name)
