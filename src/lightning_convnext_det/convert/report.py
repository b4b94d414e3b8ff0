"""Converted third-party weights, and the report on every tensor."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_convnext_det.convert.naming import Argument, coco_categories
from lightning_convnext_det.errors import CheckpointError


class Slot(NamedTuple):
    """A row of a class head that belongs to a class."""

    row: int
    name: str
    category_id: int


def name_slots(count: int, given: Sequence[str]) -> tuple[Slot, ...]:
    """Names and ids of the classes: those given, if their number is right, or COCO's for 80; else none."""
    coco = coco_categories()
    if count == len(coco) and list(given) in ([], [name for _, name in coco]):
        return tuple(Slot(row, name, index) for row, (index, name) in enumerate(coco))
    if len(given) == count:
        return tuple(Slot(row, name, row) for row, name in enumerate(given))
    return ()


@dataclass(frozen=True)
class ImportReport:
    """Report on every tensor of a source.

    Attributes:
        origin: source of the weights, e.g. ``birder``.
        matched: tensors of the network that were filled.
        parameters: number of parameters in them.
        redundant: tensors of the source that repeat others or count batches, by their original names.
        left_over: tensors of the source that the network does not have, or that contradict another.
        missing: tensors of the network that the source does not have.
        mismatched: tensors of the network with another shape in the source, and both shapes.
        slots: the classes by label: their rows in the source, names and ids; empty if the source has no names.
        ignored: tensors of the source that are ignored on purpose, such as a mask branch, by their original names.
        ignored_parameters: number of parameters in them.
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
        """Whether source and network have exactly the same tensors."""
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
    """Arguments and state dict of a detector with third-party weights."""

    arguments: dict[str, Argument]
    """For the detector's constructor."""
    state_dict: dict[str, Tensor]
    """For its ``load_state_dict``."""
    report: ImportReport
    module: str
    """Name of the LightningModule that trains and evaluates it."""


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
    """Fit renamed tensors to a detector, and report on all tensors of the source.

    Args:
        detector: class of the detector, built on the meta device.
        arguments: arguments of its constructor.
        tensors: renamed tensors.
        origin: see `ImportReport`, as for ``slots``.
        slots: the classes by label.
        redundant: original names of redundant tensors.
        left_over: names of tensors that the detector does not have, beside those of ``tensors``.
        ignored: original names of tensors that are ignored on purpose, and the number of parameters of each.
        parameters: number of parameters of the source (default: of those that fit); another where the source has no
            row for the background, or statistics of BatchNorm.

    Raises:
        CheckpointError: if a tensor is left over, missing or of another shape.
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
    """Reshape tensors that differ only in sides of length 1; list those of another shape."""
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
