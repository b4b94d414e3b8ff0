"""Values of COCO records that exporters write in other types: what they plainly mean, or why they mean nothing."""

import math
from collections import Counter

LARGEST_AREA = 1e5**2  # square pixels; COCO's evaluation leaves out larger objects without a warning


class MalformedError(ValueError):
    """A record is not as the format says."""


Record = dict[str, object]
Mended = Counter[str]
"""How often a value was read as what it plainly means, by kind."""


def to_number(value: object) -> float | None:
    """A finite number, also if written as a string; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def identifier(record: Record, key: str) -> int | str:
    """An id: an integer, also written as 80.0 or as a string, or any other string.

    Raises:
        MalformedError: if it is missing or something else.
    """
    value = record.get(key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip():
        number = to_number(value) if len(value) < 16 else None
        if value.strip().removeprefix("-").isdecimal() and len(value) < 4000:
            return int(value)
        return int(number) if number is not None and number.is_integer() else value
    if type(value) is not int:
        reason = "missing" if key not in record else f"expected an integer, found {value!r}"
        raise MalformedError(f".{key}: {reason}")
    return value


def side(record: Record, key: str, mended: Mended) -> int:
    """A height or width in pixels; 0 if it is missing, null or -1.

    Raises:
        MalformedError: if it is not a count of pixels.
    """
    value = record.get(key, 0)
    number = to_number(value)
    if value is None or number == -1:
        mended[f"{key} {'null' if value is None else value}"] += 1
        return 0
    if number is None or not 0 <= number < 1 << 31 or number != int(number):
        raise MalformedError(f".{key}: expected a count of pixels, found {value!r}")
    if type(value) is not int:
        mended[f"{key} as {type(value).__name__}"] += 1
    return int(number)


def flag(record: Record, key: str, mended: Mended) -> bool:
    """A flag that is 0 or 1: missing and null are 0; true, 1.0 and "1" are 1.

    Raises:
        MalformedError: if it is something else.
    """
    value = record.get(key, 0)
    words = {"true": 1.0, "false": 0.0, "": 0.0}
    number = words.get(value.lower(), to_number(value)) if isinstance(value, str) else to_number(value)
    number = float(value) if isinstance(value, bool) else 0.0 if value is None else number
    if number not in (0, 1):
        raise MalformedError(f".{key}: expected 0 or 1, found {value!r}")
    if type(value) is not int:
        mended[f"{key} {'null' if value is None else f'as {type(value).__name__}'}"] += 1
    return bool(number)


def area(record: Record, mended: Mended) -> float:
    """Square pixels; 0 if missing, null or -1: the box's area is taken.

    Raises:
        MalformedError: if it is not a number from 0 to 10^10.
    """
    value = record.get("area", 0)
    number = to_number(value)
    if value is None or number == -1:
        mended[f"area {'null' if value is None else value}"] += 1
        return 0.0
    if number is None or not 0 <= number <= LARGEST_AREA:
        raise MalformedError(f".area: expected a count of square pixels, found {value!r}")
    if isinstance(value, str):
        mended["area as str"] += 1
    return number


def box(value: object, mended: Mended) -> list[float] | None:
    """x, y, width, height, also if written as strings; None if missing, null or empty.

    Raises:
        MalformedError: if it is not a list of four numbers.
    """
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) != 4:
        found = f"{len(value)} of them" if isinstance(value, list) else repr(value)
        raise MalformedError(f".bbox: expected 4 numbers, found {found}")
    numbers = []
    for item in value:
        if isinstance(item, int) and abs(item) > 1 << 1000:
            raise MalformedError(".bbox: a number is too large")
        number = item if isinstance(item, float) else to_number(item)  # NaN and infinity are refused later
        if number is None:
            raise MalformedError(f".bbox: expected 4 numbers, found {item!r}")
        numbers.append(number)
    if any(isinstance(item, str) for item in value):
        mended["bbox as str"] += 1
    return numbers
