from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_convnext_det import DeformableDETRModule
from lightning_convnext_det.inference.export.export import ExportReport, export
from lightning_convnext_det.modules.registry import save_module


def spread_scores(detector: nn.Module) -> None:
    """Let the heads of an untrained detector tell objects apart, so that their order means something."""
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if "heads" in name or "predictor" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)


@pytest.fixture(scope="session")
def module() -> DeformableDETRModule:
    torch.manual_seed(0)
    module = DeformableDETRModule(
        2, ["cat", "dog"], [7, 9], backbone="test_convnext", strides=(8, 16), num_queries=10, hidden_dim=32,
        num_heads=2, encoder_layers=1, decoder_layers=1, feedforward_dim=32, min_size=64, max_size=160,
        detections_per_image=15,
    )  # fmt: skip
    spread_scores(module.detector)
    return module.eval()


@pytest.fixture(scope="session")
def checkpoint(module: DeformableDETRModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "a.ckpt"
    save_module(module, path)
    return path


@pytest.fixture(scope="session")
def exported(module: DeformableDETRModule, checkpoint: Path) -> ExportReport:
    return export(module, checkpoint.with_name("detr.onnx"), source=checkpoint)
