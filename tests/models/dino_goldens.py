"""What detrex computed for DINO on seeded random weights, and our detector on them."""

import json
import re
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lightning_convnext_det.convert.dino import convert_dino, rename_dino
from lightning_convnext_det.models.deformable_detr.criterion import Objects
from lightning_convnext_det.models.deformable_detr.denoising import Noise
from lightning_convnext_det.models.deformable_detr.dino import DINO
from lightning_convnext_det.models.deformable_detr.levels import Levels
from tests.models.rcnn.goldens import convnext_golden
from tests.models.rcnn.goldens import load_goldens_module as load_module

GOLDENS = Path(__file__).parents[2] / ".." / "shared" / "goldens_dino"
MINI, FULL = "dino_convnext_mini", "dino_convnext_tiny_full"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="the goldens are not here")


class Case(NamedTuple):
    """Images through a model."""

    detector: DINO
    images: list[Tensor]
    batch: Tensor
    sizes: list[tuple[int, int]]
    golden: dict[str, Tensor]

    def levels(self) -> Levels:
        """The tokens of the batch."""
        return self.detector.levels(self.detector.backbone, self.batch, *self.place())

    def place(self) -> tuple[Any, Any]:
        """The sizes as a tensor, None without padding."""
        return self.detector.levels.place(self.batch, self.sizes)


def load_goldens_module(name: str) -> ModuleType:
    """Load a script that lies beside the goldens."""
    return load_module(name, GOLDENS)


def load_meta(model: str) -> dict[str, Any]:
    """Read what lies beside the tensors of a model."""
    meta: dict[str, Any] = json.loads((GOLDENS / model / "meta.json").read_text())
    return meta


def load_state_dict(model: str) -> dict[str, Tensor]:
    """Read the weights of a model, or draw them by its recipe."""
    folder = GOLDENS / model
    if (folder / "weights.safetensors").is_file():
        return load_file(folder / "weights.safetensors")
    recipe, meta = load_goldens_module("recipe"), load_meta(model)
    shapes = json.loads((folder / "shapes.json").read_text())
    drawn = recipe.state_dict(shapes, meta["model"]["seed"], meta["model"]["gains"])
    overrides = load_file(folder / "overrides.safetensors")
    state = {k: overrides.get(recipe.canonical(k), torch.from_numpy(np.asarray(v))) for k, v in drawn.items()}
    for name, total in meta["weight_sums"].items():
        assert abs(float(state[name].double().sum()) - total) <= 1e-6 * max(1.0, abs(total)), name
    return state


def build_detector(model: str, tweak: dict[str, list[float]] | None = None) -> DINO:
    """Import the weights of a model into our detector, in evaluation mode."""
    assert convnext_golden  # registered with timm
    mini = {"backbone": "convnext_golden", "num_heads": 4, "detections_per_image": 100, "independent_images": False}
    state = load_state_dict(model)
    for name, shift in (tweak or {}).items():
        for key in state:
            if load_goldens_module("recipe").canonical(key) == name:
                state[key] = state[key] + torch.tensor(shift)
    converted = convert_dino(state, **(mini if model == MINI else {}))  # padded as by detrex
    detector = DINO(**converted.arguments)
    detector.load_state_dict(converted.state_dict)
    return detector.eval()


@lru_cache(maxsize=1)
def mini_detector() -> DINO:
    """The small model; not to be changed."""
    return build_detector(MINI)


def load_case(model: str, case: str) -> Case:
    """Load the images of a case, resized by our rule, and what detrex computed."""
    info = load_meta(model)["cases"][case]
    detector = build_detector(model, info.get("tweak")) if model == FULL or info.get("tweak") else mini_detector()
    images, parts = [], []
    for image in info["images"]:
        pixels = np.array(Image.open(GOLDENS / "images" / image["image"]).convert("RGB"))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        detector.transform.min_sizes, detector.transform.max_size = [image["short"]], image["max"]
        part, size, _ = detector.transform(images[-1:])
        parts.append((part[0], size[0]))
    sizes = [size for _, size in parts]
    batch = torch.zeros(len(parts), 3, max(s[0] for s in sizes), max(s[1] for s in sizes))
    for slot, (part, (height, width)) in zip(batch, parts, strict=True):
        slot[:, :height, :width] = part
    return Case(detector, images, batch, sizes, load_file(GOLDENS / model / f"{case}.safetensors"))


def noise_of(golden: dict[str, Tensor], objects: Objects, label_noise: float, prefix: str = "") -> Noise:
    """Spread the draws of detrex, which are for the real objects alone, over those padded to a common number."""
    padded = objects.labels.shape[1]
    real = torch.arange(padded) < torch.tensor(objects.counts)[:, None]
    draws = [
        golden.get(prefix + f"draw{i}_{n}") for i, n in enumerate(("label_p", "label_new", "box_sign01", "box_rand"))
    ]
    count = sum(objects.counts)
    copies = 2 * max(1, int(golden[prefix + "groups"])) if prefix + "groups" in golden else len(draws[3]) // count
    spread = real.expand(copies, -1, -1)

    def place(values: Tensor) -> Tensor:
        whole = torch.zeros(*spread.shape, *values.shape[1:], dtype=values.dtype)
        whole[spread] = values
        return whole

    relabel, new, signs, shifts = draws
    labels = torch.zeros(copies * count, dtype=torch.int64)
    labels[relabel < label_noise * 0.5] = new.to(torch.int64)
    return Noise(place(relabel) + ~spread * 1.0, place(labels), place(signs * 2.0 - 1), place(shifts))


def our_names(names: list[str]) -> dict[str, str]:
    """Names of detrex's parameters, and ours."""
    numbered = {name: torch.full((1,), i) for i, name in enumerate(names)}
    return {names[int(number)]: name for name, number in rename_dino(numbered)[0].items()}


def their_loss(name: str) -> str:
    """Name of detrex's loss."""
    _, kind, *rest = name.split("_")
    places = {"denoising": "_dn", "proposals": "_enc"}
    suffix = "".join(places.get(part, re.sub("aux", "_", part)) for part in rest)
    return "loss_" + {"classification": "class", "box": "bbox", "giou": "giou"}[kind] + suffix
