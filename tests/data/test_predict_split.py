"""Prediction of a split: pycocotools on predictions.json gives what `validate` logs."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from lightning_convnext_det.callbacks.prediction_writer import PredictionWriter
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.errors import DataError
from lightning_convnext_det.metrics.coco_summary import METRICS
from lightning_convnext_det.modules import FasterRCNNModule
from lightning_convnext_det.types import Detection
from tests.training import TINY, create_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader. does not have many workers")


class Jittered(nn.Module):
    """Finds the annotated boxes, shifted, with scores that are often equal; knows an image by its pixels."""

    def __init__(self, data: DetectionDataModule) -> None:
        super().__init__()
        self.known = {}
        generator = torch.Generator().manual_seed(0)
        for images, targets in data.val_dataloader():
            for image, target in zip(images, targets, strict=True):
                count = len(target["boxes"])
                boxes = target["boxes"] + 4 * torch.randn(count, 4, generator=generator)
                boxes = torch.cat([boxes[:, :2], torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)], dim=1)
                scores = torch.randint(1, 9, (count,), generator=generator) / 10
                self.known[int(image.long().sum())] = (boxes, target["labels"], scores)

    def forward(self, images: list[Tensor]) -> list[Detection]:
        found = [self.known[int(image.long().sum())] for image in images]
        return [Detection(boxes=boxes, labels=labels, scores=scores) for boxes, labels, scores in found]


def pycocotools_stats(annotations: Path, predictions: Path) -> list[float]:
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(predictions)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return list(evaluation.stats)


@pytest.mark.heavy
@pytest.mark.parametrize("detector", ["random weights", "jittered boxes"])
def test_predict_split__pycocotools_gives_what_validate_logs(detector: str, shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "coco_mini"
    data = DetectionDataModule(str(root), batch_size=8, num_workers=0, predict_split="val")
    module = FasterRCNNModule(80, data.class_names, data.category_ids, **TINY, score_threshold=0.0)
    if detector == "jittered boxes":
        module.detector = Jittered(data)
    writer = PredictionWriter(tmp_path, draw=False)
    trainer = create_trainer(tmp_path, enable_checkpointing=False, callbacks=[writer])
    (logged,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data, return_predictions=False)
    file = root / "annotations" / "instances_val2017.json"
    ids = {image["id"] for image in json.loads(file.read_text())["images"]}
    records = json.loads((tmp_path / "predictions.json").read_text())
    assert {record["image_id"] for record in records} <= ids
    assert len(records) > 100
    for name, value in zip(METRICS, pycocotools_stats(file, tmp_path / "predictions.json"), strict=True):
        assert logged[f"val/{name}"] == pytest.approx(value, abs=1e-6), name
    if detector == "jittered boxes":
        assert logged["val/map"] > 0.2


def test_predict_split__classes_must_be_those_of_the_module(shared_data: Path, tmp_path: Path) -> None:
    data = DetectionDataModule(str(shared_data / "coco_mini"), num_workers=0, predict_split="val")
    module = FasterRCNNModule(2, ["cat", "dog"], **TINY)
    with pytest.raises(DataError, match="LCD-D120"):
        create_trainer(tmp_path, enable_checkpointing=False).predict(module, datamodule=data)
