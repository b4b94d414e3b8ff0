"""Precision by measurement, workers by cores, and augmentation by what the data allow."""

from lightning_convnext_det.data.fingerprint import Fingerprint
from lightning_convnext_det.planning.draft import Draft
from lightning_convnext_det.planning.machine import Machine
from lightning_convnext_det.planning.precision import MIN_GAIN

MANY = 5000  # images, from which random sizes and crops add more than they cost


def plan_hardware(draft: Draft, fingerprint: Fingerprint, machine: Machine) -> None:
    """Choose the faster precision, workers and augmentation."""
    _plan_precision(draft, machine)
    if machine.is_cpu:
        workers, why = (
            max(1, min(2, machine.cores // 4)),
            "no accelerator: the cores compute, and decoding takes little",
        )
    else:
        batch = int(draft.get("data.batch_size", 2))
        devices = max(1, machine.devices // machine.nodes)
        workers = max(1, min(16, machine.cores // devices, max(4, 2 * batch)))
        why = f"{machine.cores} cores for {devices} device{'s' * (devices > 1)}, {batch} images a step"
    draft.choose("data.num_workers", workers, why)
    if fingerprint.images >= MANY and not machine.is_cpu:
        preset, why = "multiscale", "random sizes and crops; DETR's, arXiv:2005.12872"
    else:
        preset, why = "flip", "left and right; --data.vertical_flip true where up is any side"
    preset = draft.choose("data.train_transforms", preset, why)
    if preset == "multiscale":
        _plan_random_sizes(draft)
    elif preset == "lsj":
        draft.choose("data.crop_size", draft.get("model.max_size"), "a square as large as images in evaluation")


def _plan_precision(draft: Draft, machine: Machine) -> None:
    rates = machine.rates
    if not machine.bfloat16:
        draft.choose("trainer.precision", "32-true", "no arithmetic for bfloat16")
    elif rates is None:
        precision = "32-true" if machine.is_cpu else "bf16-mixed"
        draft.choose("trainer.precision", precision, "not measured on several devices")
    else:
        precision = "bf16-mixed" if rates.gain > MIN_GAIN else "32-true"
        measured = f"{rates.bfloat16:.3g} steps of a block per second, float32 {rates.float32:.3g}"
        draft.choose("trainer.precision", precision, f"measured: bfloat16 {measured}")


def _plan_random_sizes(draft: Draft) -> None:
    chosen, longest = draft.get("model.min_size"), draft.get("model.max_size")
    largest = int(chosen[-1] if isinstance(chosen, list | tuple) else chosen)
    shares = (6, 6.4, 6.8, 7.2, 7.6, 8, 8.4, 8.8, 9.2, 9.6, 10)
    sizes = [min(int(longest), max(8, 8 * round(largest * share / 80))) for share in shares]
    draft.choose("data.sizes", sizes, "0.6 to 1 times min_size")
    draft.choose("data.max_size", longest, "as in evaluation")
