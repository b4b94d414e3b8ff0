"""Arguments checked by their annotations: the values of a `Literal` and the `Range` of a number.

A constructor begins with ``check_arguments(Class.__init__, locals())``. Its signature is all that it has to say, and
the command line checks the same: the parser builds the class.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from lightning_convnext_det.errors import ArgumentError


@dataclass(frozen=True, repr=False)
class Range:
    """The range of a number, as ``Annotated[float, Range(0, 1)]``; nan is in none.

    Args:
        low: least value; None for no limit.
        high: greatest value; None for no limit.
        above: leave ``low`` itself out.
        below: leave ``high`` itself out.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        over = self.low is None or (value > self.low if self.above else value >= self.low)
        under = self.high is None or (value < self.high if self.below else value <= self.high)
        return over and under and value == value

    def __repr__(self) -> str:
        low = None if self.low is None else f"{'above' if self.above else 'at least'} {self.low:g}"
        high = None if self.high is None else f"{'below' if self.below else 'at most'} {self.high:g}"
        return " and ".join(filter(None, (low, high)))


Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
"""From 0 to 1, as scores, IoU and probabilities are."""
Factor = Annotated[float, Range(0, 1, above=True)]
"""Above 0 and at most 1, as factors that make smaller are."""
Count = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
Frequency = Literal["rare", "common", "frequent"]
"""LVIS's groups of classes: annotated in at most 10, in 11 to 100, in more than 100 training images."""


def check_arguments(function: Callable[..., object], given: Mapping[str, object]) -> None:
    """Refuse values that a function's annotations exclude.

    Args:
        function: the constructor or function; its annotations of other kinds are not looked at.
        given: values by the names of its parameters; other names are passed over, so ``locals()`` will do.

    Raises:
        ArgumentError: a ValueError that names the argument, what it was and what it can be.

    Examples:
        >>> def train(lr: Positive = 0.1, schedule: Literal["cosine", "step"] = "cosine") -> None:
        ...     check_arguments(train, locals())
        >>> train(schedule="stop")
        Traceback (most recent call last):
        lightning_convnext_det.errors.ArgumentError: schedule is 'stop'; choose cosine or step; did you mean 'step'?
        >>> train(lr=-1)
        Traceback (most recent call last):
        lightning_convnext_det.errors.ArgumentError: lr is -1; it must be above 0
    """
    for name, hint in _hints(function).items():
        if name in given and not _fits(hint, given[name]):
            raise ArgumentError(f"{name} is {_show(given[name])}; {_remedy(hint, given[name])}")


def check_class_names(names: Sequence[str]) -> None:
    """Refuse two classes of one name: results, metrics and messages could not tell them apart.

    >>> check_class_names(["cat", "dog", "cat"])
    Traceback (most recent call last):
    lightning_convnext_det.errors.ArgumentError: class_names has 'cat' for labels 0 and 2; give each class its own name

    Raises:
        ArgumentError: naming the first that repeats and both labels.
    """
    first: dict[str, int] = {}
    for label, name in enumerate(names):
        if first.setdefault(name, label) != label:
            raise ArgumentError(
                f"class_names has '{name}' for labels {first[name]} and {label}; give each class its own name"
            )


@cache
def _hints(function: Callable[..., object]) -> dict[str, Any]:  # annotations may be anything
    """The annotations that exclude values, by parameter."""
    hints = get_type_hints(function, include_extras=True)
    names = inspect.signature(function).parameters
    return {name: hint for name, hint in hints.items() if name in names and (_choices(hint) or _ranges(hint))}


def _fits(hint: Any, value: object) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is Annotated:
        ranges = [entry for entry in arguments[1:] if isinstance(entry, Range)]
        return _fits(arguments[0], value) and (not ranges or (_is(arguments[0], value) and _is_number(value, ranges)))
    if origin in (Union, UnionType):
        return any(_is(kind, value) for kind in arguments)
    if isinstance(value, list | tuple) and isinstance(origin, type) and issubclass(origin, Sequence):
        kinds = arguments if origin is tuple and Ellipsis not in arguments else arguments[:1] * len(value)
        return all(_fits(kind, entry) for kind, entry in zip(kinds, value, strict=False))
    return True


def _is(kind: Any, value: object) -> bool:
    """Whether a value is of one kind of a union."""
    if kind in (None, NoneType):
        return value is None
    if get_origin(kind) is Annotated:
        return _is(get_args(kind)[0], value) and _fits(kind, value)
    plain = dict if is_typeddict(kind) else {int: Integral, float: Real}.get(kind, get_origin(kind) or kind)
    return (not isinstance(plain, type) or isinstance(value, plain)) and _fits(kind, value)


def _is_number(value: object, ranges: Sequence[Range]) -> bool:
    return isinstance(value, Real) and all(float(value) in each for each in ranges)


def _choices(hint: Any) -> list[object]:
    """The values of all `Literal`s in an annotation."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for part in get_args(hint) if not isinstance(part, Range) for choice in _choices(part)]


def _ranges(hint: Any) -> list[Range]:
    return [one for part in get_args(hint) for one in ([part] if isinstance(part, Range) else _ranges(part))]


def _show(value: object) -> str:
    return repr(value) if isinstance(value, str | list | tuple) else str(value)


def _remedy(hint: Any, value: object) -> str:
    choices, ranges = [str(choice) for choice in _choices(hint)], dict.fromkeys(_ranges(hint))
    close = difflib.get_close_matches(str(value), choices, n=1)
    numbers = " or ".join(map(repr, ranges))
    listed = f"{', '.join(choices[:-1])}{' or ' * (len(choices) > 1)}{choices[-1]}" if choices else ""
    if choices:
        parts = [f"choose {listed}{f' or a number {numbers}' * bool(ranges)}"]
    else:
        parts = [f"it must be {numbers}"] if ranges else []
    return "; ".join([*parts, *(f"did you mean '{match}'?" for match in close)])
