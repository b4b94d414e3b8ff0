"""Everything that one rank writes about its images: tables, annotation files, drawings and crops."""

import logging
import re
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from lightning_convnext_det.data.io.regions import RegionImage, reduce_for_drawing
from lightning_convnext_det.data.io.video import parse_frame_name
from lightning_convnext_det.data.writers.annotations import labelme_json, path_from, printable, voc_xml, yolo_text
from lightning_convnext_det.data.writers.files import OF_ALL_IMAGES, FileList, hidden, shorten
from lightning_convnext_det.data.writers.parquet import ParquetWriter
from lightning_convnext_det.data.writers.tables import write_line
from lightning_convnext_det.metrics.coco_results import check_finite, coco_results
from lightning_convnext_det.types import Detection
from lightning_convnext_det.visualization import class_colors, draw_detections, to_pil

_logger = logging.getLogger(__name__)
Format = Literal["coco", "csv", "parquet", "yolo", "voc", "labelme", "crops"]
TABLES = ("coco", "csv")  # merged of the lines of all ranks
_SUFFIXES = {"yolo": ".txt", "voc": ".xml", "labelme": ".json"}
_LONGEST_FOLDER = 200  # bytes of a class's name; file systems hold 255, and labels may be added
_LOSSLESS = (".png", ".bmp", ".gif", ".tif", ".tiff")  # images without the noise of JPEG are drawn as PNG


