"""Problems of a split's annotations, and what each leads to.

What a problem leads to depends on ``invalid_annotations``:

======== =============================== ==============================
value    harmless alone (no area, ...)   doubtful (not finite, missing)
======== =============================== ==============================
auto     dropped and counted             refused
drop     dropped and counted             dropped and counted
refuse   refused                         refused
======== =============================== ==============================

``errors.CODES`` lists the codes.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.data.annotations import DetectionAnnotations, Format, Problem
from lightning_convnext_det.errors import DataError

InvalidAnnotations = Literal["auto", "drop", "refuse"]
Place = tuple[str, str]
"""A file and the place in it, as a :class:`Problem` names them."""

LISTED = 20  # problems shown in one message; all are counted


class Source(NamedTuple):
    """Where the boxes of a split are annotated, and how, for checks and messages."""

    format: Format
    root: Path
    """Folder that no image may lie outside of."""
    file_names: Sequence[str]
    """Of the images as written, relative to their folder."""
    image_place: Callable[[int], Place]
    """File and place of the record of image ``i``."""
    box_place: Callable[[int], Place]
    """File and place of the record of row ``i`` of ``boxes``."""
    first_pixel: int = 1
    """What VOC's XML counts pixels from: 1, or 0 if an exporter starts there."""

    def as_annotated(self, corners: NDArray[np.float64]) -> NDArray[np.float64]:
        """Boxes [M, 4] as the format has them: x, y and sides (COCO), corners (VOC), or centre and sides (YOLO)."""
        first, second = corners[:, :2], corners[:, 2:]
        with np.errstate(invalid="ignore", over="ignore"):
            if self.format in ("voc", "cvat"):
                return np.concatenate([first + self.first_pixel, second], axis=1)
            start = first if self.format == "coco" else (first + second) / 2
            return np.concatenate([start, second - first], axis=1)


class AnnotationProblems:
    """Collects the problems of a split in the order they are found.

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

    def drop(self, code: str, place: Place, reason: str) -> None:
        """Drop a record that is harmless to lose."""
        self.problems.append(
            Problem(code, *place, reason, "refused" if self.invalid_annotations == "refuse" else "dropped")
        )

    def refuse(self, code: str, place: Place, reason: str) -> None:
        """Refuse a record that points to a mistake, or whose absence would change what is learnt."""
        self.problems.append(
            Problem(code, *place, reason, "dropped" if self.invalid_annotations == "drop" else "refused")
        )

    def suspect(self, code: str, place: Place, reason: str) -> None:
        """Refuse what looks like a mistake in the whole split; noted only under ``invalid_annotations: drop``."""
        self.problems.append(
            Problem(code, *place, reason, "noted" if self.invalid_annotations == "drop" else "refused")
        )

    def clip(self, code: str, place: Place, reason: str) -> None:
        """Note a box that is clipped to its image."""
        self.problems.append(Problem(code, *place, reason, "clipped"))

    def note(self, code: str, place: Place, reason: str) -> None:
        """Note what the user should know and that changes nothing."""
        self.problems.append(Problem(code, *place, reason, "noted"))


def refuse_problems(annotations: DetectionAnnotations) -> None:
    """Raise an error for the refused problems of a split.

    Raises:
        DataError: if a problem is ``refused``; names the first 20 and counts all.
    """
    refused = [problem for problem in annotations.problems if problem.action == "refused"]
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
