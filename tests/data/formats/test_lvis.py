"""LVIS's lists of classes and frequencies, from the file to the targets of a batch."""

import json
from pathlib import Path

import pytest
import torch

from lightning_convnext_det.data.annotations import LabelLists
from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.formats.cache import load_annotations, save_annotations
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import DataError
from tests.training import create_module, create_trainer

NEGATIVE, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"


def edit(root: Path, change: object) -> Path:
    for file in root.rglob("instances_*.json"):
        content = json.loads(file.read_text())
        change(content)  # type: ignore[operator]
        file.write_text(json.dumps(content))
    return root


def as_lvis(content: dict[str, list]) -> None:
    """The first image names classes; like LVIS's images, it has an address and no file_name."""
    for number, image in enumerate(content["images"]):
        image[NEGATIVE], image[NOT_EXHAUSTIVE] = ([2, 99, 1], [3]) if number == 0 else ([], [])
        image["coco_url"] = f"http://images.example/{image.pop('file_name')}"
    for category in content["categories"]:
        category["frequency"] = "rcf"[category["id"] % 3]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return edit(write_synthetic_coco(tmp_path / "shapes", num_train=2, num_val=3), as_lvis)


def test_read_coco__keeps_the_lists_of_lvis(root: Path) -> None:
    data = DetectionDataModule(str(root), batch_size=3, num_workers=0)
    table = data.annotations("val")
    assert table is not None
    labels = {category: label for label, category in enumerate(table.category_ids)}
    assert data.frequencies == [{"r": "rare", "c": "common", "f": "frequent"}["rcf"[i % 3]] for i in table.category_ids]
    data.setup("validate")
    _, targets = next(iter(data.val_dataloader()))
    assert [target["negative_labels"].tolist() for target in targets] == [[labels[2], labels[1]], [], []]
    assert [target["not_exhaustive_labels"].tolist() for target in targets] == [[labels[3]], [], []]
    assert targets[1]["negative_labels"].dtype == torch.int64


def test_save_annotations__keeps_the_lists(root: Path, tmp_path: Path) -> None:
    table = DetectionDataModule(str(root), num_workers=0).annotations("val")
    assert table is not None
    save_annotations(table, tmp_path / "cached", table.image_root.stat().st_mtime_ns)
    cached = load_annotations(tmp_path / "cached")
    assert cached is not None
    assert cached.federated is not None
    assert table.federated is not None
    assert cached.federated.frequencies == table.federated.frequencies
    assert [cached.label_lists(i)["negative_labels"].tolist() for i in range(3)] == [[1, 0], [], []]


def test_select_classes__relabels_the_lists(root: Path) -> None:
    names = DetectionDataModule(str(root), num_workers=0).class_names
    data = DetectionDataModule(str(root), num_workers=0, classes=[names[2], names[0]])
    table = data.annotations("val")
    assert table is not None
    lists = table.label_lists(0)
    assert lists["negative_labels"].tolist() == [1]  # category 1; 2 is not among the classes
    assert lists["not_exhaustive_labels"].tolist() == [0]
    assert data.frequencies == ["rare", "common"]


def test_read_coco__without_negative_classes_is_not_federated(tmp_path: Path) -> None:
    data = DetectionDataModule(str(write_synthetic_coco(tmp_path / "shapes", num_train=2, num_val=2)), num_workers=0)
    table = data.annotations("val")
    assert table is not None
    assert table.federated is None
    assert table.label_lists(0) == {}
    assert data.frequencies == []


def test_read_coco__refuses_lists_that_are_none(root: Path) -> None:
    edit(root, lambda content: content["images"][0].update({NEGATIVE: "all"}))
    with pytest.raises(DataError, match=r"LCD-D002.*neg_category_ids: expected a list of category ids, found all"):
        DetectionDataModule(str(root), num_workers=0).annotations("val")


def test_label_lists__find() -> None:
    lists = LabelLists.of({7: [1, 0], 3: []})
    found = [lists.find(image_id) for image_id in (3, 7, 5, 9)]
    assert [None if one is None else one.tolist() for one in found] == [[], [1, 0], None, None]


@pytest.mark.heavy
def test_validate__logs_the_metrics_of_frequencies(root: Path, tmp_path: Path) -> None:
    data = DetectionDataModule(str(root), num_workers=0)
    module = create_module(len(data.class_names))
    metrics = create_trainer(tmp_path).validate(module, data, verbose=False)[0]
    assert {"val/map_rare", "val/map_common", "val/map_frequent"} < metrics.keys()
