"""What becomes of third-party weights: the converted network, and an account of every tensor."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_convnext_det.convert.deformable_detr_names import Argument
from lightning_convnext_det.errors import CheckpointError


class Slot(NamedTuple):
    """A row of a class head that stands for a class."""

    row: int
    name: str
    category_id: int


@dataclass(frozen=True)
class ImportReport:
    """What became of every tensor of a source.

    Attributes:
        origin: whose file it is, e.g. ``birder``.
        matched: names here of the tensors that were filled.
        parameters: how many numbers they hold.
        redundant: names there of tensors that carry nothing new: copies of others and batch counters.
        left_over: names of tensors that have no place here, or contradict another.
        missing: names here of tensors that the source does not have.
        mismatched: names here of tensors that have another shape there, with both shapes.
        slots: the classes by label: their rows in the source, names and ids; empty if the source names none.
        ignored: names there of tensors that are left out on purpose, such as a mask branch.
        ignored_parameters: how many numbers they hold.
    """

    origin: str
    matched: tuple[str, ...]
    parameters: int
    redundant: tuple[str, ...]
    left_over: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    slots: tuple[Slot, ...]
    ignored: tuple[str, ...] = ()
    ignored_parameters: int = 0

    @property
    def fits(self) -> bool:
        """Whether every tensor has found its place and every place its tensor."""
        return not (self.left_over or self.missing or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{self.origin}: {len(self.matched)} tensors ({self.parameters:,} parameters) matched"]
        parts.append(f"{len(self.redundant)} redundant")
        if self.ignored:
            parts.append(
                f"{len(self.ignored)} left out ({self.ignored_parameters:,} parameters, {self.ignored[0]}, ...)"
            )
        for what in ("left_over", "missing", "mismatched"):
            names: tuple[str, ...] = getattr(self, what)
            listed = f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""
            parts.append(f"{len(names)} {what.replace('_', ' ')}{listed}")
        return ", ".join(parts)


class Converted(NamedTuple):
    """A network of ours with third-party weights."""

    arguments: dict[str, Argument]
    """For the detector's constructor."""
    state_dict: dict[str, Tensor]
    """For its ``load_state_dict``."""
    report: ImportReport
    module: str
    """The LightningModule that trains and evaluates it."""


def fill(
    detector: type[nn.Module],
    arguments: Mapping[str, Argument],
    tensors: Mapping[str, Tensor],
    origin: str,
    *,
    slots: Sequence[Slot],
    redundant: Iterable[str] = (),
    left_over: Iterable[str] = (),
    ignored: Mapping[str, int] | None = None,
    parameters: int | None = None,
) -> Converted:
    """Put tensors that have our names into a detector, and account for all of the source.

    Args:
        detector: a class of ours; built without memory.
        arguments: of its constructor.
        tensors: by their names here.
        origin: as in `ImportReport`, like the next three.
        slots: the classes by label.
        redundant: names there of tensors that carry nothing new.
        left_over: names of tensors without a place here, beside those of ``tensors`` that have none.
        ignored: names there of tensors that are left out on purpose, and how many parameters each holds.
        parameters: how many the source has for the detector (default: the numbers that fill it); others where it has
            no row for the background, or statistics of BatchNorm.

    Raises:
        CheckpointError: if a tensor has no place, or a place no tensor.
    """
    with torch.device("meta"):
        expected = detector(**arguments).state_dict()
    fitted, mismatched = _fit(tensors, expected)
    ignored = ignored or {}
    report = ImportReport(
        origin,
        matched=tuple(fitted),
        parameters=sum(tensor.numel() for tensor in fitted.values()) if parameters is None else parameters,
        redundant=tuple(redundant),
        left_over=(*left_over, *(name for name in tensors if name not in expected)),
        missing=tuple(name for name in expected if name not in tensors),
        mismatched=mismatched,
        slots=tuple(slots),
        ignored=tuple(ignored),
        ignored_parameters=sum(ignored.values()),
    )
    if not report.fits:
        raise CheckpointError(
            f"[LCD-K011] does not fit a {detector.__name__} on {arguments.get('backbone', 'its backbone')}: {report}"
        )
    return Converted(dict(arguments), fitted, report, f"{detector.__name__}Module")


def _fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Take the tensors that are expected, with sides of length 1 added or dropped; list those of another shape."""
    fitted, mismatched = {}, []
    for name, tensor in tensors.items():
        if name not in expected:
            continue
        shape = expected[name].shape
        if [d for d in tensor.shape if d != 1] == [d for d in shape if d != 1]:
            fitted[name] = tensor.detach().reshape(shape).clone()
        else:
            mismatched.append(f"{name} {list(tensor.shape)}, expected {list(shape)}")
    return fitted, tuple(mismatched)
