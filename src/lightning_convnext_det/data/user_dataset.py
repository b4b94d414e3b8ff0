"""A user's own map-style datasets in the form that loaders, samplers and evaluation take."""

from collections.abc import Mapping, Sequence
from typing import cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from lightning_convnext_det.data.batch import Sample
from lightning_convnext_det.data.sampler import Key
from lightning_convnext_det.data.seeding import SeededDataset, seeded
from lightning_convnext_det.data.splits import STAGES, Stage
from lightning_convnext_det.data.transforms import SampleTransform, as_corners, transform_sample
from lightning_convnext_det.errors import ArgumentError, DataError
from lightning_convnext_det.types import Target, image_id_of


class UserDataset(SeededDataset):
    """Wraps a map-style dataset of ``(image, target)``, as in torchvision's detection tutorials.

    The image is a tensor [C, H, W], uint8 or float in 0..1, or a Pillow image. The target has ``boxes`` [N, 4], corners
    in pixels or ``tv_tensors.BoundingBoxes`` of any format, and ``labels`` [N] from 0; ``image_id``, ``iscrowd``,
    ``area`` and ``file_name`` if the dataset has them. Other entries, such as masks, are dropped.

    >>> target = {"boxes": torch.tensor([[2, 2, 8, 6]]), "labels": torch.tensor([0])}
    >>> image, target = UserDataset([(torch.zeros(3, 16, 24), target)], name="train", training=True)[0]
    >>> target["boxes"].dtype, target["image_id"], target["file_name"]
    (torch.float32, 0, 'train[0]')

    Indexed by ``index`` or ``(epoch, index)``, or by a list of either. The random numbers that the dataset and the
    transforms draw from torch, NumPy and Python depend on seed, epoch and index alone.

    Args:
        dataset: with ``__len__`` and ``__getitem__``.
        transforms: applied to image and target after the dataset's own; None for none.
        name: for messages.
        training: leave out crowd boxes. Otherwise targets keep ``iscrowd``, ``area``, ``negative_labels`` and
            ``not_exhaustive_labels``.
        seed: of the random numbers.
    """

    def __init__(
        self,
        dataset: Dataset,  # type: ignore[type-arg]  # jsonargparse builds no parametrised class
        transforms: SampleTransform | None = None,
        *,
        name: str,
        training: bool,
        seed: int = 0,
    ) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise ArgumentError(f"datasets['{name}'] is a {type(dataset).__name__}; it needs an index and a length")
        self.dataset = dataset
        self.transforms = transforms
        self.name = name
        self.training = training
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def landscape(self) -> NDArray[np.bool_]:
        """Whether each image is at least as wide as it is high, bool [N]; by ``get_height_and_width``, else all are.

        torchvision's references group images by this method (references/detection/group_by_aspect_ratio.py).
        """
        sizes = getattr(self.dataset, "get_height_and_width", None)
        if sizes is None:
            return np.ones(len(self), np.bool_)
        return np.array([width >= height for height, width in map(sizes, range(len(self)))], np.bool_)

    @overload
    def __getitem__(self, key: int | Key) -> Sample: ...
    @overload
    def __getitem__(self, key: list[int] | list[Key]) -> list[Sample]: ...
    def __getitem__(self, key: int | Key | list[int] | list[Key]) -> Sample | list[Sample]:
        """Get a sample of the dataset and transform it, or several.

        Raises:
            DataError: if it is not an image and a target.
        """
        if isinstance(key, list):
            return [self[one] for one in key]
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with seeded(self.seed, epoch, index):
            image, target = self._converted(self.dataset[index], index)
            if self.transforms is None:
                return image, target
            return transform_sample(self.transforms, image, target)

    def _converted(self, sample: object, index: int) -> Sample:
        name = f"{self.name}[{index}]"
        if not (isinstance(sample, tuple | list) and len(sample) == 2 and isinstance(sample[1], Mapping)):
            raise DataError(f"[LCD-D160] {name} is a {type(sample).__name__}; expected (image, target)")
        image, given = sample
        if isinstance(image, Image.Image):
            image = F.pil_to_tensor(image)
        if not isinstance(image, Tensor) or image.dim() != 3:
            what = list(image.shape) if isinstance(image, Tensor) else f"a {type(image).__name__}"
            raise DataError(f"[LCD-D160] the image of {name} is {what}; expected a tensor [C, H, W] or a Pillow image")
        if missing := {"boxes", "labels"} - given.keys():
            raise DataError(f"[LCD-D160] the target of {name} has no {' and no '.join(sorted(missing))}")
        return image.as_subclass(Tensor), self._target(given, image, name, index)

    def _target(self, given: Mapping[str, object], image: Tensor, name: str, index: int) -> Target:
        boxes = as_corners(torch.as_tensor(given["boxes"]), image).as_subclass(Tensor)
        fields = {"boxes": boxes.to(torch.float32)}
        for key, dtype in (("labels", torch.int64), ("iscrowd", torch.bool), ("area", torch.float32)):
            if key in given:
                values = torch.as_tensor(given[key])
                if key == "labels" and len(boxes) and values.is_floating_point():
                    raise DataError(f"[LCD-D160] the labels of {name} are {values.dtype}; expected integers from 0")
                fields[key] = values.as_subclass(Tensor).to(dtype).reshape(-1)
        if wrong := [key for key, values in fields.items() if len(values) != len(fields["boxes"])]:
            counts = f"{len(fields['boxes'])} boxes but {len(fields[wrong[0]])} {wrong[0]}"
            raise DataError(f"[LCD-D160] the target of {name} has {counts}")
        if self.training:
            kept = ~fields.get("iscrowd", torch.zeros(len(boxes), dtype=torch.bool))
            fields = {key: fields[key][kept] for key in ("boxes", "labels")}
        else:
            lists = {key: given[key] for key in ("negative_labels", "not_exhaustive_labels") if key in given}
            fields |= {key: torch.as_tensor(values).to(torch.int64).reshape(-1) for key, values in lists.items()}
        image_id = image_id_of(given)
        names = {"image_id": index if image_id is None else image_id, "file_name": str(given.get("file_name", name))}
        return cast(Target, {**fields, **names})


