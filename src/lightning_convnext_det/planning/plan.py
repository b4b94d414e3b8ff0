"""Plan of a training: settings with reasons, from a dataset's fingerprint, the machine and what the user has given."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning_convnext_det.data.fingerprint import Fingerprint
from lightning_convnext_det.data.transforms import CROP_SIZE
from lightning_convnext_det.planning.anchors import plan_anchors
from lightning_convnext_det.planning.crowding import plan_crowding
from lightning_convnext_det.planning.draft import Draft, Plan
from lightning_convnext_det.planning.hardware import plan_hardware
from lightning_convnext_det.planning.machine import Machine
from lightning_convnext_det.planning.network import plan_network
from lightning_convnext_det.planning.optimization import plan_optimization
from lightning_convnext_det.planning.resolution import plan_resolution
from lightning_convnext_det.planning.schedule import plan_schedule


def plan(
    fingerprint: Fingerprint,
    machine: Machine,
    given: Mapping[str, Any] | None = None,
    *,
    images_to_validate: int = 0,
    kind: str = "rcnn",
    missing_weights: Callable[[str], str | None] = lambda name: None,
) -> Plan:
    """Choose the settings of a training; what is given stays as it is, and the rest adapts to it.

    >>> from tempfile import mkdtemp
    >>> from lightning_convnext_det.data.fingerprint import take_fingerprint
    >>> from lightning_convnext_det.data.formats.discovery import find_splits, read_split
    >>> from lightning_convnext_det.data.synthetic import write_synthetic_coco
    >>> root = write_synthetic_coco(mkdtemp() + "/shapes", num_train=20, num_val=2)
    >>> found = take_fingerprint(read_split(find_splits(root)["train"]))
    >>> made = plan(found, Machine(cores=2, memory=8 * 2**30), {"data.batch_size": 4})
    >>> made["data.batch_size"], made["model.min_size"], made["trainer.precision"]
    (4, 240, '32-true')

    Args:
        fingerprint: of the training split.
        machine: that trains.
        given: settings of the user by name, such as ``model.lr``, ``data.batch_size`` or ``trainer.max_steps``;
            ``time`` is the wanted length in seconds, ``tiles`` the side of windows, ``start_from`` a detector to start
            from.
        images_to_validate: size of the validation split; 0 without one.
        kind: ``rcnn`` for detectors with anchors, ``detr`` for Deformable DETR, ``dino`` for DINO.
        missing_weights: reason why the pretrained weights of a backbone cannot be had, None if they can.
    """
    draft = Draft(given or {})
    if draft.get("data.train_transforms") == "tiles":
        fingerprint = fingerprint.in_windows(int(draft.get("tiles") or draft.get("data.crop_size", CROP_SIZE)))
    plan_network(draft, machine, kind, missing_weights)
    scale = plan_resolution(draft, fingerprint, machine)
    if kind == "rcnn":
        plan_anchors(draft, fingerprint, scale)
    plan_crowding(draft, fingerprint, machine, kind)
    total = plan_optimization(draft, fingerprint, machine, kind)
    plan_schedule(draft, fingerprint, machine, total, images_to_validate, kind)
    plan_hardware(draft, fingerprint, machine)
    return draft.finish()
