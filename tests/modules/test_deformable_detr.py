from pathlib import Path

import pytest
import torch

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.modules import DeformableDETRModule, load_module
from lightning_convnext_det.modules.registry import save_module
from tests.training import create_batches

TINY = {
    "backbone": "test_convnext",
    "min_size": 64,
    "max_size": 96,
    "num_queries": 12,
    "hidden_dim": 32,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward_dim": 16,
    "dropout": 0.0,
}


def test_deformable_detr_module__keeps_loss_weights_in_checkpoints(tmp_path: Path) -> None:
    module = DeformableDETRModule(2, **TINY, loss_weights=(1.0, 4.0, 0.0), matching_costs=(3.0, 1.0, 2.0))
    save_module(module, tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)  # plain numbers only
    assert list(content["hyper_parameters"]["loss_weights"]) == [1.0, 4.0, 0.0]
    loaded = load_module(tmp_path / "a.ckpt")
    assert loaded.detector.criterion.matching_costs == {"classification": 3.0, "box": 1.0, "giou": 2.0}
    (images, targets), *_ = create_batches(1)
    for each in (module, loaded):
        losses = each.detector.train()(images, targets)
        assert losses["loss_giou"] == losses["loss_giou_aux0"] == 0 < losses["loss_box"]


def test_deformable_detr_module__takes_loss_weights_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.loss_weights=[1, 4, 0]", "--print_config"]
    with pytest.raises(SystemExit):
        main(["fit", "--model=DeformableDETRModule", "--model.num_classes=2", "--data.root=COCO", *options])
    assert "loss_weights:\n    - 1.0\n    - 4.0\n    - 0.0\n" in capsys.readouterr().out.replace("      -", "    -")
