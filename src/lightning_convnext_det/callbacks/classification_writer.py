"""Callback that writes the predictions of a classifier."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_convnext_det.callbacks.prediction_writer import PredictionWriter
from lightning_convnext_det.errors import ArgumentError


class ClassificationWriter(Callback):
    """Writes the predictions of a classifier to ``predictions.json``, a list of ``{file_name, class_name, score}``.

    The file appears when the prediction is complete and replaces that of an earlier one; of several ranks each writes
    a file of its own.

    Args:
        folder: where to write.
    """

    def __init__(self, folder: str | Path = "predictions") -> None:
        self.folder = Path(folder)
        self._results: list[dict[str, str | float]] = []

    @classmethod
    def instead_of(cls, writer: PredictionWriter) -> "ClassificationWriter":
        """The writer of a classifier's predictions into the folder of one for detectors.

        Raises:
            ArgumentError: if that was to write what classifiers do not have.
        """
        if writer.formats != ["coco"]:
            raise ArgumentError(
                f"output.formats is {','.join(writer.formats)}, which are of detectors; a classifier writes "
                "predictions.json, without output.formats"
            )
        return cls(writer.folder)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the results of an earlier prediction."""
        self._results = []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Sequence[dict[str, str | float]],
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the results of a batch."""
        self._results += outputs

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``predictions.json``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = "predictions.json" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.json"
        temporary = self.folder / f".{name}.tmp"
        temporary.write_text(json.dumps(self._results, indent=1))
        os.replace(temporary, self.folder / name)
        rank_zero_info(f"predictions are in '{self.folder / name}'")
