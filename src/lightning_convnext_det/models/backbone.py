"""Multi-scale feature maps of any timm network: the backbone of every detector.

`TimmPyramid` chooses feature maps by their stride, never by their index: ConvNeXt has four from stride 4, a ResNet has
five from stride 2.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import Format, LayerNorm2d, freeze_batch_norm_2d
from timm.models import FeatureInfo
from torch import Tensor, nn

from lightning_convnext_det.models.backbone_weights import fetching, flat_name, load_backbone_weights
from lightning_convnext_det.models.mlp import use_fast_mlps
from lightning_convnext_det.models.response_norm import use_fast_response_norm
from lightning_convnext_det.ops.depthwise_conv import use_fast_depthwise


class TimmPyramid(nn.Module):
    """Backbone: feature maps of a timm network at given strides.

    Takes normalised images, float [B, in_chans, H, W] of any size, padded with zeros at the right and the bottom to a
    multiple of the largest stride, or of ``size_divisible``. Returns one float map [B, channels[i], H / strides[i],
    W / strides[i]] per stride, finest first, H and W after padding.

    >>> import torch
    >>> pyramid = TimmPyramid("test_convnext", strides=(4, 8, 16, 32))
    >>> [tuple(x.shape) for x in pyramid(torch.zeros(2, 3, 64, 90))]
    [(2, 24, 16, 24), (2, 32, 8, 12), (2, 48, 4, 6), (2, 64, 2, 3)]

    Args:
        name: any timm model name with a feature pyramid, e.g. ``convnext_tiny`` or ``convnext_tiny.fb_in22k``.
        pretrained: fetch timm's pretrained weights, or take them from its cache.
        weights: a local ``.pth``, ``.pt``, ``.ckpt`` or ``.safetensors`` file with a state dict of this network,
            instead of ``pretrained``.
        in_chans: channels of the input.
        strides: strides of the feature maps to return, ascending.
        drop_path_rate: stochastic depth; 0 keeps the default of the network.
        stem_eps: epsilon of the first LayerNorm; 0 keeps timm's.
        out_norm: LayerNorm over the channels of every map, as in the ConvNeXt authors' detectors.
        frozen_stages: how many levels, from the finest, are frozen with all parameters that they depend on; their
            BatchNorms keep their statistics.
        batch_norm: ``frozen`` turns BatchNorm into a fixed affine map, as is usual for small detection batches;
            ``train`` keeps it.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        size_divisible: pad images to a multiple of this; the largest stride if not given. Maps of others are rounded
            down, or however the network rounds, which only a detector without top-down path can use.
        channels_last: run in channels_last memory format, 2-4 times faster for convolutions on CPUs and tensor cores.

    Attributes:
        channels: channels of each map.
        strides: stride of each map.

    Raises:
        ValueError: if the name is unknown or the network has no map at one of the strides.
        WeightsError: if weights cannot be fetched or read, or belong to another network.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        weights: str | None = None,
        in_chans: int = 3,
        strides: Sequence[int] = (4, 8, 16, 32),
        drop_path_rate: float = 0.0,
        stem_eps: float = 0.0,
        out_norm: bool = False,
        frozen_stages: int = 0,
        batch_norm: Literal["frozen", "train"] = "frozen",
        gradient_checkpointing: bool = False,
        size_divisible: int | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.name = name
        self.strides = list(strides)
        check_name(name, "backbone")
        if self.strides != sorted(set(self.strides)):
            raise ValueError(f"strides must ascend, got {self.strides}")
        self.size_divisible = size_divisible or self.strides[-1]
        self.net = _create_features(name, self.strides, pretrained and weights is None, in_chans, drop_path_rate)
        use_fast_depthwise(self.net)
        use_fast_response_norm(self.net)
        use_fast_mlps(self.net)
        if weights is not None:
            load_backbone_weights(self.net, weights, name)
        self.channels: list[int] = _feature_info(self.net).channels()
        self.is_channels_last_output = getattr(self.net, "output_fmt", None) == Format.NHWC
        self.norms = nn.ModuleList(LayerNorm2d(c, eps=1e-6) for c in self.channels) if out_norm else None
        if stem_eps:
            _set_stem_eps(self.net, stem_eps, name)
        if gradient_checkpointing:
            _enable_checkpointing(self.net, name)
        if batch_norm == "frozen":
            self.net = freeze_batch_norm_2d(self.net)
        self.in_chans = in_chans
        self.channels_last = channels_last
        self.net.to(memory_format=self.memory_format)
        if frozen_stages:
            self.freeze(frozen_stages)

    def freeze(self, stages: int) -> None:
        """Freeze all parameters that the first feature maps depend on.

        Args:
            stages: how many maps, from the finest.
        """
        if not 0 < stages <= len(self.strides):
            raise ValueError(
                f"frozen_stages is {stages}, but the pyramid of '{self.name}' has {len(self.strides)} levels"
            )
        if any(parameter.is_meta for parameter in self.net.parameters()):
            self._freeze_when_loaded(stages)
            return
        training = self.net.training
        self.net.eval()
        with torch.enable_grad():
            # the parameters that a level depends on are those that its gradient reaches, whatever they are called
            parameters = list(self.net.parameters())
            learning = [parameter.requires_grad for parameter in parameters]
            self.net.requires_grad_(True)  # gradients have to pass what is frozen already
            maps = self.net(parameters[0].new_zeros(1, self.in_chans, 64, 64))
            grads = torch.autograd.grad(maps[stages - 1].sum(), parameters, allow_unused=True)
        for parameter, learns, grad in zip(parameters, learning, grads, strict=True):
            parameter.requires_grad_(learns and grad is None)
        self.net.train(training)

    def _freeze_when_loaded(self, stages: int) -> None:
        """Freeze once a state dict has been loaded; a network without weights has no gradients to go by."""

        def freeze(pyramid: "TimmPyramid", _: object) -> None:
            hook.remove()
            pyramid.freeze(stages)

        hook = self.register_load_state_dict_post_hook(freeze)  # type: ignore[no-untyped-call]

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of the convolutions."""
        # not kept as an attribute: torch.save cannot pickle one (torch 2.14, protocol 2)
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps, finest first, of normalised images [B, in_chans, H, W]."""
        weight = next(self.net.parameters(), images)
        if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
            images = images.to(weight.dtype)  # after double()
        # ConvNeXt floors odd sizes, the FPN then cannot add levels
        images = pad_to_multiple(images, self.size_divisible).contiguous(memory_format=self.memory_format)
        with _in_evaluation_mode(_frozen_modules(self.net) if self.training else ()):
            maps: list[Tensor] = list(self.net(images))
        if self.is_channels_last_output:
            maps = [x.permute(0, 3, 1, 2) for x in maps]  # [B, H, W, C] -> [B, C, H, W], no copy
        if self.norms is not None:
            maps = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        return maps


