"""What a user does in the first hour: torchvision's tutorial dataset unchanged, and several trainings in a notebook."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from lightning_convnext_det.metrics.coco_summary import METRICS
from lightning_convnext_det.modules import FasterRCNNModule, load_module
from lightning_convnext_det.types import Detection
from tests.training import TINY, create_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader. does not have many workers")


class Pedestrians(Dataset[tuple[Tensor, dict[str, Any]]]):
    """A dataset as torchvision's tutorial on object detection has it: one mask file for each image."""

    def __init__(self, root: Path) -> None:
        self.images, self.masks = (sorted((root / name).iterdir()) for name in ("PNGImages", "PedMasks"))
        self.transforms = v2.Compose([v2.ToDtype(torch.float, scale=True), v2.ToPureTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        # not torchvision.io.decode_image, as the tutorial has it: torchvision 0.29 warns that it goes
        with Image.open(self.images[index]) as image_file, Image.open(self.masks[index]) as mask_file:
            image, mask = (v2.functional.pil_to_tensor(file) for file in (image_file, mask_file))
        ids = torch.unique(mask)[1:]
        masks = (mask == ids[:, None, None]).to(torch.uint8)
        boxes = masks_to_boxes(masks)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:]),
            "masks": tv_tensors.Mask(masks),
            "labels": torch.ones(len(ids), dtype=torch.int64),
            "image_id": torch.tensor([index + 10]),
            "area": (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0]),
            "iscrowd": torch.tensor([0, 0, 1][: len(ids)], dtype=torch.int64),
        }
        transformed: tuple[Tensor, dict[str, Any]] = self.transforms(tv_tensors.Image(image), target)
        return transformed


def write_pedestrians(root: Path, count: int) -> Pedestrians:
    """Noise with two or three rectangles each, of 20 to 40 pixels."""
    rng = np.random.default_rng(0)
    for name in ("PNGImages", "PedMasks"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        image, mask = rng.integers(0, 256, (80, 96, 3), np.uint8), np.zeros((80, 96), np.uint8)
        for k in range(2 + i % 2):
            height, width = rng.integers(20, 40, 2)
            top, left = 2 + rng.integers(0, 36), 2 + 30 * k
            mask[top : top + height, left : left + min(width, 28)] = k + 1
            image[mask == k + 1] = 60 * k
        Image.fromarray(image).save(root / "PNGImages" / f"{i}.png")
        Image.fromarray(mask).save(root / "PedMasks" / f"{i}.png")
    return Pedestrians(root)


class Jittered(nn.Module):
    """Finds the annotated boxes, shifted, with scores that are often equal; knows an image by its pixels."""

    def __init__(self, dataset: Pedestrians) -> None:
        super().__init__()
        self.known = {}
        generator = torch.Generator().manual_seed(0)
        for image, target in dataset:
            boxes = target["boxes"] + 3 * torch.randn(target["boxes"].shape, generator=generator)
            scores = torch.randint(1, 9, (len(boxes),), generator=generator) / 10
            self.known[image.double().sum().item()] = (boxes, target["labels"], scores)

    def forward(self, images: list[Tensor]) -> list[Detection]:
        found = [self.known[image.double().sum().item()] for image in images]
        return [Detection(boxes=boxes, labels=labels, scores=scores) for boxes, labels, scores in found]


def pycocotools_stats(dataset: Pedestrians, detections: list[Detection]) -> list[float]:
    def sides(boxes: Tensor) -> list[list[float]]:
        return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).double().tolist()

    targets = [target for _, target in dataset]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": int(target["image_id"])} for target in targets],
        "categories": [{"id": 0}, {"id": 1}],
        "annotations": [
            {"id": 100 * i + k + 1, "image_id": int(t["image_id"]), "category_id": 1, "bbox": box, "area": float(area),
             "iscrowd": int(crowd)}
            for i, t in enumerate(targets)
            for k, (box, area, crowd) in enumerate(zip(sides(t["boxes"]), t["area"], t["iscrowd"], strict=True))
        ],
    }  # fmt: skip
    rows = [
        {"image_id": int(target["image_id"]), "category_id": 1, "bbox": box, "score": float(score)}
        for target, found in zip(targets, detections, strict=True)
        for box, score in zip(sides(found["boxes"]), found["scores"], strict=True)
    ]
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return list(evaluation.stats)


@pytest.mark.heavy
def test_tutorial_dataset__trained_validated_and_predicted_unchanged(tmp_path: Path) -> None:
    dataset = write_pedestrians(tmp_path / "PennFudanPed", 6)
    loader = DataLoader(dataset, batch_size=2, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    module = FasterRCNNModule(2, ["background", "person"], **TINY)
    trainer = create_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = trainer.predict(load_module(tmp_path / "a.ckpt"), loader)
    assert [len(batch) for batch in found] == [2, 2, 2]

    module.detector = Jittered(dataset)
    (logged,) = trainer.validate(module, loader, verbose=False)
    detections = [one for batch in trainer.predict(module, loader) for one in batch]
    wanted = pycocotools_stats(dataset, detections)
    assert 0.1 < wanted[0] < 0.9
    for name, value in zip(METRICS, wanted, strict=True):
        assert logged[f"val/{name}"] == pytest.approx(value, abs=1e-6, nan_ok=True) or value == -1, name


NOTEBOOK = [
    """
import warnings; warnings.filterwarnings("ignore", "The .*dataloader")
import torch
from lightning.pytorch import Trainer
from lightning_convnext_det import DetectionDataModule, FasterRCNNModule, Predictor
from lightning_convnext_det.data.synthetic import write_synthetic_coco

root = write_synthetic_coco("shapes", num_train=4, num_val=2)
data = DetectionDataModule(str(root), batch_size=2, num_workers=0)
small = dict(backbone="test_convnext", min_size=64, max_size=96, fpn_channels=32, box_head_features=32)
options = dict(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
module = FasterRCNNModule(data.num_classes, data.class_names, data.category_ids, **small)
trainer = Trainer(**options)
trainer.fit(module, data)
trainer.save_checkpoint("a.ckpt")
""",
    'module = FasterRCNNModule.load_from_checkpoint("a.ckpt")\nTrainer(**options).fit(module, data)',
    'found = Trainer(**options).predict(module, DetectionDataModule(predict=str(root / "val"), num_workers=0))',
    "before = [p.clone() for p in module.parameters()]\nTrainer(**options).fit(module, data)",
    "moved = any(not torch.equal(a, b) for a, b in zip(before, module.parameters()))\n"
    "print(sum(map(len, found)), module.training, moved)",
    'Predictor(module.detector, module.class_names)(str(next((root / "val").iterdir())))',
]


@pytest.mark.heavy
# the kernel's client binds its sockets in a way that tornado and zmq warn of on some platforms
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_notebook__fit_load_fit_predict_fit(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in NOTEBOOK])
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert "2 True True" in "".join(output.get("text", "") for output in outputs)
    assert "Prediction of " in outputs[-1]["data"]["text/plain"]