class RankResults:
    """Writes the results of one rank, image by image.

    Args:
        folder: of the results.
        rank: this rank.
        formats: what to write beside drawings.
        class_names: in order of label.
        category_ids: the dataset's own ids, in order of label.
        score_thresholds: of each class, in order of label; files of one image hold no boxes of a lower score.
        draw_limit: draw no more than this many images; all if not given.
        font: TrueType file for the drawings.
        parquet: the writer of parts, if format ``parquet`` is among the formats.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        formats: Collection[Format],
        class_names: Sequence[str],
        category_ids: Sequence[int],
        score_thresholds: Sequence[float],
        draw_limit: int | None,
        font: str | None,
        parquet: ParquetWriter | None,
    ) -> None:
        self.folder, self.formats, self.font, self.draw_limit = folder, formats, font, draw_limit
        self.class_names, self.category_ids = list(class_names), list(category_ids)
        self.least = torch.tensor(list(score_thresholds))
        self.colors = class_colors(class_names)
        self._crop_folders = name_folders(class_names)
        self.parquet = parquet
        self.num_drawn = 0
        with ExitStack() as files:
            self._lines = files.enter_context(open(hidden(folder, rank, "part"), "w"))
            self._list = FileList(folder, rank)
            files.callback(self._list.close)
            if rank == 0 and "yolo" in formats:
                self._write_classes(folder / "yolo" / "classes.txt")
            self._files = files.pop_all()

    def write(self, image: Tensor | RegionImage, detection: Detection, image_id: int, file_name: str) -> None:
        """Write the results of an image.

        Args:
            image: [C, H, W], uint8 or float in 0..1; of a `RegionImage`, a drawing is reduced to 4096 pixels.
            detection: on the CPU, boxes in pixels of the image.
            image_id: the dataset's own id.
            file_name: of the image.

        Raises:
            DivergenceError: if a box or score is not finite.
        """
        check_finite(detection, file_name)
        if any(name in self.formats for name in TABLES):
            records = coco_results(detection, image_id, file_name, self.class_names, self.category_ids)
            write_line(self._lines, image_id, records)
        if self.parquet is not None:
            self.parquet.add(detection, image_id, file_name)
        kept = detection["scores"] >= self.least[detection["labels"]]
        found = Detection(
            boxes=detection["boxes"][kept], labels=detection["labels"][kept], scores=detection["scores"][kept]
        )
        size, stem = (image.shape[-2], image.shape[-1]), _stem(file_name)
        for name in _SUFFIXES:
            if name in self.formats:
                path = self._list.reserve(self.folder / name, stem, _SUFFIXES[name], image_id)
                path.write_text(self._annotation(name, found, size, file_name, path.parent), encoding="utf-8")
        suffix = ".png" if Path(file_name).suffix.lower() in _LOSSLESS else ".jpg"
        if "crops" in self.formats:
            self._crop(image, found, stem, suffix, image_id)
        if self.draw_limit is None or self.num_drawn < self.draw_limit:
            names = [self.class_names[label] for label in found["labels"].tolist()]
            seen, boxes = reduce_for_drawing(image, found["boxes"])
            drawing = draw_detections(seen, boxes, names, found["scores"], self.colors, self.font)
            _save(drawing, self._list.reserve(self.folder, stem, suffix, image_id))
            self.num_drawn += 1

    def end_batch(self) -> None:
        """Write a part of the Parquet files if it is full: only then are the files of all its images there."""
        if self.parquet is not None:
            self.parquet.end_batch()

    def finish(self) -> None:
        """Write the last part, and close the files; the prediction is complete."""
        if self.parquet is not None:
            self.parquet.flush()
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _write_classes(self, path: Path) -> None:
        """Write the names of the classes; a file that is there stays: the user's, or that of a prediction continued."""
        text = "".join(f"{printable(name)}\n" for name in self.class_names)
        if not path.exists():
            self._list.reserve(path.parent, path.stem, path.suffix, OF_ALL_IMAGES).write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_bytes() != text.encode():
            names = ", ".join(map(printable, self.class_names))
            _logger.warning("'%s' is your own and stays; the labels of the files beside it are: %s", path, names)

    def _annotation(self, name: str, found: Detection, size: tuple[int, int], file_name: str, folder: Path) -> str:
        if name == "yolo":
            return yolo_text(found, size)
        if name == "voc":
            return voc_xml(found, size, file_name, self.class_names)
        return labelme_json(found, size, path_from(folder, file_name), self.class_names)

    def _crop(self, image: Tensor | RegionImage, found: Detection, stem: str, suffix: str, image_id: int) -> None:
        height, width = image.shape[-2:]
        for box, label in zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True):
            x1, y1 = min(max(int(box[0]), 0), width - 1), min(max(int(box[1]), 0), height - 1)
            x2, y2 = max(min(-int(-box[2] // 1), width), x1 + 1), max(min(-int(-box[3] // 1), height), y1 + 1)
            path = self._list.reserve(self.folder / "crops" / self._crop_folders[label], stem, suffix, image_id)
            crop = image[..., y1:y2, x1:x2] if isinstance(image, Tensor) else image.read(x1, y1, x2, y2)
            _save(to_pil(crop), path)


def name_folders(class_names: Sequence[str]) -> list[str]:
    """A folder for each class: its name, without what cannot be in one; where that is taken, the label is added.

    >>> name_folders(["cat", "C++", "C#", "Cat"])
    ['cat', 'C_', 'C_-2', 'Cat-3']
    """
    folders: list[str] = []
    taken: set[str] = set()  # whatever the case: some file systems do not tell it
    for label, class_name in enumerate(class_names):
        name = re.sub(r"[^\w .-]+", "_", printable(class_name)).strip(" .") or str(label)
        name = shorten(name, _LONGEST_FOLDER)
        while name.casefold() in taken:
            name = f"{name}-{label}"
        taken.add(name.casefold())
        folders.append(name)
    return folders


def _stem(file_name: str) -> str:
    """The name of an image's results; that of a frame has its number: ``clip-000123``."""
    frame = parse_frame_name(file_name)
    return Path(file_name).stem if frame is None else f"{Path(frame[0]).stem}-{frame[1]:06d}"


def _save(image: Image.Image, path: Path) -> None:
    # full resolution of colour: half of it blurs coloured text
    image.save(path, quality=92, subsampling=0) if path.suffix == ".jpg" else image.save(path)
