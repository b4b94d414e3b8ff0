"""Batch by number of images and memory, learning rate by the batch."""

import math

from lightning_convnext_det.data.fingerprint import Fingerprint
from lightning_convnext_det.planning.draft import Draft
from lightning_convnext_det.planning.machine import Machine
from lightning_convnext_det.planning.memory import images_that_fit
from lightning_convnext_det.planning.network import starts_from_random_weights

# images from which a batch of so many is worth its fewer steps: 16 is COCO's in all published recipes; of 2, that
# twice the steps in as many images are better on small sets was measured: 0.285 against 0.244 mAP on small objects
BATCHES = ((5000, 16), (2000, 8), (500, 4), (0, 2))
# AdamW's rates and the batch that they belong to
PRETRAINED = (2e-4, 16)  # ConvNeXt's authors for COCO, arXiv:2201.03545, table 6
RANDOM = (1e-3, 2)  # measured on small objects and blood cells; configs/small_data.yaml
HIGHEST = 2e-3


def plan_optimization(draft: Draft, fingerprint: Fingerprint, machine: Machine, kind: str) -> int:
    """Choose batch, accumulation and learning rate; return the total batch of a step."""
    wanted = 2 if machine.is_cpu else next(batch for images, batch in BATCHES if fingerprint.images >= images)
    why = "no accelerator: small batches give more steps" if machine.is_cpu else f"{fingerprint.images:,} images"
    fits, share = images_that_fit(draft, fingerprint, machine, kind), max(1, wanted // machine.devices)
    if fits < 1 and not draft.get("model.gradient_checkpointing"):
        draft.warn(
            f"one image of this size takes more than the {machine.memory / 2**30:.1f} GiB of memory, counted without "
            "data: give smaller --model.min_size and --model.max_size, or --model.gradient_checkpointing true"
        )
    fits = max(1, fits)
    if fits < share:
        share, why = 2 ** int(math.log2(fits)), f"{why}; more do not fit into {machine.memory / 2**30:.0f} GiB"
    batch = int(draft.choose("data.batch_size", share, why))
    # a batch that is given is meant as it is
    accumulated = 1 if "data.batch_size" in draft.given else max(1, wanted // (batch * machine.devices))
    if accumulated > 1 or "trainer.accumulate_grad_batches" in draft.given:
        reason = f"a step sees {batch * machine.devices * accumulated} images"
        accumulated = max(1, int(draft.choose("trainer.accumulate_grad_batches", accumulated, reason)))
    total = batch * machine.devices * accumulated
    _plan_rate(draft, total, kind)
    draft.choose("trainer.gradient_clip_val", 5.0 if kind == "rcnn" else 0.1, "one bad batch does not undo the others")
    return total


def _plan_rate(draft: Draft, total: int, kind: str) -> None:
    if kind != "rcnn":
        lr, base, source = 2e-4, 32, "Deformable DETR's, arXiv:2010.04159"
    elif starts_from_random_weights(draft):
        (lr, base), source = RANDOM, "measured from random weights"
    else:
        (lr, base), source = PRETRAINED, "ConvNeXt's on COCO, arXiv:2201.03545"
    if draft.get("model.base_batch_size") is not None:
        base = int(draft.get("model.base_batch_size"))
        draft.choose("model.lr", lr, f"{source}; scaled by base_batch_size, which is given")
        return
    # with Adam the rate goes with the square root of the batch (Malladi et al., arXiv:2205.10287)
    scaled = float(f"{min(HIGHEST, lr * math.sqrt(total / base)):.2g}")
    draft.choose("model.lr", scaled, f"{lr:g} for {base} images ({source}) x root of {total}/{base}")
