"""Bounding boxes of COCO segmentations: polygons, and run-length encoded masks, compressed or not.

Reference:
    https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c, rleFrString and rleToBbox
"""

from itertools import accumulate
from typing import TypeGuard

from lightning_convnext_det.data.formats.coco_values import MalformedError, to_number

_MAX_RUNS = 10_000_000  # no mask of an image below max_pixels has more


def outline_box(segmentation: object) -> list[float]:
    """The bounding box of a segmentation: x, y, width, height in pixels.

    Raises:
        MalformedError: if it is empty, or neither polygons nor a run-length encoding.
    """
    if isinstance(segmentation, dict):
        return _mask_box(segmentation)
    polygons = segmentation if isinstance(segmentation, list) else []
    if polygons and not isinstance(polygons[0], list):  # one polygon, not wrapped in a list
        polygons = [polygons]
    values = [to_number(value) for polygon in polygons if isinstance(polygon, list) for value in polygon]
    if len(values) < 4 or any(isinstance(p, list) and len(p) % 2 for p in polygons) or None in values:
        raise MalformedError(".bbox: missing, and .segmentation has no outline to take it from")
    numbers = [value for value in values if value is not None]
    xs, ys = numbers[::2], numbers[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _mask_box(mask: dict[str, object]) -> list[float]:
    """The bounding box of the ones in a mask whose runs go down its columns, zeros first."""
    size, counts = mask.get("size"), mask.get("counts")
    runs = _decompress(counts) if isinstance(counts, str) else counts
    if not _are_counts(size) or not _are_counts(runs) or len(size) != 2 or len(runs) > _MAX_RUNS:
        raise MalformedError(".segmentation: the run-length encoding is damaged")
    height, width = size
    ends = list(accumulate(runs))
    ones = [(start, end) for start, end in zip(ends[::2], ends[1::2], strict=False) if end > start]
    if not ones or ends[-1] > height * width:
        raise MalformedError(".segmentation: the run-length encoding is empty or larger than its image")
    left, right = ones[0][0] // height, (ones[-1][1] - 1) // height
    if any(start // height < (end - 1) // height for start, end in ones):  # a run goes on in the next column
        return [left, 0, right - left + 1, height]
    top, bottom = min(start % height for start, _ in ones), max((end - 1) % height for _, end in ones)
    return [left, top, right - left + 1, bottom - top + 1]


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _decompress(text: str) -> list[int]:
    """The runs of COCO's compressed encoding: five bits per character, from the third on as differences."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise MalformedError(".segmentation: the run-length encoding is damaged")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number; bit 4 is its sign
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
