"""Class and box heads of the detectors with object queries."""

import torch
from torch import Tensor, nn
from torchvision.ops import MLP

from lightning_convnext_det.models.deformable_detr.criterion import prior_bias


def create_heads(hidden_dim: int, num_classes: int, count: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Create class heads and box heads; those of boxes have three layers."""
    class_heads = nn.ModuleList(nn.Linear(hidden_dim, num_classes) for _ in range(count))
    box_heads = nn.ModuleList(MLP(hidden_dim, [hidden_dim, hidden_dim, 4], inplace=False) for _ in range(count))
    return class_heads, box_heads


def reset_heads(class_heads: nn.ModuleList, box_heads: nn.ModuleList) -> None:
    """Start with a probability of 1 % for every class, and with boxes as they are given."""
    for class_head in class_heads:
        nn.init.constant_(class_head.bias, prior_bias())  # type: ignore[arg-type]
    for box_head in box_heads:
        last = last_layer(box_head)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


def last_layer(head: nn.Module) -> nn.Linear:
    """The layer of a box head that predicts the four numbers."""
    return [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]


def apply_in_full_precision(head: nn.Module, x: Tensor) -> Tensor:
    """Run a head in float32, or in the wider precision of its weights: bfloat16 steps are 4 pixels wide above 512."""
    dtype = next(head.parameters()).dtype
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # torch has no autocast for meta
        if dtype in (torch.float16, torch.bfloat16):
            weights = {name: weight.float() for name, weight in head.named_parameters()}
            y: Tensor = torch.func.functional_call(head, weights, (x.float(),))
        else:
            y = head(x.to(dtype))
    return y
