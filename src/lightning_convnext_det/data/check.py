"""Check a dataset: statistics, invalid annotations, and unusual images.

It never writes to the dataset. Besides the problems that the readers find, it reports formats that differ from the file
name, alpha channels, 16-bit images, animations, EXIF orientations, and duplicate files.
"""

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_convnext_det.data.annotations import Action, DetectionAnnotations, Format, Problem, UnreadableError
from lightning_convnext_det.data.duplicates import find_equal_files, find_shared_images, image_path, image_paths
from lightning_convnext_det.data.fingerprint import fingerprint_table, take_fingerprint
from lightning_convnext_det.data.formats.discovery import compare_classes, compare_objects, find_splits, read_split
from lightning_convnext_det.data.formats.exif_frames import Exif
from lightning_convnext_det.data.formats.problems import LISTED, InvalidAnnotations
from lightning_convnext_det.data.io.decode import MAX_PIXELS, ImageHeader, read_header, read_image, verify_image
from lightning_convnext_det.data.io.pixels import WHOLE_RANGE, ValueRange
from lightning_convnext_det.data.io.reader import SAMPLED, find_value_range

SMALL_AREA, LARGE_AREA = 32**2, 96**2  # COCO's limits of small, medium and large objects, in square pixels
_PART = 1000  # images decoded before the next are listed
_STYLES: dict[Action, str] = {"refused": "red", "dropped": "yellow", "clipped": "cyan", "noted": "dim"}


class SplitSummary(NamedTuple):
    """Statistics of one split."""

    images: int
    images_without_boxes: int
    boxes: int
    crowd: int
    small: int
    medium: int
    large: int
    boxes_per_class: tuple[int, ...]
    """In order of label, crowd boxes included."""
    smallest: tuple[int, int]
    """Height and width of the image with the smallest area; 0, 0 without images."""
    largest: tuple[int, int]


@dataclass(frozen=True)
class Report:
    """Result of :func:`check_dataset`.

    Attributes:
        root: folder of the dataset.
        format: of its annotations.
        tables: the valid annotations, by split.
        problems: without duplicates, also where several splits have the same.
        modes: number of images per Pillow colour mode, by split.
    """

    root: Path
    format: Format
    tables: dict[str, DetectionAnnotations]
    problems: tuple[Problem, ...]
    modes: dict[str, Counter[str]]

    @property
    def clean(self) -> bool:
        """Whether nothing is dropped, clipped or refused; notes do not count."""
        return all(problem.action == "noted" for problem in self.problems)


def check_dataset(
    root: str | Path,
    format: Literal["auto"] | Format = "auto",
    *,
    class_names: Sequence[str] | None = None,
    invalid_annotations: InvalidAnnotations = "auto",
    exif: Exif = "auto",
    follow_symlinks: bool = True,
    max_pixels: int = MAX_PIXELS,
    decode: bool = False,
) -> Report:
    """Check all splits of a dataset for invalid annotations and unusual images.

    Args:
        root: folder of the dataset, its ``data.yaml``, or one COCO file.
        format: ``auto`` looks at the folder.
        class_names: names of the classes in order of label (default: those of the dataset).
        invalid_annotations: whether to drop or refuse annotations that cannot be used, see ``read_split``.
        exif: whether boxes refer to the stored or the upright image, see ``read_split``.
        follow_symlinks: accept links to images outside of the root.
        max_pixels: larger images are refused.
        decode: decode every image, about 3 ms each; a header does not show damage in the pixels.

    Raises:
        DataError: if no split is found.
    """
    tables: dict[str, DetectionAnnotations] = {}
    problems: list[Problem] = []
    splits = find_splits(root, format)
    for name, split in splits.items():
        try:
            tables[name] = read_split(
                split,
                class_names=class_names,
                invalid_annotations=invalid_annotations,
                exif=exif,
                follow_symlinks=follow_symlinks,
                max_pixels=max_pixels,
                collect=True,
            )
        except UnreadableError as error:
            problems.append(error.problem or error.problem_of(str(split.root)))
            continue
        problems += tables[name].problems
        if not len(tables[name]):
            reason = f"split {name!r} has no images that can be used"
            problems.append(Problem("LCD-L004", str(split.root), "", reason, "refused"))
    problems += [*compare_classes(tables), *_unlearned_objects(tables)]
    split = next(iter(splits.values()))
    modes, images = _inspect_images(tables, split.root, max_pixels)
    problems += [*images, *find_equal_files(tables, split.root), *find_shared_images(tables, split.root)]
    if decode:
        problems += _undecodable(tables, split.root, max_pixels)
    return Report(split.root, split.format, tables, tuple(dict.fromkeys(problems)), modes)


