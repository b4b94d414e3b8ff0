"""Repeat-factor sampling: images with rare classes come several times in an epoch."""

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.data.annotations import DetectionAnnotations


def repeat_factors(annotations: DetectionAnnotations, threshold: float) -> NDArray[np.float64]:
    """How often each image should come in an epoch, at least 1, float64 [N].

    A class that is in a share f of the images has the factor max(1, sqrt(threshold / f)); an image has the largest
    factor of its classes. Objects that training leaves out do not count.

    Args:
        annotations: of the training split.
        threshold: classes in a smaller share of the images are repeated; LVIS takes 0.001.

    Reference:
        Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", arXiv:1908.03195, section 5.
    """
    kept = ~annotations.crowd
    image, label = annotations.image_index[kept], annotations.labels[kept]
    pairs = np.unique(np.stack([image, label]), axis=1)  # an image counts once for each of its classes
    share = np.bincount(pairs[1], minlength=len(annotations.class_names)) / max(1, len(annotations))
    of_class = np.sqrt(np.divide(threshold, share, out=np.ones_like(share), where=share > 0)).clip(min=1.0)
    factors = np.ones(len(annotations))
    np.maximum.at(factors, pairs[0], of_class[pairs[1]])
    return factors


def draw_repeats(factors: NDArray[np.float64], total: int, generator: np.random.Generator | None) -> NDArray[np.int64]:
    """Draw indices so that each image comes as often as its factor says, rounded down or up.

    Systematic sampling: the number of draws is the same in every epoch, and in the mean over epochs an image comes
    ``factor * total / sum(factors)`` times.

    Args:
        factors: of the images, [N].
        total: how many to draw, about the sum of the factors.
        generator: of the epoch; None draws the same in each.

    Returns:
        Index plus N times the number of the copy, ascending, int64 [total]; the copies of an image are augmented
        differently.
    """
    count = len(factors)
    order = np.arange(count) if generator is None else generator.permutation(count)
    start = 0.5 if generator is None else generator.random()
    ends = np.cumsum(factors[order]) * (total / factors.sum())
    ends[-1] = total
    times = np.empty(count, np.int64)
    times[order] = np.diff(np.floor(ends + start).astype(np.int64), prepend=int(np.floor(start)))
    copies = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    return np.sort(np.repeat(np.arange(count), times) + count * copies)
