"""Training, evaluation and prediction of any detector, as a LightningModule."""

import inspect
import logging
from typing import Any, Literal, TypedDict, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_convnext_det.arguments import Count, Factor, NonNegative, NonNegativeInt, check_arguments
from lightning_convnext_det.checkpoints.format import (
    FORMAT,
    NOTHING_TO_FETCH,
    class_difference,
    describe_class,
    is_own,
    own_base,
    plain,
    read_grey_range,
    read_score_thresholds,
)
from lightning_convnext_det.data.batch import Batch, split_batch
from lightning_convnext_det.errors import ArgumentError, CheckpointError, DataError, DivergenceError
from lightning_convnext_det.metrics.coco_map import DetectionEvaluator, MaxDetections
from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.modules.compiled import compile_parts
from lightning_convnext_det.modules.metric_table import write_per_class
from lightning_convnext_det.modules.optimization import Backbone, TrainableModule, check_rates
from lightning_convnext_det.types import Detection

_logger = logging.getLogger(__name__)


class Outcome(TypedDict):
    """What a training step returns to the trainer and its callbacks."""

    loss: Tensor
    losses: dict[str, Tensor]
    """Its parts by name, without gradients."""
    reason: str | None
    """What the detector reports of numbers that are not finite."""


class DetectionModule(TrainableModule):
    """Trains and evaluates a detector, which a subclass builds.

    A batch is ``(images, targets)``: images uint8 or float in 0..1, a list of [3, H, W] or one tensor [B, 3, H, W];
    for each image a `Target` with ``boxes`` float32 [N, 4], corners in its pixels, and ``labels`` int64 [N] from 0.
    Training logs each weighted loss as ``train/<name>``, validation and test log COCO's metrics as ``val/map`` ...;
    calling the module, and ``Trainer.predict``, give one `Detection` for each image.

    Each validation of a fit sets ``score_thresholds``, for each class that of highest F1 at IoU 0.5, None where the
    images do not tell. Checkpoints hold them.

    Examples:
        >>> from lightning_convnext_det import FasterRCNNModule
        >>> module = FasterRCNNModule(2, ["cat", "dog"], backbone="test_convnext", min_size=64, max_size=96).eval()
        >>> with torch.no_grad():
        ...     detections = module([torch.rand(3, 64, 80), torch.rand(3, 50, 70)])
        >>> len(detections), detections[0]["boxes"].shape[1]
        (2, 4)

    Args:
        num_classes: foreground classes; from the dataset when the command line gives one.
        class_names: their names in order of label; from the dataset when there is one.
        category_ids: the dataset's own ids of the classes; predictions are written with them.
        optimizer: ``adamw`` or ``sgd`` (with momentum 0.9).
        lr: learning rate after the warm-up.
        weight_decay: not applied to norms, biases, layer scale and other one-dimensional parameters.
        backbone_lr_factor: learning rate of the backbone relative to ``lr``; if not given, the detector's own, 1 for
            Faster R-CNN and 0.1 for Deformable DETR; 1 with ``layer_decay``.
        layer_decay: learning rate of each layer of the backbone relative to the next, e.g. 0.95; ConvNeXt is divided
            into layers as by its authors, others as by timm. It multiplies ``backbone_lr_factor``.
        base_batch_size: total batch that ``lr`` is meant for; the learning rate is scaled in proportion to the total
            batch of the run, over all devices and accumulated batches (default: not scaled).
        schedule: ``cosine`` to zero, ``step`` at the milestones, or ``constant``.
        milestones: epochs at which ``step`` lowers the learning rate.
        step_factor: what ``step`` multiplies it by.
        warmup_steps: optimizer steps of linear warm-up; at most a tenth of the training.
        max_detections: how many detections of an image the metrics count, the best by score; COCO's rule is 100.
        compile: ``torch.compile`` the parts of the detector without boxes (``detector.compiled_parts``) for a fit: its
            first steps, and those of the second and third image size, then take up to a minute on a GPU and minutes on
            a CPU, the others less. Needs Triton on a GPU, a C++ compiler on a CPU.
        log_per_class: log the AP of each class too; in any case it is written to ``val_per_class.csv``, or
            ``test_per_class.csv``, in the folder of the logs or ``default_root_dir``.
        detector: the detector's own arguments.
    """

    is_abstract = True  # in this class only: no checkpoint holds one

    def __init__(
        self,
        num_classes: Count,
        class_names: list[str] | None = None,
        category_ids: list[int] | None = None,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: NonNegative = 1e-4,
        weight_decay: NonNegative = 0.05,
        backbone_lr_factor: NonNegative | None = None,
        layer_decay: Factor | None = None,
        base_batch_size: Count | None = None,
        schedule: Literal["cosine", "step", "constant"] = "cosine",
        milestones: list[NonNegativeInt] | None = None,
        step_factor: Factor = 0.1,
        warmup_steps: NonNegativeInt = 500,
        max_detections: MaxDetections = 100,
        compile: bool = False,
        log_per_class: bool = False,
        **detector: Any,  # the keywords of one callee, build_detector, which checks them
    ) -> None:
        super().__init__()
        check_arguments(DetectionModule.__init__, locals())
        self.remember_arguments(inspect.currentframe())
        for name, values in (("class_names", class_names), ("category_ids", category_ids)):
            if values is not None and len(values) != num_classes:
                raise ArgumentError(f"{name} has {len(values)} entries, but num_classes is {num_classes}")
            if values is not None and len(set(values)) < len(values):
                raise ArgumentError(f"{name} is {values}; each class needs one of its own")
        check_rates(self.hparams)
        self.num_classes = num_classes
        self.class_names = list(class_names) if class_names is not None else [str(i) for i in range(num_classes)]
        self.category_ids = list(category_ids) if category_ids is not None else list(range(num_classes))
        self.detector = self.build_detector(num_classes, **detector)
        self.evaluator = DetectionEvaluator(self.class_names, max_detections)
        self.score_thresholds: list[float | None] | None = None
        self.grey_range: tuple[int, int, bool] | None = None  # of 16-bit grey images; the data module sets it
        self._inference: list[nn.Module] = []  # one, or none; in a list, which hides it from checkpoints

    def build_detector(self, num_classes: int) -> nn.Module:
        """Build the network; the subclass names its arguments."""
        raise NotImplementedError("use a subclass, e.g. FasterRCNNModule")

    def forward(self, images: list[Tensor]) -> list[Detection]:
        """Find objects in images [3, H, W], uint8 or float in 0..1; the module must be in evaluation mode."""
        return self.detect(images)

    def use_for_inference(self, detector: nn.Module | None) -> None:
        """Validate, test and predict with a detector around this module's own; None goes back to its own.

        Checkpoints, hyper-parameters and training know nothing of it.

        >>> from lightning_convnext_det import FasterRCNNModule, TiledDetector
        >>> module = FasterRCNNModule(2, ["cat", "dog"], backbone="test_convnext", min_size=64, max_size=96).eval()
        >>> module.use_for_inference(TiledDetector(module.detector, tile=64))
        >>> with torch.no_grad():
        ...     detections = module([torch.rand(3, 150, 200)])

        Args:
            detector: takes images and gives detections, e.g. a `TiledDetector` or `FusedDetector` of ``self.detector``.
        """
        self._inference = [] if detector is None else [detector]

    def detect(self, images: list[Tensor]) -> list[Detection]:
        """Find objects in images [3, H, W] with the detector of validation, test and prediction."""
        return cast(list[Detection], self.inference_detector(images))

    @property
    def inference_detector(self) -> nn.Module:
        """The detector of validation, test and prediction."""
        return self._inference[0] if self._inference else self.detector

    @property
    def in_chans(self) -> int:
        """Channels of the images that the detector takes; the data module reads them accordingly."""
        return next((part.in_chans for part in self.detector.modules() if isinstance(part, TimmPyramid)), 3)

    # ---- data

    def setup(self, stage: str) -> None:
        """Take the classes of the data, or check that they are those of the detector.

        Raises:
            DataError: if the classes differ.
            ValueError: if the trainer's precision leaves no float32 for boxes and scores.
        """
        precision = str(getattr(self.trainer, "precision", "32-true"))
        if precision.endswith("-true") and precision != "32-true":
            raise ArgumentError(
                f"trainer.precision is '{precision}', but boxes and scores need float32; "
                "use '32-true', 'bf16-mixed' or '16-mixed'"
            )
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        annotated = stage != "predict" or getattr(data, "predict_split", None) is not None
        if annotated and data is not None and hasattr(data, "class_names"):
            names, ids = list(data.class_names), list(data.category_ids)
            if self.hparams.get("class_names") is None and len(names) == self.num_classes:
                self.set_classes(names, ids)
            elif names != self.class_names:
                raise DataError(f"[LCD-D120] {class_difference(self.class_names, names)}")
            self.evaluator.frequencies = list(getattr(data, "frequencies", ()))
        transform = getattr(self.detector, "transform", None)
        if stage == "fit" and transform is not None:
            transform.resize_in_training = not getattr(data, "resizes", False)
        if stage == "fit" and self.hparams.get("compile"):
            compile_parts(self.detector)

    def teardown(self, stage: str) -> None:
        """Let the detector resize by itself again, whatever the data of the fit did."""
        super().teardown(stage)
        transform = getattr(self.detector, "transform", None)
        if stage == "fit" and transform is not None:
            transform.resize_in_training = True

    @property
    def metric_names(self) -> list[str]:
        """The metrics that a validation logs."""
        per_class = [f"map/{name}" for name in self.class_names] if self.hparams.get("log_per_class") else []
        return [f"val/{name}" for name in (*self.evaluator.names, *per_class)]

    def discard_validation(self) -> None:
        """Forget the images of a validation that was cut short; its metrics are then undefined, not wrong."""
        self.evaluator.reset()

    def set_classes(self, names: list[str], ids: list[int]) -> None:
        """Name the classes in order of label, and give the dataset's own ids of them."""
        self.class_names, self.category_ids = names, ids
        self.hparams.update({"class_names": names, "category_ids": ids})
        self.evaluator = DetectionEvaluator(names, self.evaluator.max_detections)

    # ---- steps

    def training_step(self, batch: Batch, batch_idx: int) -> Outcome:
        """Sum the detector's weighted losses; each is logged as ``train/<name>``."""
        images, targets = _annotated(batch)
        reason = None
        try:
            losses: dict[str, Tensor] = self.detector(images, targets)
        except DivergenceError as error:
            # not here, where other ranks would wait for this one: RunGuard ends all of them after the step
            reason = str(error)
            losses = {
                "loss_total": torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * torch.nan
            }
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        self.log_dict({f"train/{name}": x.detach() for name, x in losses.items()}, batch_size=len(images))
        return {"loss": loss, "losses": {name: x.detach() for name, x in losses.items()}, "reason": reason}

    def on_validation_epoch_start(self) -> None:
        """Forget the images of the last epoch, or of the sanity check."""
        self.evaluator.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, list[Detection]]:
        """Collect detections, and return them for callbacks; ranks exchange nothing here."""
        return {"detections": self._evaluate(batch)}

    def on_validation_epoch_end(self) -> None:
        """Log ``val/map`` ... once for the images of all ranks."""
        if self.trainer.sanity_checking:
            return
        self._log_metrics("val")
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.score_thresholds = [chosen.threshold for chosen in self.evaluator.thresholds]

    def on_test_epoch_start(self) -> None:
        """Forget all images."""
        self.evaluator.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, list[Detection]]:
        """Collect detections, and return them for callbacks."""
        return {"detections": self._evaluate(batch)}

    def on_test_epoch_end(self) -> None:
        """Log ``test/map`` ...."""
        self._log_metrics("test")

    def _evaluate(self, batch: Batch) -> list[Detection]:
        images, targets = _annotated(batch)
        if not images:  # a rank without images has one batch without images, see EvaluationLoader
            return []
        detections = self.detect(images)
        self.evaluator.update(detections, targets)
        return detections

    def _log_metrics(self, stage: str) -> None:
        metrics = self.evaluator.compute()
        self.evaluator.reset()
        if self.evaluator.undefined and self.trainer.is_global_zero:
            _logger.warning("[LCD-E001] %s/map is undefined: %s", stage, self.evaluator.undefined)
        # all ranks hold the same numbers already; they are not means over batches
        shown = {f"{stage}/{name}": metrics.pop(name) for name in self.evaluator.names}
        self.log_dict({k: v for k, v in shown.items() if k.endswith(("/map", "/map_50"))}, prog_bar=True, batch_size=1)
        self.log_dict({k: v for k, v in shown.items() if not k.endswith(("/map", "/map_50"))}, batch_size=1)
        if self.hparams.get("log_per_class"):
            self.log_dict({f"{stage}/{name}": value for name, value in metrics.items()}, batch_size=1)
        write_per_class(self, stage, {name: metrics[f"map/{name}"] for name in self.class_names})

    def predict_step(self, batch: Batch | list[Tensor] | Tensor, batch_idx: int) -> list[Detection]:
        """Detect objects in a batch of images, with or without targets; boxes are in pixels of the images given."""
        images, _ = split_batch(batch)
        return self.detect(images)

    # ---- optimisation

    @property
    def network(self) -> nn.Module:
        """The detector."""
        return self.detector

    def find_backbone(self) -> Backbone:
        """Find the timm network in the detector."""
        for name, part in self.detector.named_modules():
            if isinstance(part, TimmPyramid):
                return Backbone(part.name, part.net, f"{name}.net.")
        raise TypeError(f"{type(self.detector).__name__} has no TimmPyramid, which layer_decay needs")

    def is_in_backbone(self, name: str) -> bool:
        """Say whether a parameter learns with ``backbone_lr_factor``: the norms of the maps do, the FPN does not."""
        return name.startswith("backbone.") and not name.startswith("backbone.fpn.")

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint self-contained: its classes, its network, and nothing to fetch when it is loaded."""
        classes = {"class_names": self.class_names, "category_ids": self.category_ids}
        checkpoint["hyper_parameters"] = self.declared_arguments({**classes, **NOTHING_TO_FETCH})
        super().on_save_checkpoint(checkpoint)
        checkpoint[FORMAT] = {"format": 1, **describe_class(type(self)), **classes}
        if self.score_thresholds is not None:
            checkpoint[FORMAT]["score_thresholds"] = self.score_thresholds
        if self.grey_range is not None:
            checkpoint[FORMAT]["grey_range"] = list(self.grey_range)
        if not is_own(type(self)) and (arguments := self._detector_arguments()) is not None:
            checkpoint[FORMAT]["arguments"] = arguments

    def _detector_arguments(self) -> dict[str, Any] | None:
        """The arguments with which our own class makes the detector of a user's subclass; None if it cannot."""
        base = cast(type[DetectionModule], own_base(type(self)))
        if type(self).build_detector is not base.build_detector or not is_own(type(self.detector)):
            return None
        classes = {"class_names": self.class_names, "category_ids": self.category_ids}
        try:
            return {k: plain(v, k) for k, v in {**self.own_arguments, **classes, **NOTHING_TO_FETCH}.items()}
        except TypeError:  # of a kind that no checkpoint can hold
            return None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that were trained on other classes, or belong to another network.

        Of a user's subclass this package's own modules evaluate the detector; only the subclass goes on training it.
        """
        section = checkpoint.get(FORMAT, {})
        if is_own(type(self)) and "arguments" in section and self.trainer.state.fn != "fit":
            weights = checkpoint["state_dict"].items()
            checkpoint["state_dict"] = {name: tensor for name, tensor in weights if name.startswith("detector.")}
        declared = {**section, **checkpoint.get("hyper_parameters", {})}
        names = declared.get("class_names")
        if names is not None and list(names) != self.class_names:
            raise CheckpointError(f"[LCD-D120] {class_difference(list(names), self.class_names)}")
        super().on_load_checkpoint(checkpoint)
        self.score_thresholds = read_score_thresholds(checkpoint.get(FORMAT), self.num_classes)
        self.grey_range = read_grey_range(checkpoint.get(FORMAT)) or self.grey_range


def _annotated(batch: object) -> Batch:
    images, targets = split_batch(batch)
    if targets is None:
        raise ArgumentError("the batch has images but no targets; give (images, targets), e.g. by collate_fn=collate")
    return images, targets
