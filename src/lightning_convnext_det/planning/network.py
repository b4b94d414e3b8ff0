"""Backbone, its pretrained weights and the width of the detector."""

from collections.abc import Callable

from lightning_convnext_det.models.backbone_weights import find_licence, has_pretrained, is_commercial
from lightning_convnext_det.planning.draft import Draft
from lightning_convnext_det.planning.machine import Machine


def plan_network(draft: Draft, machine: Machine, kind: str, missing_weights: Callable[[str], str | None]) -> None:
    """Choose the backbone by the machine, pretrained weights wherever there are any, and a narrow detector on a CPU."""
    if machine.is_cpu:
        name = draft.choose("model.backbone", "convnext_atto", "no accelerator: 3.4 million parameters")
    else:
        name = draft.choose("model.backbone", "convnext_tiny", "29 million parameters, published COCO box AP 46.2")
    _plan_weights(draft, str(name), missing_weights)
    if machine.is_cpu and kind == "rcnn":
        # configs/laptop.yaml and the BCCD recipes: 0.516 mAP on BCCD in minutes
        reason = "no accelerator: a narrow pyramid and head, as in configs/laptop.yaml"
        draft.choose("model.fpn_channels", 64, reason)
        draft.choose("model.box_head_features", 256, reason)


def starts_from_random_weights(draft: Draft) -> bool:
    """Whether no part of the network is trained when the training begins."""
    return not any(draft.get(name) for name in ("model.pretrained_backbone", "model.backbone_weights", "start_from"))


def _plan_weights(draft: Draft, name: str, missing_weights: Callable[[str], str | None]) -> None:
    if draft.get("model.backbone_weights") is not None:
        draft.choose("model.pretrained_backbone", False, "backbone_weights are given")
        return
    if not has_pretrained(name):
        draft.choose("model.pretrained_backbone", False, f"timm has no pretrained weights for {name}")
        return
    reason = "pretrained layers need fewer steps and images (He et al., arXiv:1811.08883)"
    if draft.choose("model.pretrained_backbone", True, reason):
        licence = find_licence(name)
        if not is_commercial(licence):
            draft.warn(f"the weights of {name} are under {licence}: not free for commercial use, or with conditions")
        if "model.pretrained_backbone" not in draft.given and (why := missing_weights(name)):
            draft.refuse(
                f"the weights of {name} are not in the cache and cannot be fetched ({why}); "
                "add --model.pretrained_backbone false to train from random weights"
            )
