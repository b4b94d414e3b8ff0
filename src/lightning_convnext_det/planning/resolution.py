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
    native, relative = fingerprint.shorter_side.p50 or 480.0, _small_share(fingerprint)
    usual, longest = _elongations(fingerprint)
    least, most = LEAST[machine.is_cpu], math.sqrt(MOST_PIXELS[machine.is_cpu] / usual)
    given = draft.get("model.max_size", math.inf) / usual
    wanted = WANTED / relative if relative else least
    bounded = min(max(wanted, min(least, LARGEST_SCALE * native)), LARGEST_SCALE * native, most, given)
    side = max(32, 8 * round(bounded / 8))
    if wanted <= side:
        why = f"small boxes have {relative * side:.0f} pixels then; {WANTED:.0f} are enough"
    elif bounded == given:
        why = f"as much as the given max_size lets images have: small boxes have {relative * side:.1f} pixels then"
    elif side >= 8 * round(LARGEST_SCALE * native / 8):
        why = f"{LARGEST_SCALE:g} times the images' own: small boxes have {relative * side:.1f} pixels then"
    else:
        why = f"as much as a step can cost here: small boxes have {relative * side:.1f} pixels then"
    chosen = draft.choose("model.min_size", side, why)
    shorter = int(chosen[-1] if isinstance(chosen, list | tuple) else chosen)
    # beyond twice as long as wide, as far as a step can cost
    longest = min(longest, max(2.0, usual, MOST_PIXELS[machine.is_cpu] / shorter**2))
    longer = max(shorter, 8 * math.ceil(shorter * longest / 8))
    longer = int(draft.choose("model.max_size", longer, f"images are up to {longest:.2g} times as long as wide"))
    scale = Scale(shorter, longer)
    _warn_of_tiny_boxes(draft, fingerprint, scale)
    return scale


def _small_share(fingerprint: Fingerprint) -> float:
    """Side of small boxes as a share of their image's: the 10th percentile, or the median of a class of smaller ones.

    Of each box in its own image: where large and small images are mixed, pixels say little.
    """
    boxes, counts, medians = fingerprint.boxes, fingerprint.objects_per_class, fingerprint.share_per_class
    if not len(boxes):
        return 0.0
    shares = np.sqrt(boxes[:, :2].prod(axis=1)) / boxes[:, 2:].min(axis=1)
    small = [medians[name] for name, count in counts.items() if count >= FEW]
    return min([float(np.quantile(shares, 0.1, method="lower")), *small])


def _elongations(fingerprint: Fingerprint) -> tuple[float, float]:
    """Longer over shorter side: by which pixels are counted, and which nine of ten images of either kind are below."""
    aspect = fingerprint.image_aspect
    if not aspect.p10:
        return 4 / 3, 4 / 3
    longest, middle = max(1.0, aspect.p90, 1 / aspect.p10), max(aspect.p50, 1 / aspect.p50)
    return min(longest, max(2.0, middle)), longest


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