def summarize_table(table: DetectionAnnotations) -> SplitSummary:
    """Compute the statistics of a split; small and large are COCO's, below 32 x 32 and from 96 x 96 pixels."""
    per_image = np.diff(table.offsets)
    small, large = int((table.area < SMALL_AREA).sum()), int((table.area >= LARGE_AREA).sum())
    order = np.argsort(table.sizes.astype(np.int64).prod(axis=1), kind="stable")
    extremes = (
        [(int(table.sizes[i, 0]), int(table.sizes[i, 1])) for i in order[[0, -1]]] if len(table) else [(0, 0)] * 2
    )
    return SplitSummary(
        images=len(table),
        images_without_boxes=int((per_image == 0).sum()),
        boxes=len(table.boxes),
        crowd=int(table.crowd.sum()),
        small=small,
        medium=len(table.boxes) - small - large,
        large=large,
        boxes_per_class=tuple(np.bincount(table.labels, minlength=len(table.class_names)).tolist()),
        smallest=extremes[0],
        largest=extremes[1],
    )


def print_report(report: Report, console: Console | None = None) -> None:
    """Print all problems, then the statistics, then the verdict.

    Of the notes, the first 20 of each code are printed and the others counted.
    """
    console = console or Console()
    for action, style in _STYLES.items():
        shown: Counter[str] = Counter()
        for problem in (one for one in report.problems if one.action == action):
            shown[problem.code] += 1
            if action != "noted" or shown[problem.code] <= LISTED:
                console.print(Text(str(problem), style), soft_wrap=True)
        for code, count in shown.items():
            if action == "noted" and count > LISTED:
                console.print(Text(f"[{code}] {count - LISTED} more like these (noted)", style), soft_wrap=True)
    console.print(_overview(report))
    for name, table in report.tables.items():
        if len(table.boxes) and table.crowd.all():
            reason = f"{name}: all {len(table.boxes)} boxes are crowds (iscrowd, difficult): nothing to learn from"
            console.print(Text(reason, "yellow"), soft_wrap=True)
    console.print(_class_counts(report))
    console.print(fingerprint_table({name: take_fingerprint(table) for name, table in report.tables.items()}))
    counts = Counter(problem.action for problem in report.problems)
    found = ", ".join(f"{counts[action]} {action}" for action in _STYLES if counts[action]) or "nothing to report"
    verdict = Text(f"{report.root}: ") + Text(
        "clean" if report.clean else "not clean", "green" if report.clean else "red"
    )
    console.print(verdict + Text(f" ({report.format.upper()}; {found})"), soft_wrap=True)


def report_as_dict(report: Report) -> dict[str, Any]:
    """Everything that a check knows as numbers, text, lists and dicts, for JSON."""
    return {
        "root": str(report.root),
        "format": report.format,
        "clean": report.clean,
        "splits": {
            name: {
                **summarize_table(table)._asdict(),
                "boxes_per_class": dict(zip(table.class_names, summarize_table(table).boxes_per_class, strict=True)),
                "category_ids": list(table.category_ids),
                "colours": dict(report.modes.get(name, {})),
                "fingerprint": take_fingerprint(table).as_dict(),
            }
            for name, table in report.tables.items()
        },
        "problems": [problem._asdict() for problem in report.problems],
    }


def _overview(report: Report) -> Table:
    """Lay out the statistics, one column per split."""
    grid = Table(title=Text(f"{report.root.name}"), title_justify="left")
    grid.add_column("")
    summaries = [summarize_table(table) for table in report.tables.values()]
    for name in report.tables:
        grid.add_column(Text(name), justify="right")
    rows = {
        "images": [f"{one.images:,}" for one in summaries],
        "  without boxes": [f"{one.images_without_boxes:,}" for one in summaries],
        "  smallest": [f"{one.smallest[1]}x{one.smallest[0]}" for one in summaries],
        "  largest": [f"{one.largest[1]}x{one.largest[0]}" for one in summaries],
        "  colours": [", ".join(f"{mode} {n:,}" for mode, n in count.most_common()) for count in report.modes.values()],
        "boxes": [f"{one.boxes:,}" for one in summaries],
        "  crowd": [f"{one.crowd:,}" for one in summaries],
        "  small, below 32x32": [f"{one.small:,}" for one in summaries],
        "  medium": [f"{one.medium:,}" for one in summaries],
        "  large, from 96x96": [f"{one.large:,}" for one in summaries],
    }
    for label, cells in rows.items():
        grid.add_row(label, *cells)
    return grid


