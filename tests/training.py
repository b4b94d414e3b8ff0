import lightning.pytorch as pl
import torch

from lightning_convnext_det.modules import FasterRCNNModule
from lightning_convnext_det.modules.detection import Batch

TINY = {
    "backbone": "test_convnext",
    "min_size": 64,
    "max_size": 96,
    "fpn_channels": 32,
    "box_head_features": 32,
    "rpn_post_nms_top_n": (100, 1000),
    "box_batch_size_per_image": 32,
}


def create_module(num_classes: int = 2, **options: object) -> FasterRCNNModule:
    return FasterRCNNModule(num_classes, **{**TINY, **options})


def create_batches(count: int) -> list[Batch]:
    """Batches of two images, each with a bright square of class 0 or a dark one of class 1."""
    generator = torch.Generator().manual_seed(1)
    batches: list[Batch] = []
    for b in range(count):
        images, targets = [], []
        for i in range(2):
            x, y = (int(v) for v in torch.randint(4, 30, (2,), generator=generator))
            image = torch.full((3, 64, 72), 128, dtype=torch.uint8)
            image[:, y : y + 28, x : x + 28] = 255 if i else 0
            box = torch.tensor([[x, y, x + 28, y + 28]], dtype=torch.float32)
            label = torch.tensor([0 if i else 1])
            images.append(image)
            targets.append({"boxes": box, "labels": label, "image_id": 2 * b + i, "file_name": f"{b}_{i}.png"})
        batches.append((images, targets))
    return batches


def create_trainer(folder: object, **options: object) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**defaults, **options})
