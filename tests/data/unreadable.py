"""Predicts on unreadable images, on two ranks."""

from pathlib import Path

from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.errors import DataError
from tests.data.recorder import Recorder, make_trainer


def main(root: str, out: str) -> None:
    """Write what the prediction ends with."""
    data = DetectionDataModule(predict=root, batch_size=1, num_workers=0)
    trainer = make_trainer(Path(out), devices=2, strategy="ddp")
    try:
        trainer.predict(Recorder(), datamodule=data)
        ended = "done"
    except DataError as error:
        ended = str(error)
    Path(out, f"{trainer.global_rank}.txt").write_text(ended)
