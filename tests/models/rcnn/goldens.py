"""What MMDetection computed for the ConvNeXt authors' detectors on seeded random weights, and our detectors on them."""

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import register_model
from timm.models.convnext import ConvNeXt, _create_convnext
from torch import Tensor, nn

from lightning_convnext_det.convert.mmdetection import convert_mmdetection
from lightning_convnext_det.models.rcnn.cascade_rcnn import CascadeRCNN
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN

GOLDENS = Path(__file__).parents[3] / ".." / "shared" / "goldens"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="the goldens are not here")


class Case(NamedTuple):
    """One image through one model."""

    detector: FasterRCNN
    image: Tensor
    golden: dict[str, Tensor]
    info: dict[str, Any]


@register_model
def convnext_golden(pretrained: bool = False, **kwargs: Any) -> ConvNeXt:
    """Build the backbone of the small models, which is no size of the family."""
    kwargs.pop("pretrained_cfg", None)
    config = {"url": "", "num_classes": 1000, "input_size": (3, 224, 224)}
    sizes = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)}
    return _create_convnext("convnext_golden", pretrained, pretrained_cfg=config, **sizes, **kwargs)


def load_goldens_module(name: str, folder: Path = GOLDENS) -> ModuleType:
    """Load a script that lies beside the goldens."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_state_dict(model: str) -> dict[str, Tensor]:
    """Read the weights of a model, or draw them by its recipe."""
    folder = GOLDENS / model
    if (folder / "weights.safetensors").is_file():
        return load_file(folder / "weights.safetensors")
    recipe, meta = load_goldens_module("recipe"), json.loads((folder / "meta.json").read_text())
    shapes = json.loads((folder / "shapes.json").read_text())
    drawn = recipe.state_dict(shapes, meta["model"]["seed"], meta["model"]["gains"])
    state = {k: torch.from_numpy(np.asarray(v)) for k, v in drawn.items()}
    state.update(load_file(folder / "overrides.safetensors"))
    for name, total in meta["weight_sums"].items():
        assert abs(float(state[name].double().sum()) - total) <= 1e-6 * max(1.0, abs(total)), name
    return state


@lru_cache(maxsize=2)
def build_detector(model: str) -> FasterRCNN:
    """Import the weights of a model into our detector, in evaluation mode."""
    arguments = {"backbone": "convnext_golden"} if model.endswith("mini") else {}
    converted = convert_mmdetection(load_state_dict(model), **arguments)
    detector = (CascadeRCNN if converted.module == "CascadeRCNNModule" else FasterRCNN)(**converted.arguments)
    detector.load_state_dict(converted.state_dict)
    return detector.eval()


def load_case(model: str, case: str) -> Case:
    """Load an image, the detector with its resize rule, and what MMDetection computed."""
    info = json.loads((GOLDENS / model / "meta.json").read_text())["cases"][case]
    pixels = np.array(Image.open(GOLDENS / "images" / info["image"]).convert("RGB"))
    detector = build_detector(model)
    detector.transform.max_size, detector.transform.min_sizes = max(info["scale"]), [min(info["scale"])]
    golden = load_file(GOLDENS / model / f"{case}.safetensors")
    return Case(detector, torch.from_numpy(pixels).permute(2, 0, 1), golden, info)


def background_last(logits: Tensor) -> Tensor:
    """Order logits [R, classes + 1] of ours as MMDetection orders them."""
    return torch.cat((logits[:, 1:], logits[:, :1]), dim=1)


def stages_of(detector: FasterRCNN) -> list[nn.Module]:
    """The stages of the second stage."""
    return list(getattr(detector.roi_heads, "stages", [detector.roi_heads]))
