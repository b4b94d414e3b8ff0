"""Length of the training, warm-up, and how often it is validated."""

import math

from lightning_convnext_det.data.fingerprint import Fingerprint
from lightning_convnext_det.planning.draft import Draft
from lightning_convnext_det.planning.machine import Machine
from lightning_convnext_det.planning.network import starts_from_random_weights

# over the images: detectron2's "2x" of COCO; Deformable DETR's, arXiv:2010.04159; DINO's longer one, arXiv:2203.03605
PASSES = {"rcnn": 24, "detr": 50, "dino": 24}
FEWEST, MOST = 3000, 90_000  # steps; 90,000 of 16 images are COCO's "1x"
MOST_ON_CPU = 6000  # an hour or two
RANDOM_FACTOR = 3  # from random weights, where time is cheap; He et al., arXiv:1811.08883, need 3 to 6 times as many
EVALUATION = 0.4  # of the time of a training image: no backward pass
SHARE = 0.1  # of the time that validation may take
VALIDATIONS = 20  # at most in a run


def plan_schedule(
    draft: Draft, fingerprint: Fingerprint, machine: Machine, total: int, to_validate: int, kind: str
) -> None:
    """Choose the steps by the images, and validate so often that it costs less than a tenth of the time."""
    accumulated = max(1, int(draft.get("trainer.accumulate_grad_batches", 1)))
    batches, to_validate = _count_batches(draft, fingerprint.images, to_validate, total // accumulated)
    per_epoch = max(1, math.ceil(batches / accumulated))
    steps = _plan_steps(draft, fingerprint, machine, total, kind, per_epoch)
    warmup = 100 if steps is None or steps < 5000 else 500
    draft.choose("model.warmup_steps", warmup, "a tenth of the training at most")
    draft.choose("model.schedule", "cosine", "to zero at the last step")
    if not to_validate:
        return
    costly = EVALUATION * to_validate / total / SHARE  # steps whose tenth a validation takes
    often = max(costly, (steps or FEWEST) / VALIDATIONS)
    why = f"{to_validate} validation images cost {SHARE:.0%} of the time at most"
    if "trainer.val_check_interval" in draft.given or "trainer.check_val_every_n_epoch" in draft.given:
        return
    if often < per_epoch:
        # Lightning counts batches here, of which a step may accumulate several
        draft.choose("trainer.val_check_interval", min(batches, math.ceil(often) * accumulated), f"batches; {why}")
    else:
        draft.choose("trainer.check_val_every_n_epoch", math.ceil(often / per_epoch), f"epochs; {why}")


def _count_batches(draft: Draft, images: int, to_validate: int, batch: int) -> tuple[int, int]:
    """Batches of an epoch and images of a validation, as far as the trainer's limits let them be.

    Args:
        draft: may hold the limits.
        images: to train on.
        to_validate: images of the validation split.
        batch: images of a batch over all devices.
    """
    overfit = draft.get("trainer.overfit_batches") or None
    batches = images // batch if draft.get("data.drop_last") else math.ceil(images / batch)
    batches = _limit(batches, draft.get("trainer.limit_train_batches") if overfit is None else overfit)
    validated = _limit(math.ceil(to_validate / batch), draft.get("trainer.limit_val_batches"))
    return max(1, batches), min(to_validate, validated * batch)


def _limit(batches: int, limit: float | None) -> int:
    """Batches that are left by a limit as Lightning takes it: a number of batches, or as a float a share of them."""
    if limit is None:
        return batches
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


def _plan_steps(
    draft: Draft, fingerprint: Fingerprint, machine: Machine, total: int, kind: str, per_epoch: int
) -> int | None:
    """The optimizer steps; None where a wanted time decides."""
    epochs, limit = draft.given.get("trainer.max_epochs"), draft.given.get("trainer.max_steps")
    if draft.given.get("time") is not None:
        draft.choose("time", draft.given["time"], "")
        draft.choose("trainer.max_epochs", -1, "the time decides: steps are counted from the first ten")
        if limit not in (None, -1):
            draft.choose("trainer.max_steps", limit, "")
        return None
    if limit not in (None, -1):
        draft.choose("trainer.max_steps", limit, "")
        if epochs is None:
            draft.choose("trainer.max_epochs", -1, "max_steps is given")
        return int(limit)
    if epochs is not None:
        draft.choose("trainer.max_epochs", epochs, "")
        return None if epochs == -1 else int(epochs) * per_epoch
    factor = RANDOM_FACTOR if starts_from_random_weights(draft) and not machine.is_cpu else 1
    wanted = PASSES[kind] * fingerprint.images / total
    steps = factor * int(min(MOST_ON_CPU if machine.is_cpu else MOST, max(FEWEST, wanted)))
    passes = steps * total / max(1, fingerprint.images)
    start = "; three times as long from random weights" if factor > 1 else ""
    draft.choose("trainer.max_steps", steps, f"{passes:,.0f} passes over {fingerprint.images:,} images{start}")
    draft.choose("trainer.max_epochs", -1, "max_steps decides")
    return steps
