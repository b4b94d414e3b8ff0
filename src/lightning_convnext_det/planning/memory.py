"""Memory of a training step: weights, gradients and moments, and what a backward pass keeps of each image."""

from lightning_convnext_det.data.fingerprint import Fingerprint
from lightning_convnext_det.planning.draft import Draft
from lightning_convnext_det.planning.machine import Machine

USABLE = 0.8  # of the memory: the rest is for the context, fragments and workers
# bytes that a pixel of the resized image costs in training with ConvNeXt-T and 256 channels in the pyramid, in half
# precision; narrower networks take less
BYTES_PER_PIXEL = 2600


def images_that_fit(draft: Draft, fingerprint: Fingerprint, machine: Machine, kind: str) -> int:
    """How many of the largest images fit into the memory of one device."""
    sizes = draft.get("model.min_size"), draft.get("model.max_size")
    shorter, longer = (int(size[-1] if isinstance(size, list | tuple) else size) for size in sizes)
    pixels = shorter * longer
    return max(1, int(USABLE * machine.memory / (BYTES_PER_PIXEL * pixels)))
