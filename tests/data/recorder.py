"""A LightningModule that records the images it is given, and a run of it on two ranks."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_convnext_det.data.datamodule import DetectionDataModule

Seen = dict[str, list[list[int]]]


class Recorder(LightningModule):
    """One weight; ``seen`` holds the ids of the images of each batch, by stage and epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: Seen = {}

    def note(self, stage: str, batch: tuple[list[Tensor], list[dict[str, object]]]) -> None:
        images, targets = batch
        assert len(images) == len(targets) > 0
        self.seen.setdefault(f"{stage}{self.current_epoch}", []).append([target["image_id"] for target in targets])

    def training_step(self, batch, batch_idx: int) -> Tensor:
        self.note("train", batch)
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.note("val", batch)

    def test_step(self, batch, batch_idx: int) -> None:
        self.note("test", batch)

    def predict_step(self, batch, batch_idx: int) -> list[int]:
        self.note("predict", batch)
        return [target["image_id"] for target in batch[1]]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAndStop(Callback):
    """Saves a checkpoint in a hook that is called with a step done, and ends the run."""

    def __init__(self, file: Path, step: int, hook: str = "on_train_batch_end") -> None:
        self.file = file
        self.step = step
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)
            trainer.should_stop = True


def make_trainer(folder: Path, **options: object) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **{**quiet, "enable_checkpointing": False, "max_epochs": 2, **options})


def main(root: str, out: str) -> None:
    """Fit, validate, test and predict on two ranks, then overfit; write what each saw."""
    data = DetectionDataModule(root, batch_size=2, num_workers=0, predict=f"{root}/val", train_transforms="none")
    model, options = Recorder(), {"devices": 2, "strategy": "ddp", "num_sanity_val_steps": 0}
    trainer = make_trainer(Path(out), **options)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    trainer.predict(model, datamodule=data)
    few = Recorder()
    make_trainer(Path(out), overfit_batches=2, **options).fit(few, datamodule=data)
    Path(out, f"{trainer.global_rank}.json").write_text(json.dumps([model.seen, few.seen]))
