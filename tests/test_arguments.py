import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest

import lightning_convnext_det
from lightning_convnext_det.arguments import Count, Factor, Fraction, NonNegative, Positive, Range, check_arguments
from lightning_convnext_det.arguments import _hints as hints_of
from lightning_convnext_det.errors import ArgumentError

# what the public classes need to be built at all
NEEDED: dict[str, dict[str, Any]] = {
    "CascadeRCNN": {"num_classes": 2},
    "Classifier": {"name": "test_convnext"},
    "ClassifierModule": {},
    "CascadeRCNNModule": {"num_classes": 2},
    "DeformableDETR": {"num_classes": 2},
    "DeformableDETRModule": {"num_classes": 2},
    "DINO": {"num_classes": 2},
    "DINOModule": {"num_classes": 2},
    "DetectionDataModule": {},
    "DetectionModule": {"num_classes": 2},
    "FasterRCNN": {"num_classes": 2},
    "FasterRCNNModule": {"num_classes": 2},
    "FusedDetector": {"detectors": []},
    "ImageFolderDataModule": {},
    "Prediction": {"boxes": [], "labels": [], "scores": [], "class_names": []},
    "PredictionWriter": {},
    "Predictor": {"detector": None, "class_names": []},
    "TiledDetector": {"detector": None},
}


def choose(
    lr: Positive = 1.0,
    share: Fraction | None = None,
    sides: int | Sequence[Count] = 3,
    pair: tuple[Factor, Factor] = (0.5, 1.0),
    method: Literal["hard", "soft"] | None = "hard",
    rule: Literal["auto"] | Annotated[int, Range(1, 9)] = "auto",
    anything: object = None,
) -> None:
    check_arguments(choose, locals())


@pytest.mark.parametrize(
    "given",
    [
        {}, {"lr": 1e-9}, {"lr": np.float64(3)}, {"lr": np.float32(3)}, {"lr": 2}, {"share": 0}, {"share": 1.0},
        {"sides": 5}, {"sides": [1, 2]}, {"sides": (np.int64(4),)}, {"sides": []}, {"pair": [1, 1]},
        {"method": None}, {"method": "soft"}, {"rule": 9}, {"rule": "auto"}, {"anything": "x"},
    ],
)  # fmt: skip
def test_check_arguments__values_that_fit(given: dict[str, Any]) -> None:
    choose(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0}, "lr is 0; it must be above 0"),
        ({"lr": -1.5}, "lr is -1.5; it must be above 0"),
        ({"lr": math.nan}, "lr is nan; it must be above 0"),
        ({"lr": "fast"}, "lr is 'fast'; it must be above 0"),
        ({"lr": None}, "lr is None; it must be above 0"),
        ({"share": 1.1}, "share is 1.1; it must be at least 0 and at most 1"),
        ({"sides": 1.5}, "sides is 1.5; it must be at least 1"),
        ({"sides": [8, 0]}, "sides is [8, 0]; it must be at least 1"),
        ({"pair": (0.5, 2)}, "pair is (0.5, 2); it must be above 0 and at most 1"),
        ({"method": "sort"}, "method is 'sort'; choose hard or soft; did you mean 'soft'?"),
        ({"method": True}, "method is True; choose hard or soft"),
        ({"rule": 10}, "rule is 10; choose auto or a number at least 1 and at most 9"),
    ],
)
def test_check_arguments__values_that_do_not(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        choose(**given)
    assert str(caught.value) == message


def excluded(hint: Any) -> Iterator[object]:
    """Values that an annotation excludes: a word, and a number on the wrong side of each limit."""
    if get_origin(hint) is Literal:
        yield f"{get_args(hint)[0]}x"
        return
    for part in get_args(hint):
        if isinstance(part, Range):
            yield from (limit + sign for limit, sign in ((part.low, -1), (part.high, 1)) if limit is not None)
            yield math.nan
        elif get_origin(hint) not in (list, tuple, Sequence):
            yield from excluded(part)


def constructors() -> list[tuple[str, str, object]]:
    rows = []
    for name in lightning_convnext_det.__all__:
        kind = getattr(lightning_convnext_det, name)
        build = getattr(kind, "__init__", None)
        if inspect.isfunction(build) and build.__module__.startswith("lightning_convnext_det"):
            hints = hints_of(build)
            rows += [(name, parameter, value) for parameter, hint in hints.items() for value in excluded(hint)]
    return rows


@pytest.mark.parametrize(("name", "parameter", "value"), constructors())
def test_constructors__refuse_what_their_annotations_exclude(name: str, parameter: str, value: object) -> None:
    build: Callable[..., object] = getattr(lightning_convnext_det, name)
    with pytest.raises(ArgumentError, match=f"^{parameter} is "):
        build(**{**NEEDED[name], parameter: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer is 'lion'; choose adamw or sgd"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; .* did you mean 'cosine'"),
        ({"lr": -1}, "lr is -1; it must be at least 0"),
        ({"milestones": [3, -1]}, "milestones is .*at least 0"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5; it must be above 0 and at most 1"),
    ],
)
def test_modules__in_a_subclass_too(options: dict[str, Any], message: str) -> None:
    class Mine(lightning_convnext_det.FasterRCNNModule):
        def __init__(self, **given: Any) -> None:
            super().__init__(2, backbone="test_convnext", **given)

    with pytest.raises(ArgumentError, match=message):
        Mine(**options)


def test_range__limits() -> None:
    assert 0 in Range(0)
    assert 0 not in Range(0, above=True)
    assert 1 not in Range(0, 1, below=True)
    assert math.inf in Range(0)
    assert repr(NonNegative.__metadata__[0]) == "at least 0"  # type: ignore[attr-defined]
