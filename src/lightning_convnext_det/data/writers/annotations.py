"""Convert detections to annotation files of one image: YOLO, Pascal VOC and LabelMe; and to rows of a table.

Annotation tools and training read these files, so they hold no scores but where the format has a place for them.
Tables hold all.
"""

import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor

from lightning_convnext_det.metrics.coco_results import CocoResult
from lightning_convnext_det.types import Detection

COLUMNS = ("image_id", "file_name", "category_id", "category_name", "score", "x1", "y1", "x2", "y2")
"""Of CSV and Parquet; corners in pixels of the upright image."""

Row = tuple[int, str, int, str, float, float, float, float, float]
"""The values of `COLUMNS`."""


def table_row(record: CocoResult) -> Row:
    """The row of a detection in a table; its corners are equal to the detection's in float32.

    >>> table_row({"image_id": 7, "file_name": "a.jpg", "category_id": 17, "category_name": "cat", "score": 0.9,
    ...            "bbox": [1.0, 2.5, 29.0, 37.5]})
    (7, 'a.jpg', 17, 'cat', 0.9, 1.0, 2.5, 30.0, 40.0)
    """
    x, y, width, height = record["bbox"]
    x2, y2 = decimals(torch.tensor([x + width, y + height], dtype=torch.float64))
    category = record["category_id"], record["category_name"]
    return (record["image_id"], record["file_name"], *category, record["score"], x, y, x2, y2)


def yolo_text(detection: Detection, size: tuple[int, int]) -> str:
    """YOLO's label file: a line ``label x y width height`` per box, the centre first, relative to the image.

    >>> box, label, score = torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([2]), torch.tensor([0.9])
    >>> found = Detection(boxes=box, labels=label, scores=score)
    >>> yolo_text(found, (100, 200))
    '2 0.100000000 0.400000000 0.100000000 0.400000000\\n'

    Args:
        detection: on the CPU, boxes in pixels of the image.
        size: height and width of the image.
    """
    height, width = size
    x1, y1, x2, y2 = _inside(detection["boxes"], size).unbind(1)
    values = torch.stack([(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height], 1)
    lines = zip(detection["labels"].tolist(), values.tolist(), strict=True)
    return "".join(f"{label} {' '.join(f'{value:.9f}' for value in box)}\n" for label, box in lines)


def voc_xml(detection: Detection, size: tuple[int, int], file_name: str, class_names: Sequence[str]) -> str:
    """Pascal VOC's annotation file; pixels count from 1, so that a box from 0 begins at 1.

    ``path`` is an addition of LabelImg, ``score`` one of ours.

    Args:
        detection: on the CPU, boxes in pixels of the image.
        size: height and width of the image.
        file_name: of the image.
        class_names: in order of label.
    """
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = printable(Path(file_name).name)
    ElementTree.SubElement(root, "path").text = printable(file_name)
    sides = ElementTree.SubElement(root, "size")
    for name, side in (("width", size[1]), ("height", size[0]), ("depth", 3)):
        ElementTree.SubElement(sides, name).text = str(side)
    boxes = decimals(_inside(detection["boxes"], size).float())
    scores = decimals(detection["scores"])
    for i, label in enumerate(detection["labels"].tolist()):
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = printable(class_names[label])
        ElementTree.SubElement(item, "difficult").text = "0"
        ElementTree.SubElement(item, "score").text = str(scores[i])
        box = ElementTree.SubElement(item, "bndbox")
        for corner, value, first in zip(("xmin", "ymin", "xmax", "ymax"), boxes[4 * i :], (1, 1, 0, 0), strict=False):
            ElementTree.SubElement(box, corner).text = f"{value + first:.10g}"
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def labelme_json(detection: Detection, size: tuple[int, int], file_name: str, class_names: Sequence[str]) -> str:
    """LabelMe's annotation file: a rectangle per box, with its score.

    Args:
        detection: on the CPU, boxes in pixels of the image.
        size: height and width of the image.
        file_name: of the image, absolute or from the folder of the annotation file, see `path_from`.
        class_names: in order of label.
    """
    boxes, scores = decimals(_inside(detection["boxes"], size).float()), decimals(detection["scores"])
    shapes = [
        {
            "label": class_names[label],
            "points": [boxes[4 * i : 4 * i + 2], boxes[4 * i + 2 : 4 * i + 4]],
            "group_id": None,
            "description": "",
            "shape_type": "rectangle",
            "flags": {},
            "score": scores[i],
        }
        for i, label in enumerate(detection["labels"].tolist())
    ]
    content: dict[str, object] = {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": file_name,
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }
    return json.dumps(content, indent=2) + "\n"


def path_from(folder: Path, file_name: str) -> str:
    """The path of an image from a folder, where LabelMe looks for it; other names than those of files stay."""
    if os.path.isabs(file_name) or not os.path.isfile(file_name):
        return file_name
    parent, name = os.path.split(file_name)
    # of real paths: .. would lead elsewhere behind a link
    return Path(os.path.relpath(os.path.realpath(parent), os.path.realpath(folder)), name).as_posix()


def decimals(values: Tensor) -> list[float]:
    """Float32 values as the shortest decimals that are equal to them: 0.9, not 0.899999976."""
    return [float(str(value)) for value in values.flatten().to(torch.float32).numpy()]


def printable(text: str) -> str:
    """A text without line ends, control characters and halves of surrogate pairs, which UTF-8 and XML cannot hold.

    >>> printable("two\\nlines"), printable("no\\u00a0break")
    ('two\\\\nlines', 'no\\xa0break')
    """
    return "".join(c.encode("unicode_escape").decode("ascii") if _cannot_be_written(c) else c for c in text)


def _cannot_be_written(character: str) -> bool:
    # control, surrogate, line and paragraph separators; not other blanks and joiners, which names do hold: macOS puts
    # U+202F into those of screenshots, Persian and emojis need U+200C and U+200D
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in "\ufffe\uffff"


def _inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes in float64, clipped to the image: rounding may have put an edge a hair beyond it."""
    height, width = size
    return boxes.double().clamp(min=0).minimum(torch.tensor([width, height, width, height], dtype=torch.float64))