def _class_counts(report: Report) -> Table:
    """Lay out the number of boxes per class and split."""
    grid = Table(title="boxes per class", title_justify="left")
    grid.add_column("class")
    counts: list[dict[str, int]] = []
    for name, table in report.tables.items():
        grid.add_column(Text(name), justify="right")
        counts.append(dict(zip(table.class_names, summarize_table(table).boxes_per_class, strict=True)))
    for class_name in dict.fromkeys(name for count in counts for name in count):
        grid.add_row(Text(class_name), *(f"{count[class_name]:,}" if class_name in count else "-" for count in counts))
    return grid


def _inspect_images(
    tables: dict[str, DetectionAnnotations], root: Path, max_pixels: int
) -> tuple[dict[str, Counter[str]], list[Problem]]:
    """Count colour modes by split, and find unusual images."""
    modes: dict[str, Counter[str]] = {}
    problems = []
    found = find_value_range(_sampled(tables))
    value_range = WHOLE_RANGE if found is None else found[0]
    for name, table in tables.items():
        modes[name] = Counter()
        for path, upright in zip(image_paths(table), table.upright, strict=True):
            header = read_header(path, max_pixels)
            modes[name][header.mode] += 1
            for code, reason in _peculiarities(header, path, bool(upright), value_range):
                problems.append(Problem(code, os.path.relpath(path, root), "", reason, "noted"))
    return modes, problems


def _peculiarities(
    header: ImageHeader, path: Path, upright: bool, value_range: ValueRange
) -> Iterator[tuple[str, str]]:
    """Yield code and text for each unusual property of an image."""
    if not header.suits(path.suffix):
        yield "LCD-I012", f"holds {header.format}, though it is named {path.suffix}"
    if header.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        yield "LCD-I013", "has transparency, which is dropped"
    if header.mode.startswith("I"):
        yield "LCD-I010", f"16-bit grey; {list(value_range)} becomes 0 to 255 (data.value_range sets another range)"
    if header.animated:
        yield "LCD-I014", "has several frames; the first is used"
    if header.size.orientation != 1:
        frame = "upright" if upright else "stored"
        yield "LCD-I026", f"EXIF orientation {header.size.orientation}; boxes are taken to refer to the {frame} image"


def _sampled(tables: dict[str, DetectionAnnotations]) -> list[Path]:
    """Evenly spaced images of each split, in which to look for the largest value."""
    found = []
    for table in tables.values():
        rows = np.linspace(0, len(table) - 1, min(SAMPLED, len(table)), dtype=np.int64)
        found += [image_path(table, index) for index in rows.tolist()]
    return found


def _unlearned_objects(tables: dict[str, DetectionAnnotations]) -> Iterator[Problem]:
    """Find splits with objects of classes that training has none of, where the classes as such agree."""
    train = tables.get("train", tables.get("trainval"))
    for name in ("val", "test"):
        other = tables.get(name)
        if (
            train is None
            or other is None
            or any(p.action == "refused" for p in compare_classes({"": train, name: other}))
        ):
            continue
        if problem := compare_objects(train, other, name):
            yield problem


def _undecodable(tables: dict[str, DetectionAnnotations], root: Path, max_pixels: int) -> list[Problem]:
    """Find images that cannot be decoded."""

    def problem_of(path: Path) -> Problem | None:
        try:
            verify_image(path, max_pixels)
            read_image(path, max_pixels=max_pixels)
        except UnreadableError as error:
            return error.problem_of(os.path.relpath(path, root))
        return None

    problems: list[Problem] = []
    paths = itertools.chain.from_iterable(map(image_paths, tables.values()))
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        warnings.simplefilter("ignore")  # what is unusual is reported already
        while part := list(itertools.islice(paths, _PART)):  # ``map`` takes all of them at once
            problems += filter(None, pool.map(problem_of, part))
    return problems
