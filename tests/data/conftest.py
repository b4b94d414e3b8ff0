"""Builders of datasets of a few tiny images."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteImage = Callable[..., Path]


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def write_image() -> WriteImage:
    """Writes noise of 48 x 64 pixels, optionally with an EXIF orientation."""

    def write(path: Path, height: int = 48, width: int = 64, orientation: int | None = None, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        if orientation is not None:
            exif[0x0112] = orientation
        noise(height, width, seed).save(path, exif=exif)
        return path

    return write


@pytest.fixture
def write_coco(tmp_path: Path, write_image: WriteImage) -> Callable[..., Path]:
    """Writes a COCO set: images ``1.png``, ``2.png`` ... of 48 x 64, ids 1, 2 ..., and the members given."""

    def write(
        annotations: Sequence[object] = (),
        images: Sequence[object] | None = None,
        categories: Sequence[object] = ({"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}),
        num_images: int = 1,
        name: str = "train",
    ) -> Path:
        for number in range(1, num_images + 1):
            write_image(tmp_path / name / f"{number}.png", seed=number)
        if images is None:
            images = [{"id": i, "file_name": f"{i}.png", "height": 48, "width": 64} for i in range(1, num_images + 1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = tmp_path / "annotations" / f"instances_{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return write


def coco_annotation(box: object, number: int = 1, **more: object) -> dict[str, object]:
    """An annotation of image 1 and category 1, as COCO states it."""
    return {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0} | more


@pytest.fixture
def annotate() -> Callable[..., dict[str, object]]:
    return coco_annotation


@pytest.fixture
def write_xml() -> Callable[..., Path]:
    """Writes a VOC annotation of objects ``(name, xmin, ymin, xmax, ymax)`` or ``(..., difficult)``."""

    def write(
        path: Path, objects: Sequence[tuple[object, ...]] = (), size: tuple[int, int] | None = (48, 64), name: str = ""
    ) -> Path:
        parts = [f"<filename>{name}</filename>"]
        if size is not None:
            parts.append(f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>")
        for label, xmin, ymin, xmax, ymax, *difficult in objects:
            corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
            flag = f"<difficult>{difficult[0]}</difficult>" if difficult else ""
            parts.append(f"<object><name>{label}</name>{flag}<bndbox>{corners}</bndbox></object>")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<annotation>{''.join(parts)}</annotation>")
        return path

    return write


@pytest.fixture
def flat(tmp_path: Path, write_image: WriteImage) -> Path:
    """A folder with the image a.png; annotations are still to be written beside it."""
    write_image(tmp_path / "a.png")
    return tmp_path
