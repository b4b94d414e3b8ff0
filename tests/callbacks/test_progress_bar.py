import pytest
from lightning.pytorch import Trainer

from lightning_convnext_det.callbacks.progress_bar import StepProgressBar


@pytest.mark.parametrize(("max_epochs", "expected"), [(-1, "Epoch 8"), (12, "Epoch 8/11")])
def test_step_progress_bar__names_the_last_epoch_where_there_is_one(max_epochs: int, expected: str) -> None:
    bar = StepProgressBar()
    bar._trainer = Trainer(accelerator="cpu", max_epochs=max_epochs, logger=False, enable_checkpointing=False,
                           callbacks=[bar])  # fmt: skip
    assert bar._get_train_description(8).rstrip() == expected
