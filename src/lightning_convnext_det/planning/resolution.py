"""Resolution: small boxes keep enough pixels for the finest level, within the images' own and what a step can cost."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.data.fingerprint import Fingerprint
from lightning_convnext_det.planning.draft import Draft
from lightning_convnext_det.planning.machine import Machine

WANTED = 16.0  # pixels of a small box: four cells of the finest level. COCO's 10th percentile is 11 at 640 x 480, and
# 18 at the usual 800 pixels
LARGEST_SCALE = 1.5  # beyond that an enlarged image has no more to show; COCO's recipes enlarge by 1.67
FEW = 10  # objects: a class with less does not decide
# shorter side from which objects of any size have context and detail enough, and pixels that a step can cost;
# on a CPU those of configs/laptop.yaml and twelve times as many
LEAST = {True: 240, False: 480}
MOST_PIXELS = {True: 480 * 640, False: 1333 * 1333}


class Scale(NamedTuple):
    """Sizes that images are resized to, as the detector's transform does it."""

    min_size: int
    max_size: int

    def resize(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Widths and heights of boxes after resizing, [S, 2], from their own and those of their images, [S, 4]."""
        sides = boxes[:, 2:]
        factor = np.minimum(self.min_size / sides.min(axis=1), self.max_size / sides.max(axis=1))
        return np.asarray(boxes[:, :2] * factor[:, None])


def plan_resolution(draft: Draft, fingerprint: Fingerprint, machine: Machine) -> Scale:
    """Choose the shorter side by the small boxes, and the longer side by the images' aspect ratios."""
    native, elongation = fingerprint.shorter_side.p50 or 480.0, _elongation(fingerprint)
    relative = _small_side(fingerprint) / native
    least, most = LEAST[machine.is_cpu], math.sqrt(MOST_PIXELS[machine.is_cpu] / elongation)
    wanted = WANTED / relative if relative else least
    bounded = min(max(wanted, min(least, LARGEST_SCALE * native)), LARGEST_SCALE * native, most)
    side = max(32, 8 * round(bounded / 8))
    if wanted <= side:
        why = f"small boxes have {relative * side:.0f} pixels then; {WANTED:.0f} are enough"
    elif side >= 8 * round(LARGEST_SCALE * native / 8):
        why = f"{LARGEST_SCALE:g} times the images' own: small boxes have {relative * side:.1f} pixels then"
    else:
        why = f"as much as a step can cost here: small boxes have {relative * side:.1f} pixels then"
    chosen = draft.choose("model.min_size", side, why)
    shorter = int(chosen[-1] if isinstance(chosen, list | tuple) else chosen)
    longer = max(shorter, 8 * math.ceil(shorter * elongation / 8))
    longer = int(draft.choose("model.max_size", longer, f"images are up to {elongation:.2g} times as long as wide"))
    scale = Scale(shorter, longer)
    _warn_of_tiny_boxes(draft, fingerprint, scale)
    return scale


def _small_side(fingerprint: Fingerprint) -> float:
    """Side of small boxes in native pixels: the 10th percentile, or the median of a class of smaller ones."""
    counts, medians = fingerprint.objects_per_class, fingerprint.side_per_class
    small = [medians[name] for name, count in counts.items() if count >= FEW]
    return min([fingerprint.box_side.p10, *small])


def _elongation(fingerprint: Fingerprint) -> float:
    """Longer over shorter side that nine of ten images of either orientation stay below, from 1 to 2."""
    aspect = fingerprint.image_aspect
    if not aspect.p10:
        return 4 / 3
    return min(2.0, max(1.0, aspect.p90, 1 / aspect.p10))


def _warn_of_tiny_boxes(draft: Draft, fingerprint: Fingerprint, scale: Scale) -> None:
    if not len(fingerprint.boxes):
        return
    sides = np.sqrt(scale.resize(fingerprint.boxes).prod(axis=1))
    tiny = float((sides < WANTED / 2).mean())
    if tiny > 0.1:
        own = np.sqrt(fingerprint.boxes[:, :2].prod(axis=1))
        draft.warn(
            f"{tiny:.0%} of the boxes are below {WANTED / 2:.0f} pixels after resizing (median {np.median(sides):.1f}; "
            f"{np.median(own):.1f} in the images themselves) and most of these will not be found: train and detect in "
            "windows with --tiles 640 --data.train_transforms tiles, or give a larger --model.min_size and "
            "--model.max_size where memory and time allow"
        )
