"""The records of a split as its files state them, and the problems found in them.

A reader fills :class:`Records`; what is true of every format (images, frames, boxes) is then checked in one place,
``images.py`` and ``assembly.py``. What a problem leads to depends on ``invalid_annotations``:

======== =============================== ==============================
value    harmless alone (no area, ...)   doubtful (not finite, missing)
======== =============================== ==============================
auto     left out and counted            refused
drop     left out and counted            left out and counted
refuse   refused                         refused
======== =============================== ==============================

Codes of problems, each after ``LCD-``:

- Files: D001 no COCO object, D002 malformed member, D003 id used twice, D004 no JSON, D005 no VOC XML, D006
  malformed YOLO line, D008 class names or categories, D114 ``ignore`` flag, D116 no area, D117 annotation without
  image, D118 image of another name, D119 listed without XML, D121 image without XML, D122 folder or list
  missing, D123 outlines, D124 no label file, D000 unknown.
- Boxes: D101 no area, D102 inverted, D103 not finite, D104 outside, D105 clipped, D106 below 0.01 pixels, D107
  repeated, D108 corners for sides, D113 relative for pixels.
- Classes: D110 unknown, D120 differ.
- Splits: D109 no box, D125 equal files, D126 shared images, L001 no folder, L002 no layout, L003 several, L004 no
  image, S001 path leaves the root.
- Images: I001 no image, I002 damaged, I003 missing, I010 16 bits, I011 no colours, I012 misnamed, I013 alpha,
  I014 several frames, I020 size differs, I021 too narrow, I022 too small, I023 too large, I024 and I025 frame
  unknown, I026 turned.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.data.annotations import DetectionAnnotations, Format, Problem
from lightning_convnext_det.errors import DataError

InvalidAnnotations = Literal["auto", "drop", "refuse"]
Where = tuple[str, str]
"""A file and the place in it, as a :class:`Problem` names them."""

LISTED = 20  # problems shown in one message; all are counted


@dataclass(eq=False)
class Records:
    """A split as its files state it.

    Attributes:
        format: decides what ``boxes`` mean.
        root: folder that no image may lie outside of.
        image_root: folder that ``file_names`` are relative to.
        file_names: one for each of the N images.
        image_ids: int64 [N].
        sizes: height and width as annotated, 0 where they are not, int32 [N, 2].
        boxes: as stated, float64 [M, 4]: COCO's x, y, width, height; VOC's corners counted from 1; YOLO's relative
            centre, width, height.
        image_index: the image of each box, int64 [M].
        labels: indices into ``class_names``, int64 [M].
        crowd: bool [M].
        area: square pixels as annotated, 0 where it is not, float64 [M].
        annotation_ids: int64 [M].
        class_names: in order of label.
        category_ids: in order of label.
        image_where: says where image ``i`` is annotated.
        box_where: says where box ``i`` is annotated.
    """

    format: Format
    root: Path
    image_root: Path
    file_names: list[str]
    image_ids: NDArray[np.int64]
    sizes: NDArray[np.int32]
    boxes: NDArray[np.float64]
    image_index: NDArray[np.int64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    area: NDArray[np.float64]
    annotation_ids: NDArray[np.int64]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_where: Callable[[int], Where]
    box_where: Callable[[int], Where]


class AnnotationProblems:
    """The problems of a split in the order they are found, each with what becomes of the record.

    Args:
        invalid_annotations: see the module.

    Raises:
        ValueError: if ``invalid_annotations`` is not one of its values.
    """

    def __init__(self, invalid_annotations: InvalidAnnotations) -> None:
        if invalid_annotations not in ("auto", "drop", "refuse"):
            raise ValueError(f"invalid_annotations is {invalid_annotations!r}; it can be 'auto', 'drop' or 'refuse'")
        self.invalid_annotations = invalid_annotations
        self.problems: list[Problem] = []

    def drop(self, code: str, where: Where, reason: str) -> None:
        """A record that is harmless to leave out."""
        self.problems.append(
            Problem(code, *where, reason, "refused" if self.invalid_annotations == "refuse" else "dropped")
        )

    def refuse(self, code: str, where: Where, reason: str) -> None:
        """A record that points to a mistake, or whose absence would change what is learnt."""
        self.problems.append(
            Problem(code, *where, reason, "dropped" if self.invalid_annotations == "drop" else "refused")
        )

    def suspect(self, code: str, where: Where, reason: str) -> None:
        """A mistake that the whole set seems to hold; kept only where the user lets all pass."""
        self.problems.append(
            Problem(code, *where, reason, "noted" if self.invalid_annotations == "drop" else "refused")
        )

    def clip(self, code: str, where: Where, reason: str) -> None:
        """A box that is cut to its image."""
        self.problems.append(Problem(code, *where, reason, "clipped"))

    def note(self, code: str, where: Where, reason: str) -> None:
        """Something that the user should know and that changes nothing."""
        self.problems.append(Problem(code, *where, reason, "noted"))


def refuse_problems(table: DetectionAnnotations) -> None:
    """Refuse a split that was read with the aim to collect its problems.

    Raises:
        DataError: if a problem of the table is ``refused``; names the first 20 and counts all.
    """
    refused = [problem for problem in table.problems if problem.action == "refused"]
    if not refused:
        return
    lines = [str(problem._replace(action="refused")).removesuffix(" (refused)") for problem in refused[:LISTED]]
    if len(refused) == 1:
        raise DataError(f"{lines[0]} (invalid_annotations: drop lets it pass)")
    shown = f"; the first {LISTED}" if len(refused) > LISTED else ""
    head = (
        f"[{refused[0].code}] {len(refused)} records cannot be used (invalid_annotations: drop lets them pass{shown}):"
    )
    raise DataError("\n  ".join([head, *lines]))


def summarize_problems(problems: Iterable[Problem], examples: int = 3) -> list[str]:
    """One line for each code and action: how many, and the first few places."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.code, problem.action), []).append(problem)
    lines = []
    for (code, action), group in groups.items():
        places = ", ".join(" ".join(filter(None, (one.file, one.record))) for one in group[:examples])
        more = ", ..." if len(group) > examples else ""
        lines.append(f"[{code}] {len(group)} {action}: {places}{more} - {group[0].reason}")
    return lines
