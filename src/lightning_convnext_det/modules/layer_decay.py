"""Layers of a backbone for layer-wise learning-rate decay, from the heads down to the stem.

For ConvNeXt the layers are those of the authors' detectors (facebookresearch/ConvNeXt,
``object_detection/mmcv_custom/layer_decay_optimizer_constructor.py``), for other networks timm's own ``group_matcher``.
"""

import re
from typing import NamedTuple

import timm
import torch
from timm.models import group_parameters, is_model_in_modules
from torch import nn

_LAST_LAYER = {False: 6, True: 12}  # of the authors: 6 for ConvNeXt-T, 12 for S, B, L and XL, whose stage 2 is deeper
_SHALLOW = 9  # blocks of ConvNeXt-T in stage 2
_PART = re.compile(r"^stages[._](\d+)\.(downsample|blocks\.(\d+))")


class Layers(NamedTuple):
    """The layers of a network, counted from the input."""

    of_parameter: dict[str, int]
    """Layer of every parameter of the network but its classifier, by name."""
    heads: int
    """What follows the network: one more than the last layer."""

    def scale(self, name: str | None, decay: float) -> float:
        """Learning rate of a parameter relative to that of the heads; ``None`` is a parameter outside the network."""
        layer = self.heads if name is None else self.of_parameter.get(name, self.heads)
        return float(decay ** (self.heads - layer))


def find_layers(architecture: str, net: nn.Module) -> Layers:
    """Sort the parameters of a timm network into layers.

    Args:
        architecture: its timm name.
        net: the network, a classifier or ``features_only``.
    """
    names = [name for name, _ in net.named_parameters()]
    if is_model_in_modules(architecture.split(".")[0], ["convnext"]):
        return _convnext_layers(names)
    with torch.device("meta"):
        classifier = timm.create_model(architecture)  # timm flattens the names of a pyramid and drops its matcher
    groups = group_parameters(classifier, classifier.group_matcher(coarse=False), reverse=True)
    by_flat_name = {_flat(name): layer for name, layer in groups.items()}
    heads = max(by_flat_name.values())  # timm puts the classifier, whatever it is called, into the last group
    found = {name: by_flat_name[_flat(name)] for name in names if _flat(name) in by_flat_name}
    return Layers({name: layer for name, layer in found.items() if layer < heads}, heads)


def _convnext_layers(names: list[str]) -> Layers:
    blocks = {int(part[3]) for name in names if (part := _PART.match(name)) and part[1] == "2" and part[3]}
    last = _LAST_LAYER[len(blocks) > _SHALLOW]
    layers = {}
    for name in names:
        if name.startswith("stem"):
            layers[name] = 0
        elif part := _PART.match(name):
            stage, block = int(part[1]), part[3]
            if stage == 3:
                layers[name] = last
            elif stage == 2:
                layers[name] = 3 + (int(block) // 3 if block else 0)
            else:
                # what lies before stage 1 moves with it
                layers[name] = stage + 1
    return Layers(layers, last + 1)


def _flat(name: str) -> str:
    return name.removeprefix("model.").replace(".", "_")