class UserSplits:
    """The training, validation and test datasets of a user, and their classes.

    Args:
        datasets: map-style datasets by stage.
        class_names: in order of label; None for the attribute ``class_names`` or ``classes`` of a dataset.

    Raises:
        ArgumentError: if a stage is not one of train, val and test.
    """

    def __init__(
        self,
        datasets: Mapping[Stage, Dataset],  # type: ignore[type-arg]  # as above
        class_names: Sequence[str] | None,
    ) -> None:
        if unknown := [stage for stage in datasets if stage not in STAGES]:
            raise ArgumentError(f"datasets has '{unknown[0]}'; its keys are {', '.join(STAGES)}")
        self.datasets = datasets
        self._class_names = class_names

    def class_table(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Class names in order of label, and the labels, which serve as category ids.

        Raises:
            DataError: if neither an argument nor a dataset names the classes.
        """
        names = self._class_names
        for stage in STAGES:
            dataset = self.datasets.get(stage)
            names = names or getattr(dataset, "class_names", None) or getattr(dataset, "classes", None)
        if not names:
            raise DataError(
                "[LCD-D161] the classes of data.datasets are not known: give data.class_names in order of label, "
                "or the dataset an attribute class_names"
            )
        return tuple(map(str, names)), tuple(range(len(names)))

    def dataset(
        self, stage: Stage, transforms: SampleTransform | None, training: bool, seed: int = 0
    ) -> UserDataset | None:
        """The dataset of a stage; testing falls back to validation, and None stands for no validation.

        Raises:
            DataError: if there is no dataset for the stage.
        """
        if stage == "test" and "test" not in self.datasets:
            stage = "val"
        if stage not in self.datasets:
            if stage == "val":
                return None
            raise DataError(f"[LCD-D131] data.datasets has no '{stage}'")
        dataset = UserDataset(self.datasets[stage], transforms, name=stage, training=training, seed=seed)
        if not len(dataset):
            raise DataError(f"[LCD-D160] data.datasets: '{stage}' is empty")
        return dataset
