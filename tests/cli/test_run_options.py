"""Early stopping, averaged weights, and the search for a batch and a learning rate, each by one argument of fit."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping

from lightning_convnext_det.callbacks.validation_images import ValidationImages
from lightning_convnext_det.callbacks.weight_averaging import EMAWithWarmup
from lightning_convnext_det.checkpoints.file import read_checkpoint_file
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.cli.run_options import create_run_callbacks, find_batch_size
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from tests.cli.test_main import SMALL
from tests.training import create_module, create_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]
DEFAULTS = {"time": None, "early_stopping": None, "ema": False, "log_images": 0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_coco(tmp_path_factory.mktemp("data"), 12, 3)


def test_create_run_callbacks__by_the_arguments() -> None:
    module = create_module()
    assert create_run_callbacks(DEFAULTS, module, [], True) == []
    asked = {**DEFAULTS, "early_stopping": 5, "ema": True, "log_images": 2}
    stopping, ema, images = create_run_callbacks(asked, module, [], True)
    assert isinstance(stopping, EarlyStopping)
    assert (stopping.monitor, stopping.mode, stopping.patience) == ("val/map", "max", 5)
    assert isinstance(ema, EMAWithWarmup)
    assert isinstance(images, ValidationImages)
    assert images.num_images == 2


@pytest.mark.parametrize(
    ("asked", "validates", "message"),
    [
        ({"early_stopping": 0}, True, "early_stopping is 0; give a number of validations"),
        ({"early_stopping": 3}, False, "early_stopping needs validations"),
        ({"ema": True}, True, "give one"),
        ({"log_images": -1}, True, "log_images is -1"),
        ({"time": "soon"}, True, "time is 'soon'"),
    ],
    ids=lambda value: str(value),
)
def test_create_run_callbacks__refuses(asked: dict[str, object], validates: bool, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        create_run_callbacks({**DEFAULTS, **asked}, create_module(), [EMAWithWarmup()], validates)


@pytest.mark.heavy
def test_fit__stops_early_and_keeps_averaged_weights(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [f"--data.root={dataset}", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=9"]
    # at a learning rate of 0 no validation is better than the first
    stop = ["--early_stopping=1", "--ema=true", "--model.lr=0", "--log_images=0"]
    with caplog.at_level("INFO"):
        assert main(["fit", *options, *stop, *SMALL]) == 0
    last = read_checkpoint_file(tmp_path / "version_0" / "checkpoints" / "last.ckpt")
    assert last["epoch"] == 1
    assert "current_model_state" in last  # beside the averages
    assert not (tmp_path / "version_0" / "validation_images.jpg").exists()
    config = yaml.safe_load((tmp_path / "version_0" / "config.yaml").read_text())
    assert (config["early_stopping"], config["ema"], config["lr_find"]) == (1, True, False)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_fit__trains_with_the_learning_rate_that_it_finds(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [f"--data.root={dataset}", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=1"]
    with caplog.at_level("INFO"):
        assert main(["fit", *options, "--lr_find=true", "--data.batch_size=1", *SMALL]) == 0
    found = re.search(r"learning rate ([\d.e-]+), where the loss falls fastest, replaces 0.0001", caplog.text)
    assert found is not None
    last = read_checkpoint_file(tmp_path / "version_0" / "checkpoints" / "last.ckpt")
    assert last["hyper_parameters"]["lr"] == pytest.approx(float(found[1]), rel=0.05)
    assert last["global_step"] == 12  # the search counts no steps
    assert re.search(rf"learning rate .* at the start, {re.escape(found[1])} at its peak", caplog.text)
    assert not list(tmp_path.glob(".lr_find*"))


def test_fit__batch_size_find_needs_an_accelerator(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--data.root={dataset}", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", *options, "--batch_size_find=true", *SMALL]) == 2
    assert "error: --batch_size_find tries batches until an accelerator's memory is full" in capsys.readouterr().err


@pytest.mark.heavy
def test_find_batch_size__ends_below_the_batch_that_does_not_fit(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = FasterRCNN.forward

    def limited(self: FasterRCNN, images: list[torch.Tensor], targets: object = None) -> object:
        if len(images) > 4:
            raise RuntimeError("CUDA out of memory.")
        return forward(self, images, targets)  # type: ignore[arg-type]

    monkeypatch.setattr(FasterRCNN, "forward", limited)
    data = DetectionDataModule(str(dataset), batch_size=1, num_workers=0)
    module = create_module(data.num_classes, class_names=data.class_names)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with caplog.at_level("INFO"):
        assert find_batch_size(create_trainer(tmp_path), module, data) == 4
    assert data.batch_size == 4
    assert "batch size 4 is the largest that fits, 1 was set" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
