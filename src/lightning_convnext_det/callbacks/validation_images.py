"""Callback that draws validation images with ground truth and detections, for the log folder and loggers."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from PIL import Image

from lightning_convnext_det.arguments import Count, check_arguments
from lightning_convnext_det.data.batch import split_batch
from lightning_convnext_det.types import Detection, Target
from lightning_convnext_det.visualization import SCORE_THRESHOLD, class_colors, contact_sheet, draw_detections

_KEY = "val/images"
_MOST_DETECTIONS = 100  # in a drawing


class ValidationImages(Callback):
    """Draw the same validation images at every validation: annotated on the left, detected on the right.

    The sheet goes to every logger that takes images (TensorBoard, Weights & Biases, MLflow, Comet and those with the
    same methods) as ``val/images``, and into the folder of the logs as ``validation_images.jpg``, which the next
    validation replaces. Detections are drawn from the score threshold of their class on, which the validation chooses.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[ValidationImages(4)], logger=False, accelerator="cpu")

    Args:
        num_images: images, spread evenly over the validation images of the first rank.
    """

    def __init__(self, num_images: Count = 4) -> None:
        check_arguments(ValidationImages.__init__, locals())
        self.num_images = num_images
        self._wanted: Counter[int] = Counter()
        self._taken: list[tuple[Any, Target, Detection]] = []  # the first is an image, a tensor

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the images."""
        batches = float(sum(trainer.num_val_batches or [0]))
        last = int(batches) if math.isfinite(batches) else self.num_images
        self._wanted = Counter(i * last // self.num_images for i in range(self.num_images))
        self._taken = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the chosen images with what was detected."""
        left_out = dataloader_idx > 0 or trainer.sanity_checking or not trainer.is_global_zero
        wanted = 0 if left_out else self._wanted[batch_idx]
        if not wanted or not isinstance(outputs, Mapping) or "detections" not in outputs:
            return
        images, targets = split_batch(batch)
        for image, target, found in zip(images, targets or [], outputs["detections"], strict=True):
            if wanted and image.shape[0] in (1, 3, 4):
                self._taken.append((image.cpu(), target, found))
                wanted -= 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the images and hand them to the loggers."""
        folder = None if trainer.sanity_checking else trainer.log_dir  # a collective call
        taken, self._taken = self._taken, []
        if not taken:
            return
        names: list[str] = list(getattr(pl_module, "class_names", []))
        thresholds = getattr(pl_module, "score_thresholds", None) or [None] * len(names)
        sheet = draw_validation(taken, names, [SCORE_THRESHOLD if t is None else t for t in thresholds])
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            sheet.save(Path(folder) / "validation_images.jpg", quality=80)
        for logger in trainer.loggers:
            log_image(logger, _KEY, sheet, trainer.global_step)


def draw_validation(
    taken: list[tuple[Any, Target, Detection]], names: list[str], thresholds: list[float]
) -> Image.Image:
    """Arrange images in pairs: annotated, and detected from the threshold of the class on."""
    colors, drawn, captions = class_colors(names), [], []
    for image, target, found in taken:
        labels, scores = found["labels"].tolist(), found["scores"].tolist()
        kept = [i for i, label in enumerate(labels) if scores[i] >= thresholds[label]][:_MOST_DETECTIONS]
        annotated = [names[label] for label in target["labels"].tolist()]
        drawn.append(draw_detections(image, target["boxes"], annotated, None, colors))
        detected = [names[labels[i]] for i in kept]
        drawn.append(draw_detections(image, found["boxes"][kept], detected, [scores[i] for i in kept], colors))
        file = Path(str(target.get("file_name", target.get("image_id", "")))).name
        captions += [f"{file}: annotated", f"{file}: detected"]
    return contact_sheet(drawn, columns=4, captions=captions)


def log_image(logger: Any, name: str, image: Image.Image, step: int) -> bool:
    """Give an image to a logger by the methods that it has; False where it takes none.

    Args:
        logger: of Lightning or of the user's own.
        name: of the image.
        image: RGB.
        step: of the optimizer.
    """
    if hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(key=name, images=[image], step=step)
        return True
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):  # TensorBoard
        experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
    elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_image(logger.run_id, image, key=name.replace("/", "_"), step=step)
    elif hasattr(experiment, "log_image"):  # Comet
        experiment.log_image(image, name=name, step=step)
    else:
        return False
    return True