def _frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Find the modules whose parameters are all frozen, with all that they consist of."""
    learns = {parameter.requires_grad for parameter in module.parameters()}
    if learns == {False}:
        yield from module.modules()
    elif learns == {False, True}:
        for child in module.children():
            yield from _frozen_modules(child)


@contextmanager
def _in_evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep statistics and drop no path for a while; lasting evaluation mode would alarm Lightning at every start."""
    learning = [module for module in modules if module.training]
    for module in learning:
        module.training = False
    try:
        yield
    finally:
        for module in learning:
            module.training = True


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad images [..., H, W] with zeros at the right and the bottom until both sides are multiples."""
    height, width = images.shape[-2:]
    pad_height, pad_width = -height % multiple, -width % multiple
    return F.pad(images, (0, pad_width, 0, pad_height)) if pad_height or pad_width else images


def check_name(name: str, role: Literal["backbone", "classifier"]) -> None:
    """Refuse an unknown timm name or tag of weights, and suggest similar ones."""
    architecture = name.split(".")[0]
    if timm.is_model(architecture):
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError:
            tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
            raise ValueError(f"{role} '{name}' has a tag that timm does not know; known are {tags}") from None
        return
    close = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(repr(c) for c in close)}?" if close else "timm.list_models() lists them"
    raise ValueError(f"{role} '{name}' is not a timm model; {hint}")


def _create_features(
    name: str, strides: list[int], pretrained: bool, in_chans: int, drop_path_rate: float
) -> nn.Module:
    reductions = _reductions(name)
    missing = [s for s in strides if s not in reductions]
    if missing:
        have = ", ".join(str(r) for r in reductions) or "none"
        need = ", ".join(str(s) for s in strides)
        raise ValueError(f"backbone '{name}' has strides {have}; a pyramid needs {need}, e.g. 'convnext_tiny'")
    # the last map of a stride is the deepest one
    indices = [len(reductions) - 1 - reductions[::-1].index(s) for s in strides]
    options: dict[str, float] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    try:
        with fetching(name) if pretrained else nullcontext():
            return _create(name, pretrained=pretrained, in_chans=in_chans, out_indices=indices, **options)
    except TypeError as error:
        if "drop_path_rate" in str(error):
            raise ValueError(f"backbone '{name}' has no stochastic depth; leave drop_path_rate at 0") from None
        raise


@cache
def _reductions(name: str) -> tuple[int, ...]:
    # on the meta device first, which costs no memory; before timm 1.0.30 a RegNet reads values while it is built
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                return tuple(_feature_info(_create(name)).reduction())
        except NotImplementedError:
            continue
        except (RuntimeError, AttributeError, IndexError, AssertionError):
            break  # timm raises one of these for networks without features_only
    return ()


def _feature_info(net: nn.Module) -> FeatureInfo:
    info = net.feature_info
    assert isinstance(info, FeatureInfo)  # every features_only network of timm has one
    return info


def _create(name: str, *, out_indices: list[int] | None = None, **options: bool | float) -> nn.Module:
    if out_indices is not None:
        options["out_indices"] = out_indices  # type: ignore[assignment]
    try:  # Swin and its kin check the input size unless told not to; others do not know the option
        net: nn.Module = timm.create_model(name, features_only=True, strict_img_size=False, **options)
    except TypeError:
        net = timm.create_model(name, features_only=True, **options)
    return net


def _set_stem_eps(net: nn.Module, eps: float, name: str) -> None:
    norm = next((m for m in net.modules() if isinstance(m, nn.LayerNorm)), None)
    if norm is None:
        raise ValueError(f"stem_eps is {eps}, but backbone '{name}' has no LayerNorm; leave it at 0")
    norm.eps = eps


def _enable_checkpointing(net: nn.Module, name: str) -> None:
    try:
        net.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise ValueError(f"backbone '{name}' does not support gradient checkpointing") from None


def backbone_state_dict(pyramid: TimmPyramid) -> dict[str, Tensor]:
    """State dict of a detector's backbone under timm's names, which `timm.create_model` loads.

    ``timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": FILE}, num_classes=N)`` and the same with
    ``features_only=True`` take them from a file.
    """
    with torch.device("meta"):
        classifier = timm.create_model(pyramid.name, in_chans=pyramid.in_chans)
    names = {flat_name(key): key for key in classifier.state_dict()}
    tensors = pyramid.net.state_dict()
    return {names.get(flat_name(key), key): value.detach().cpu().contiguous() for key, value in tensors.items()}
