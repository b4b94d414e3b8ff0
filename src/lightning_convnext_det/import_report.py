"""What becomes of weights from elsewhere: the converted network, and an account of every tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lightning_convnext_det.models.deformable_detr_weights import Argument


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
    """A network of ours with weights from elsewhere."""

    arguments: dict[str, Argument]
    """For the detector's constructor."""
    state_dict: dict[str, Tensor]
    """For its ``load_state_dict``."""
    report: ImportReport
    module: str = "DeformableDETRModule"
    """The LightningModule that trains and evaluates it."""


def fit_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
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
