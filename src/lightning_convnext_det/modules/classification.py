"""Training, evaluation and prediction of an image classifier, as a LightningModule."""

import inspect
import logging
from typing import Any, Literal, NotRequired, TypedDict, cast

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_convnext_det.arguments import (
    Count,
    Factor,
    Fraction,
    NonNegative,
    NonNegativeInt,
    check_arguments,
)
from lightning_convnext_det.checkpoints.format import FORMAT, NOTHING_TO_FETCH, class_difference, describe_class
from lightning_convnext_det.errors import CheckpointError, DataError
from lightning_convnext_det.models.backbone_weights import last_layer
from lightning_convnext_det.models.classifier import Classifier, imagenet_synsets
from lightning_convnext_det.modules.optimization import Backbone, TrainableModule, check_rates

_logger = logging.getLogger(__name__)


class ClassificationBatch(TypedDict):
    """Images of one size and their labels."""

    images: Tensor
    """uint8 [B, 3, H, W]."""
    labels: NotRequired[Tensor]
    """int64 [B]; absent in prediction."""
    file_names: list[str]


class ClassificationResult(TypedDict):
    """The class of an image."""

    file_name: str
    class_name: str
    score: float
    """Softmax probability, 0 ... 1."""


class ClassifierModule(TrainableModule):
    """Trains and evaluates a timm classifier, whose weights a detector can take as ``backbone_weights``.

    A batch is a `ClassificationBatch`: ``images`` uint8 [B, 3, H, W], ``labels`` int64 [B] from 0, ``file_names``.
    Training logs ``train/loss``, validation and test ``val/loss``, ``val/top1``, ``val/top5``; calling the module gives
    logits float [B, num_classes], ``Trainer.predict`` a `ClassificationResult` for each image.

    Examples:
        >>> module = ClassifierModule(2, ["cat", "dog"], backbone="test_convnext").eval()
        >>> with torch.no_grad():
        ...     logits = module(torch.rand(4, 3, 64, 64))
        >>> logits.shape
        torch.Size([4, 2])

    Args:
        num_classes: classes; from the dataset when the command line trains.
        class_names: their names in order of label; from the dataset when there is one.
        category_ids: not used; datasets of detectors give them.
        backbone: timm name of the network, e.g. ``convnext_tiny`` or ``convnext_tiny.in12k_ft_in1k``.
        pretrained_backbone: start from timm's pretrained weights.
        backbone_weights: start from a local weight file instead.
        in_chans: channels of the images.
        drop_rate: dropout before the last layer.
        drop_path_rate: stochastic depth; 0 leaves the network's own default.
        label_smoothing: share of the target that is spread over all classes.
        mixup: alpha of timm's mixup, 0 for none (arXiv:1710.09412).
        cutmix: alpha of timm's CutMix, 0 for none (arXiv:1905.04899).
        mix_probability: share of the batches that are mixed.
        random_erasing: share of the images in which timm replaces a part by noise (arXiv:1708.04896).
        optimizer: ``adamw`` or ``sgd`` (with momentum 0.9).
        lr: learning rate after the warm-up.
        weight_decay: not applied to norms, biases, layer scale and other one-dimensional parameters.
        backbone_lr_factor: learning rate of all but the last layer relative to ``lr``.
        layer_decay: learning rate of each layer relative to the next, e.g. 0.8.
        base_batch_size: total batch that ``lr`` is meant for; the learning rate is scaled in proportion to the total
            batch of the run (default: not scaled).
        schedule: ``cosine`` to zero, ``step`` at the milestones, or ``constant``.
        milestones: epochs at which ``step`` lowers the learning rate.
        step_factor: what ``step`` multiplies it by.
        warmup_steps: optimizer steps of linear warm-up; at most a tenth of the training.
    """

    monitor = "val/top1"

    def __init__(
        self,
        num_classes: Count | None = None,
        class_names: list[str] | None = None,
        category_ids: list[int] | None = None,
        backbone: str = "convnext_tiny",
        pretrained_backbone: bool = False,
        backbone_weights: str | None = None,
        in_chans: Count = 3,
        drop_rate: Fraction = 0.0,
        drop_path_rate: Fraction = 0.0,
        label_smoothing: Fraction = 0.1,
        mixup: NonNegative = 0.0,
        cutmix: NonNegative = 0.0,
        mix_probability: Fraction = 1.0,
        random_erasing: Fraction = 0.0,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: NonNegative = 1e-3,
        weight_decay: NonNegative = 0.05,
        backbone_lr_factor: NonNegative | None = None,
        layer_decay: Factor | None = None,
        base_batch_size: Count | None = None,
        schedule: Literal["cosine", "step", "constant"] = "cosine",
        milestones: list[NonNegativeInt] | None = None,
        step_factor: Factor = 0.1,
        warmup_steps: NonNegativeInt = 500,
    ) -> None:
        super().__init__()
        check_arguments(ClassifierModule.__init__, locals())
        self.remember_arguments(inspect.currentframe())
        check_rates(self.hparams)
        self.classifier = Classifier(
            backbone, num_classes, pretrained_backbone, backbone_weights, class_names, in_chans, drop_rate,
            drop_path_rate,
        )  # fmt: skip
        self.num_classes = self.classifier.num_classes
        self.mix = _create_mixup(mixup, cutmix, mix_probability, label_smoothing, self.num_classes)
        self.erase = RandomErasing(random_erasing, mode="pixel", device="cpu") if random_erasing else None
        top5 = min(5, self.num_classes)
        self.accuracies = nn.ModuleDict({
            f"{stage}_top{name}": MulticlassAccuracy(self.num_classes, top_k=k, average="micro")
            for stage in ("val", "test")
            for name, k in ((1, 1), (5, top5))
        })  # fmt: skip
        self._labels: Tensor | None = None  # the network's label of each of the data's; None if they are the same

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in order of label."""
        return self.classifier.class_names

    def set_classes(self, names: list[str], ids: None = None) -> None:
        """Name the classes in order of label."""
        self.classifier.class_names = names

    @property
    def network(self) -> nn.Module:
        """The timm network."""
        return self.classifier.net

    def find_backbone(self) -> Backbone:
        """The network is its own backbone."""
        return Backbone(self.classifier.name, self.classifier.net, "")

    def is_in_backbone(self, name: str) -> bool:
        """Say whether a parameter is not of the last layer."""
        return not name.startswith(last_layer(self.classifier.net))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, num_classes] from images [B, 3, H, W], uint8 or floats in 0..1."""
        return cast(Tensor, self.classifier(images))

    def setup(self, stage: str) -> None:
        """Take the classes of the data, or find them among those of the network.

        Raises:
            DataError: if a class of the data is not one of the network's.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if stage == "predict" or data is None or not hasattr(data, "class_names"):
            return
        names = list(data.class_names)
        if self.hparams.get("class_names") is None and stage == "fit" and len(names) == self.num_classes:
            self.set_classes(names)
        elif names != self.class_names:
            self._labels = self._find_labels(names, training=stage == "fit")

    def _find_labels(self, names: list[str], training: bool) -> Tensor:
        known = {name: i for i, name in enumerate(self.class_names)}
        known |= {synset: i for i, synset in enumerate(imagenet_synsets(self.num_classes))}
        missing = [name for name in names if name not in known]
        if missing or training:
            raise DataError(f"[LCD-D120] {class_difference(self.class_names, names)}")
        return torch.tensor([known[name] for name in names])

    # ---- steps

    def training_step(self, batch: ClassificationBatch, batch_idx: int) -> Tensor:
        """Compute the cross-entropy with smoothed, and if asked mixed, targets."""
        images, labels = self.classifier.normalize(batch["images"]), batch["labels"]
        if self.erase is not None:
            images = self.erase(images)
        smoothing = float(self.hparams["label_smoothing"])
        if self.mix is not None and len(images) % 2 == 0:  # timm mixes pairs; an odd last batch stays as it is
            images, labels = self.mix(images, labels)
            smoothing = 0.0  # the mixed targets are smoothed already
        loss = F.cross_entropy(self.classifier.net(images), labels, label_smoothing=smoothing)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Log ``val/loss``, ``val/top1`` and ``val/top5``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Log ``test/loss``, ``test/top1`` and ``test/top5``."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: ClassificationBatch, stage: str) -> None:
        labels = batch["labels"]
        if self._labels is not None:
            labels = self._labels.to(labels.device)[labels]
        logits = self.classifier(batch["images"])
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(labels)}
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), sync_dist=True, **options)
        for top in ("top1", "top5"):
            accuracy = cast(MulticlassAccuracy, self.accuracies[f"{stage}_{top}"])
            accuracy(logits, labels)
            self.log(f"{stage}/{top}", accuracy, prog_bar=True, **options)

    def predict_step(self, batch: ClassificationBatch, batch_idx: int) -> list[ClassificationResult]:
        """Classify each image."""
        scores, labels = self.classifier(batch["images"]).float().softmax(-1).max(-1)
        return [
            ClassificationResult(file_name=file, class_name=self.class_names[label], score=score)
            for file, score, label in zip(batch["file_names"], scores.tolist(), labels.tolist(), strict=True)
        ]

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint self-contained: its classes, its network, and nothing to fetch when it is loaded."""
        classes = {"class_names": self.class_names, "category_ids": None}
        facts = {"num_classes": self.num_classes, **classes, **NOTHING_TO_FETCH}
        checkpoint["hyper_parameters"] = self.declared_arguments(facts)
        super().on_save_checkpoint(checkpoint)
        checkpoint[FORMAT] = {"format": 1, **describe_class(type(self)), **classes}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that were trained on other classes."""
        declared = {**checkpoint.get(FORMAT, {}), **checkpoint.get("hyper_parameters", {})}
        names = declared.get("class_names")
        if names is not None and len(names) != self.num_classes:
            raise CheckpointError(f"[LCD-D120] {class_difference(list(names), self.class_names)}")
        super().on_load_checkpoint(checkpoint)


def _create_mixup(mixup: float, cutmix: float, probability: float, smoothing: float, num_classes: int) -> Mixup | None:
    if not mixup and not cutmix:
        return None
    return Mixup(mixup, cutmix, prob=probability, label_smoothing=smoothing, num_classes=num_classes)
