"""Callback that averages weights with a decay that suits trainings of any length."""

from functools import partial

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from lightning_convnext_det.arguments import Fraction, check_arguments


class EMAWithWarmup(WeightAveraging):
    """Exponential moving average of the weights; validation, checkpoints and prediction use the average.

    The decay grows with the number of updates n, as min(decay, (1 + n) / (10 + n)). With a constant decay of 0.999, 71
    % of the average of a training of 336 steps are still the weights of its first step.

    >>> callback = EMAWithWarmup(decay=0.999)
    >>> [round(decay_of(0.999, n), 3) for n in (1, 100, 1000, 100_000)]
    [0.182, 0.918, 0.991, 0.999]

    Args:
        decay: share of the average that an update keeps at most.
        use_buffers: average the statistics of BatchNorms too.

    Reference:
        The rule is that of TensorFlow's ExponentialMovingAverage with ``num_updates``.
    """

    def __init__(self, decay: Fraction = 0.999, use_buffers: bool = True) -> None:
        check_arguments(EMAWithWarmup.__init__, locals())
        super().__init__(use_buffers=use_buffers, multi_avg_fn=partial(_average, decay))
        self.decay = decay


def decay_of(decay: float, num_updates: float) -> float:
    """The decay of an update by the number of updates before it."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


def _average(decay: float, averages: list[Tensor], weights: list[Tensor], num_updates: Tensor | int) -> None:
    """Move averages towards weights; whole numbers, such as counters, are copied."""
    if torch.is_floating_point(averages[0]):
        torch._foreach_lerp_(averages, weights, 1 - decay_of(decay, float(num_updates)))
    else:
        torch._foreach_copy_(averages, weights)
