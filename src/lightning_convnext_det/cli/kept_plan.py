"""The plan of a run in its checkpoints, by which a run that continues from one trains on."""

from collections.abc import Mapping
from typing import Any, get_args

from lightning.pytorch import Callback

from lightning_convnext_det.data.transforms import Preset
from lightning_convnext_det.planning.draft import Plan

_KEPT = (
    "data.batch_size", "data.num_workers", "data.train_transforms", "data.sizes", "data.max_size", "data.crop_size",
    "trainer.max_steps", "trainer.max_epochs", "trainer.val_check_interval", "trainer.check_val_every_n_epoch",
    "trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "trainer.precision", "time",
)  # fmt: skip
Plain = bool | int | float | str | list[int] | list[float] | None
_INTERVALS = {"trainer.val_check_interval", "trainer.check_val_every_n_epoch"}


class KeptPlan(Callback):
    """Keeps the settings of data and trainer of a planned run in checkpoints; those of the model are there already.

    Args:
        settings: by name, such as ``data.batch_size``.
    """

    def __init__(self, settings: Mapping[str, Plain]) -> None:
        self.settings = dict(settings)

    def state_dict(self) -> dict[str, Any]:
        """The settings."""
        return dict(self.settings)


def settings_to_keep(plan: Plan) -> dict[str, Any]:
    """The settings of data and trainer in a plan, chosen or given."""
    return {s.name: s.value for s in plan.settings if s.name in _KEPT and _is_plain(s.name, s.value)}


def read_kept_plan(checkpoint: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which a run continues: those that a checkpoint holds, and those that the user gives now.

    Args:
        checkpoint: of a file that anyone may have written: only numbers and words that are known are taken.
        given: settings of the user by name, which win; a length that is given replaces a planned one of another kind.

    Returns:
        By name; empty if the checkpoint holds none.
    """
    callbacks = checkpoint.get("callbacks")
    held = callbacks.get(KeptPlan.__qualname__) if isinstance(callbacks, Mapping) else None
    if not isinstance(held, Mapping) or not held:
        return {}
    kept = {name: held[name] for name in _KEPT if name in held and _is_plain(name, held[name])}
    if given.keys() & {"time", "trainer.max_steps"}:
        kept["trainer.max_epochs"] = -1
    if given.keys() & {"time", "trainer.max_epochs"}:
        kept.pop("trainer.max_steps", None)
    if given.keys() & {"trainer.max_steps", "trainer.max_epochs"}:
        kept.pop("time", None)
    if given.keys() & _INTERVALS:
        kept = {name: value for name, value in kept.items() if name not in _INTERVALS}
    return kept | {name: value for name, value in given.items() if name in _KEPT and _is_plain(name, value)}


def _is_plain(name: str, value: object) -> bool:
    """Whether a value names no class, which would be imported."""
    if name == "data.train_transforms":
        return value in get_args(Preset)
    if name == "trainer.precision":
        return value in ("32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true")
    numbers = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(number, int | float) for number in numbers)
