"""Image classification with any timm network, including its preprocessing and class names.

A `Classifier` takes images as the detectors do, uint8 or float in 0..1, and normalises them itself. `classify` and
`extract_features` take an image of any size and resize and crop it as timm does for evaluation.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, cast, get_args

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from lightning_convnext_det.arguments import Count, Fraction, check_arguments, check_class_names
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.io.pixels import Channels, pixels_of
from lightning_convnext_det.models.backbone import check_name
from lightning_convnext_det.models.backbone_weights import fetching, load_classifier_weights
from lightning_convnext_det.models.image_transform import channel_statistics


class Classification(NamedTuple):
    """A predicted class and its probability."""

    name: str
    score: float
    """Softmax probability, 0 ... 1."""
    label: int


class Features(NamedTuple):
    """Feature maps and pooled feature vector of an image."""

    maps: list[Tensor]
    """Feature map of each stage, float [C, H, W], the finest first; for ConvNeXt at strides 4, 8, 16 and 32."""
    pooled: Tensor
    """Input of the last layer, float [C]."""


class Classifier(nn.Module):
    """Image classifier: a timm network that normalises its images and knows its class names.

    Takes images [B, in_chans, H, W], uint8 or float in 0..1, on any device, and returns logits, float [B, num_classes].

    >>> import torch
    >>> model = Classifier("test_convnext", class_names=["cat", "dog", "bird"], num_classes=3).eval()
    >>> model(torch.zeros(2, 3, 96, 96, dtype=torch.uint8)).shape
    torch.Size([2, 3])

    Args:
        name: timm name, e.g. ``convnext_tiny`` or ``convnext_tiny.in12k_ft_in1k``.
        num_classes: classes; if not given, those of the pretrained weights, 1000 for most.
        pretrained: fetch timm's pretrained weights, or take them from its cache.
        weights: start from a local weight file instead: a checkpoint of this package or of timm, a state dict or
            safetensors. The last layer is loaded if it has as many classes.
        class_names: names in order of label (default: ImageNet's if the number of classes is that of an ImageNet).
        in_chans: channels of the images; one channel is normalised by the mean of the RGB statistics, four and more
            by repeating them.
        drop_rate: dropout before the last layer.
        drop_path_rate: stochastic depth; 0 keeps the default of the network.
        image_size: side in pixels of the square crop in evaluation (default: as the weights were tested).
        channels_last: memory format of the convolutions.

    Raises:
        ValueError: if the name is unknown, or class names repeat or differ in number from the classes.
        WeightsError: if weights cannot be fetched or read, or belong to another network.
    """

    def __init__(
        self,
        name: str,
        num_classes: Count | None = None,
        pretrained: bool = False,
        weights: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        in_chans: Count = 3,
        drop_rate: Fraction = 0.0,
        drop_path_rate: Fraction = 0.0,
        image_size: Count | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        check_arguments(Classifier.__init__, locals())
        check_name(name, "classifier")
        options: dict[str, float] = {"in_chans": in_chans, "drop_rate": drop_rate}
        options |= {} if num_classes is None else {"num_classes": num_classes}
        options |= {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        self.name, self.in_chans = name, in_chans
        fetched = pretrained and weights is None
        with fetching(name) if fetched else nullcontext():
            self.net: nn.Module = _create(name, fetched, options)
        self.num_classes = cast(int, self.net.num_classes)
        if weights is not None:
            load_classifier_weights(self.net, weights, name)
        check_class_names(class_names or ())
        self.class_names = list(_names(self.net, self.num_classes) if class_names is None else class_names)
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names, but '{name}' has {self.num_classes} classes")
        config = resolve_data_config({"img_size": image_size} if image_size else {}, model=self.net, use_test_size=True)
        self.image_size: int = int(config["input_size"][-1])
        self.image_mean, self.image_std = (channel_statistics(config[key], in_chans) for key in ("mean", "std"))
        self._prepare = create_transform(**config, normalize=False)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, num_classes] of images [B, C, H, W], uint8 or float in 0..1."""
        weight = next(self.net.parameters())
        logits: Tensor = self.net(self.normalize(images.to(weight.device)).to(weight.dtype))
        return logits

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise images [..., C, H, W], uint8 or float in 0..1, by the statistics of the weights."""
        values = images.float() / 255 if images.dtype == torch.uint8 else images
        mean, std = (values.new_tensor(x)[:, None, None] for x in (self.image_mean, self.image_std))
        return (values - mean) / std

    def prepare(self, image: Image.Image | Tensor) -> Tensor:
        """Resize and crop an image as timm does for evaluation.

        Args:
            image: a Pillow image, converted to grey, RGB or RGBA for 1, 3 or 4 channels, or a tensor
                [in_chans, H, W], uint8 or float in 0..1.

        Returns:
            uint8 [in_chans, image_size, image_size].

        Raises:
            ValueError: if the image has other channels.
        """
        if isinstance(image, Image.Image):
            image = pixels_of(image, "the image", _pixel_channels(self))
        if image.dim() != 3 or len(image) != self.in_chans:
            raise ValueError(f"the image has shape {list(image.shape)}; expected [{self.in_chans}, height, width]")
        pixels = image if image.dtype == torch.uint8 else (image * 255).round().clamp(0, 255).to(torch.uint8)
        # as a Pillow image, as timm resizes it; but Pillow weights colours by alpha, which a fourth channel need not be
        prepared: Tensor = self._prepare(F.to_pil_image(pixels.cpu()) if self.in_chans in (1, 3) else pixels)
        return prepared


def _create(name: str, pretrained: bool, options: dict[str, float]) -> nn.Module:
    try:
        net: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        return net
    except TypeError as error:
        if option := next((key for key in options if f"'{key}'" in str(error)), None):
            raise ValueError(f"classifier '{name}' has no {option}; leave it at its default") from None
        raise


def list_classifiers(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """List timm's classifiers that match a shell pattern such as ``convnext*``, or their pretrained weights."""
    names = timm.list_models(pattern, pretrained=pretrained)
    return list(names)


def create_classifier(
    name: str,
    pretrained: bool = False,
    num_classes: int | None = None,
    *,
    weights: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    drop_path_rate: float = 0.0,
    in_chans: int = 3,
) -> Classifier:
    """Build a `Classifier`, which documents the arguments, in evaluation mode.

    >>> create_classifier("test_convnext", num_classes=2, class_names=["cat", "dog"]).class_names
    ['cat', 'dog']
    """
    return Classifier(
        name, num_classes, pretrained, weights, class_names, in_chans, drop_path_rate=drop_path_rate
    ).eval()


@torch.no_grad()
def classify(model: Classifier, image: Image.Image | Tensor | str | Path, top: int = 1) -> list[Classification]:
    """Predict the most probable classes of an image.

    >>> import torch
    >>> model = create_classifier("test_convnext", num_classes=2, class_names=["cat", "dog"])
    >>> best, second = classify(model, torch.rand(3, 50, 70), top=2)
    >>> {best.name, second.name} == {"cat", "dog"}, best.score >= second.score
    (True, True)

    Args:
        model: in evaluation mode.
        image: a file, whose EXIF orientation is applied, a Pillow image, or a tensor [in_chans, H, W], uint8 or float
            in 0..1, of any size.
        top: number of classes to return.

    Returns:
        The most probable classes by descending probability.
    """
    batch = model.prepare(_read(model, image))[None].to(_device(model))
    scores, labels = model(batch).float().softmax(-1)[0].topk(min(top, model.num_classes))
    return [
        Classification(model.class_names[label], score, label)
        for score, label in zip(scores.tolist(), labels.tolist(), strict=True)
    ]


@torch.no_grad()
def extract_features(model: Classifier, image: Image.Image | Tensor | str | Path) -> Features:
    """Compute the feature maps of every stage and the pooled feature vector of an image.

    >>> import torch
    >>> features = extract_features(create_classifier("test_convnext"), torch.rand(3, 50, 70))
    >>> [tuple(x.shape) for x in features.maps], tuple(features.pooled.shape)
    ([(24, 40, 40), (32, 20, 20), (48, 10, 10), (64, 5, 5)], (64,))

    Args:
        model: in evaluation mode.
        image: as for `classify`.

    Raises:
        ValueError: if networks of this family do not return their feature maps.
    """
    if not hasattr(model.net, "forward_intermediates"):
        raise ValueError(f"'{model.name}' does not return its feature maps; ConvNeXt and ResNet do")
    batch = model.normalize(model.prepare(_read(model, image))[None].to(_device(model)))
    final, maps = model.net.forward_intermediates(batch)  # type: ignore[operator]
    pooled = model.net.forward_head(final, pre_logits=True)  # type: ignore[operator]
    return Features([x[0] for x in maps], pooled[0])


def _read(model: Classifier, image: Image.Image | Tensor | str | Path) -> Image.Image | Tensor:
    return read_image(image, channels=_pixel_channels(model)) if isinstance(image, str | Path) else image


def _pixel_channels(model: Classifier) -> Channels:
    if model.in_chans not in get_args(Channels):
        raise ValueError(f"'{model.name}' takes {model.in_chans} channels, images have 1, 3 or 4; give a tensor")
    return cast(Channels, model.in_chans)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _names(net: nn.Module, num_classes: int) -> list[str]:
    """Class names of the ImageNet subset with this number of classes, else numbers."""
    subset = infer_imagenet_subset(net)
    if subset is None:
        return [str(i) for i in range(num_classes)]
    info = ImageNetInfo(subset)
    return [str(info.index_to_description(i)) for i in range(num_classes)]


def imagenet_synsets(num_classes: int) -> list[str]:
    """Folder names (synsets) of ImageNet in order of label, such as ``n01440764``; empty if it is not ImageNet."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return [] if subset is None else list(ImageNetInfo(subset).label_names())
