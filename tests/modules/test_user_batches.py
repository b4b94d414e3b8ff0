"""Training, validation, test and prediction on a user's own dataset in torchvision's form."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.training import create_batches, create_module, create_trainer

# Lightning's advice about the number of workers and of steps per epoch
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .*dataloader. does not have many workers", "ignore:The number of training"
)


class PedestrianDataset(Dataset):
    """As in torchvision's finetuning tutorial: masks, one-element image_id, iscrowd, area; the second has no boxes."""

    def __init__(self) -> None:
        self.samples = [(i, t) for images, targets in create_batches(3) for i, t in zip(images, targets, strict=True)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = self.samples[index]
        boxes = target["boxes"].long() if index != 1 else torch.zeros(0, 4)
        count = len(boxes)
        return image / 255, {
            "boxes": boxes,
            "labels": torch.ones((count,), dtype=torch.int64),
            "masks": torch.zeros(count, 64, 72, dtype=torch.uint8),
            "image_id": torch.tensor([index]),
            "area": torch.full((count,), 28.0 * 28.0),
            "iscrowd": torch.zeros((count,), dtype=torch.int64),
        }


def without(*names: str):
    return lambda batch: ([i for i, _ in batch], [{k: t[k] for k in t if k not in names} for _, t in batch])


COLLATE = {
    "torchvision's": lambda batch: tuple(zip(*batch, strict=True)),
    "stacked": lambda batch: (torch.stack([i for i, _ in batch]), [t for _, t in batch]),
    "pairs": list,
    "without ids": without("image_id", "area", "iscrowd", "masks"),
}


@pytest.mark.parametrize("name", COLLATE)
def test_trainer__own_loader_in_every_stage(name: str, tmp_path: Path) -> None:
    module, data = create_module(2), DataLoader(PedestrianDataset(), batch_size=2, collate_fn=COLLATE[name])
    trainer = create_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(module, data, data)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert 0 <= trainer.validate(module, data, verbose=False)[0]["val/map"] <= 1
    assert 0 <= trainer.test(module, data, verbose=False)[0]["test/map"] <= 1
    assert [len(batch) for batch in trainer.predict(module, data)] == [2, 2, 2]


@pytest.mark.parametrize(
    "data",
    [
        DataLoader([torch.zeros(3, 64, 72)] * 3, batch_size=2),
        DataLoader([torch.zeros(3, 64, 72)] * 3, batch_size=2, collate_fn=list),
        DataLoader(TensorDataset(torch.zeros(3, 3, 64, 72)), batch_size=2),
    ],
    ids=["stacked", "list", "TensorDataset"],
)
def test_predict__images_alone(data: DataLoader, tmp_path: Path) -> None:
    trainer = create_trainer(tmp_path, enable_checkpointing=False)
    assert [len(batch) for batch in trainer.predict(create_module(2), data)] == [2, 1]


def test_fit__images_alone_are_refused(tmp_path: Path) -> None:
    data = DataLoader([torch.zeros(3, 64, 72)] * 2, batch_size=2)
    with pytest.raises(ValueError, match="images but no targets"):
        create_trainer(tmp_path, enable_checkpointing=False).fit(create_module(2), data, data)
