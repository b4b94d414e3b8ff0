"""What a `Predictor` finds in one image."""

from torch import Tensor

from lightning_convnext_det.types import Detection


class Prediction(Detection):
    """The detections of one image by descending score, on the CPU.

    A `Detection`, ``boxes`` float32 [N, 4], ``labels`` int64 [N] and ``scores`` float32 [N], with names and ids of the
    classes.
    """

    names: list[str]
    """Names of the classes [N]."""
    category_ids: Tensor
    """The dataset's own ids of the classes, int64 [N]."""
