import json
import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.subset import count_shared
from lightning_convnext_det.data.synthetic import CLASS_NAMES, write_synthetic_coco
from lightning_convnext_det.errors import DataError
from tests.data import recorder
from tests.data.recorder import Recorder, SaveAndStop, Seen, make_trainer
from tests.processes import run_on_two_ranks


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 training, 5 validation and 3 test images."""
    return write_synthetic_coco(tmp_path_factory.mktemp("coco"), 11, 5, 3, seed=1, min_side=32, max_side=48)


def data_module(root: Path, **options: object) -> DetectionDataModule:
    return DetectionDataModule(str(root), **{"batch_size": 2, "num_workers": 0, "train_transforms": "none", **options})


def ids(seen: Seen, key: str) -> list[int]:
    return [image_id for batch in seen[key] for image_id in batch]


def test_properties__readable_right_after_construction(coco: Path) -> None:
    data = data_module(coco)
    assert data.num_classes == 5
    assert data.class_names == list(CLASS_NAMES)
    assert data.category_ids == [1, 2, 3, 4, 5]
    assert not data.resizes
    assert data_module(coco, train_transforms="multiscale").resizes
    assert data_module(coco, train_transforms="lsj").resizes


def test_fit__each_image_once_per_epoch_in_another_order(coco: Path, tmp_path: Path) -> None:
    model = Recorder()
    make_trainer(tmp_path).fit(model, datamodule=data_module(coco))
    for epoch in (0, 1):
        assert sorted(ids(model.seen, f"train{epoch}")) == list(range(1, 12))
        assert [len(batch) for batch in model.seen[f"train{epoch}"]] == [2] * 5 + [1]
        assert ids(model.seen, f"val{epoch}") == [1, 2, 3, 4, 5]
    assert model.seen["train0"] != model.seen["train1"]


def test_fit__limit_train_batches_takes_the_first_of_each_epoch(coco: Path, tmp_path: Path) -> None:
    whole, limited = Recorder(), Recorder()
    make_trainer(tmp_path).fit(whole, datamodule=data_module(coco))
    make_trainer(tmp_path, limit_train_batches=2).fit(limited, datamodule=data_module(coco, persistent_workers=False))
    for epoch in ("train0", "train1"):
        assert limited.seen[epoch] == whole.seen[epoch][:2]


@pytest.mark.heavy
def test_fit__limit_train_batches_with_persistent_workers(coco: Path, tmp_path: Path) -> None:
    alone, helped = Recorder(), Recorder()
    make_trainer(tmp_path, limit_train_batches=2).fit(alone, datamodule=data_module(coco))
    make_trainer(tmp_path, limit_train_batches=2).fit(helped, datamodule=data_module(coco, num_workers=2))
    assert helped.seen == alone.seen


def test_fit__overfit_batches_repeats_the_same_images(coco: Path, tmp_path: Path) -> None:
    model = Recorder()
    make_trainer(tmp_path, overfit_batches=2).fit(model, datamodule=data_module(coco))
    assert model.seen["train0"] == model.seen["train1"]
    assert len(ids(model.seen, "train0")) == 4


def test_fit__fast_dev_run(coco: Path, tmp_path: Path) -> None:
    model = Recorder()
    make_trainer(tmp_path, fast_dev_run=True).fit(model, datamodule=data_module(coco))
    assert [len(model.seen[key]) for key in ("train0", "val0")] == [1, 1]


@pytest.mark.heavy
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 6, 9], ids=["mid-first", "late-first", "between", "mid-second"])
def test_fit__resumes_with_the_next_image(coco: Path, tmp_path: Path, num_workers: int, stop: int) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    make_trainer(tmp_path, max_epochs=3, limit_val_batches=0).fit(whole, datamodule=data_module(coco))
    data = data_module(coco, num_workers=num_workers)
    options = {"max_epochs": 3, "limit_val_batches": 0}
    checkpoint = tmp_path / "a.ckpt"
    make_trainer(tmp_path, **options, callbacks=[SaveAndStop(checkpoint, stop)]).fit(first, datamodule=data)
    data = data_module(coco, num_workers=num_workers)
    make_trainer(tmp_path, **options).fit(second, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    joined = [batch for seen in (first.seen, second.seen) for key in sorted(seen) for batch in seen[key]]
    assert joined == [batch for key in sorted(whole.seen) for batch in whole.seen[key]]
    assert sum(len(batch) for batch in joined) == 33


@pytest.mark.heavy
@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
def test_fit__resumes_with_the_next_epoch(coco: Path, tmp_path: Path, hook: str) -> None:
    whole, second = Recorder(), Recorder()
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, "limit_train_batches": 4}
    make_trainer(tmp_path, **options).fit(whole, datamodule=data_module(coco))
    checkpoint = tmp_path / "a.ckpt"
    saving = make_trainer(tmp_path, **options, callbacks=[SaveAndStop(checkpoint, 4, hook)])
    saving.fit(Recorder(), datamodule=data_module(coco, num_workers=2))
    data = data_module(coco, num_workers=2)
    make_trainer(tmp_path, **options).fit(second, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    for epoch in ("train1", "train2"):
        assert second.seen[epoch] == whole.seen[epoch]
    assert "train0" not in second.seen


def test_fit__data_paths_are_not_in_the_checkpoint(coco: Path, tmp_path: Path) -> None:
    data = data_module(coco, predict=str(coco / "val"))
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Recorder(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert str(coco).encode() not in (tmp_path / "a.ckpt").read_bytes()
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]


def test_test__test_split_else_validation(coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Recorder()
    make_trainer(tmp_path).test(model, datamodule=data_module(coco), verbose=False)
    assert model.seen == {"test0": [[1, 2], [3]]}
    root = copy_without(coco, tmp_path / "set", "test")
    data = data_module(root)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            fallen_back = Recorder()
            make_trainer(tmp_path).test(fallen_back, datamodule=data, verbose=False)
    assert ids(fallen_back.seen, "test0") == [1, 2, 3, 4, 5]
    assert [r.getMessage() for r in caplog.records if "no test split" in r.getMessage()] == [
        f"no test split in {root}: testing on the 5 validation images"
    ]


def copy_without(coco: Path, root: Path, *splits: str) -> Path:
    shutil.copytree(coco, root)
    for split in splits:
        (root / "annotations" / f"instances_{split}.json").unlink()
    return root


def test_val__held_out_where_there_is_no_split(coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = copy_without(coco, tmp_path / "set", "val", "test")
    with caplog.at_level(logging.WARNING):
        data = data_module(root, val_fraction=0.3)
        train, val = data.annotations("train"), data.annotations("val")
    assert len(val) == 3
    assert sorted([*train.image_ids, *val.image_ids]) == list(range(1, 12))
    assert "3 of the 11 images of 'train' are held out for validation" in caplog.text
    again = data_module(root, val_fraction=0.3).annotations("val")
    assert again.image_ids.tolist() == val.image_ids.tolist()
    assert data_module(root, val_fraction=0.3, seed=1).annotations("val").image_ids.tolist() != val.image_ids.tolist()


def test_val__trainval_keeps_a_part_for_validation(shared_data: Path) -> None:
    data = data_module(shared_data / "bccd" / "BCCD", train="trainval")
    assert [len(data.annotations(stage)) for stage in ("train", "val", "test")] == [263, 29, 72]
    assert count_shared(data.annotations("train"), data.annotations("val")) == 0


def test_train__difficult_objects_are_learnt_from_but_not_evaluated(shared_data: Path) -> None:
    root = shared_data / "voc2012_mini"
    plain, difficult = data_module(root), data_module(root, train_on_difficult=True)
    assert plain.annotations("train").crowd.sum() == 30
    assert difficult.annotations("train").crowd.sum() == 0
    assert difficult.annotations("val").crowd.sum() == plain.annotations("val").crowd.sum() > 0


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("root", "num_classes", "counts"),
    [("bccd/BCCD", 3, [205, 87, 72]), ("coco_mini", 80, [128, 50, 50]), ("voc2012_mini", 20, [67, 33, 33])],
)
def test_loaders__real_images(shared_data: Path, root: str, num_classes: int, counts: list[int]) -> None:
    data = data_module(shared_data / root, batch_size=8, train_transforms="multiscale", sizes=(96, 128))
    assert data.num_classes == num_classes
    assert [len(data.annotations(stage)) for stage in ("train", "val", "test")] == counts
    for loader in (data.train_dataloader(), data.val_dataloader()):
        images, targets = next(iter(loader))
        assert len(images) == len(targets) == 8
        for image, target in zip(images, targets, strict=True):
            height, width = image.shape[-2:]
            assert (target["boxes"] <= torch.tensor([width, height, width, height])).all()
            assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
            assert (target["labels"] < num_classes).all()


def test_loaders__global_generator_is_left(coco: Path) -> None:
    data = data_module(coco, predict=str(coco / "val"))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        before = torch.random.get_rng_state()
        next(iter(loader))
        assert torch.equal(torch.random.get_rng_state(), before)


def test_val__switched_off(coco: Path, tmp_path: Path) -> None:
    root = copy_without(coco, tmp_path / "set", "val", "test")
    data = data_module(root, val_fraction=0.0)
    assert data.val_dataloader() == []
    model = Recorder()
    with pytest.warns(UserWarning, match="Total length of `list` across ranks is zero"):  # Lightning's way to say so
        make_trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    assert len(ids(model.seen, "train0")) == 11


def test_val__overlap_with_training_is_said(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data_module(coco, val="train").setup("fit")
    assert "11 of 11 validation images are also trained on" in caplog.text


def test_train__annotation_files_in_place_of_splits(coco: Path, tmp_path: Path) -> None:
    annotations = coco / "annotations"
    around = DetectionDataModule(
        train=str(annotations / "instances_train.json"), val=str(annotations / "instances_val.json"), num_workers=0
    )
    assert len(around.annotations("train")) == 11
    shutil.copytree(coco / "test", tmp_path / "images")
    shutil.copy(annotations / "instances_test.json", tmp_path / "labels.json")
    named = DetectionDataModule(
        train=str(tmp_path / "labels.json"), train_images=str(tmp_path / "images"), num_workers=0, val_fraction=0.4
    )
    assert len(named.annotations("val")) == 1
    _, targets = next(iter(named.train_dataloader()))
    assert Path(targets[0]["file_name"]).parent == tmp_path / "images"


def test_train__path_and_images_below_the_root(coco: Path, tmp_path: Path) -> None:
    root = shutil.copytree(coco, tmp_path / "root")
    (root / "train").rename(root / "shots")
    data = data_module(root, train="annotations/instances_train.json", train_images="shots")
    assert data.annotations("train").path(0).parent == root / "shots"


@pytest.fixture
def voc_parts(tmp_path: Path, write_image: Callable, write_xml: Callable, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds two folders of XML with their images, of 1 and 2 images."""
    for folder, count in (("first", 1), ("second", 2)):
        for i in range(count):
            write_image(tmp_path / folder / f"{i}.png")
            write_xml(tmp_path / folder / f"{i}.xml", [("cat", 5, 5, 30, 30)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("root", [None, ".", "", "ABSOLUTE"], ids=["none", "here", "empty", "absolute"])
@pytest.mark.parametrize("prefix", ["", "./"], ids=["name", "path"])
def test_train__folders_of_xml_in_the_current_folder(voc_parts: Path, root: str | None, prefix: str) -> None:
    root = str(voc_parts) if root == "ABSOLUTE" else root
    data = DetectionDataModule(root, train=f"{prefix}second", val=f"{prefix}first", num_workers=0)
    assert (len(data.annotations("train")), len(data.annotations("val"))) == (2, 1)
    assert data.annotations("train").path(0) == voc_parts / "second" / "0.png"


@pytest.mark.parametrize("root", [".", "voc", "../ABOVE/voc", "ABSOLUTE"])
def test_train__the_name_of_a_split_wins_over_a_folder(
    shared_data: Path, voc_parts: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    # a folder and a file are called as the splits of the dataset are
    devkit = shutil.copytree(shared_data / "voc2012_mini" / "VOCdevkit", voc_parts / "voc" / "VOCdevkit")
    here = devkit.parent if root == "." else voc_parts
    (voc_parts / "first").rename(here / "train")
    (here / "val").write_text("notes")
    monkeypatch.chdir(here)
    root = root.replace("ABOVE", voc_parts.name).replace("ABSOLUTE", str(devkit.parent))
    splits = {
        name: DetectionDataModule(root, train=name, num_workers=0).annotations("train") for name in ("train", "val")
    }
    lists = devkit / "VOC2012" / "ImageSets" / "Main"
    assert {name: len(table) for name, table in splits.items()} == {
        name: len((lists / f"{name}.txt").read_text().split()) for name in ("train", "val")
    }
    assert len(DetectionDataModule(root, train="./train", val_fraction=0, num_workers=0).annotations("train")) == 1


def test_train_images__without_a_path_in_train(coco: Path) -> None:
    with pytest.raises(DataError, match=r"LCD-D132.*data.train_images is given without a path in data.train"):
        data_module(coco, train_images=str(coco / "train")).annotations("train")


def test_setup__validation_of_nothing(coco: Path, tmp_path: Path) -> None:
    root = shutil.copytree(coco, tmp_path / "root")
    (root / "annotations" / "instances_val.json").unlink()
    with pytest.raises(DataError, match=r"LCD-D131.*no validation split.*set data.val"):
        data_module(root, val_fraction=0.0).setup("validate")


def test_classes__chosen_in_order(coco: Path) -> None:
    data, everything = data_module(coco, classes=["star", "disc"]), data_module(coco)
    assert data.class_names == ["star", "disc"]
    assert data.category_ids == [5, 1]
    for stage in ("train", "val"):
        table, full = data.annotations(stage), everything.annotations(stage)
        assert len(table) == len(full)
        assert (table.labels == 0).sum() == (full.labels == 4).sum()
        assert (table.labels == 1).sum() == (full.labels == 0).sum()


def test_class_names__a_class_that_the_dataset_lacks_keeps_its_label(flat: Path, write_xml: Callable) -> None:
    write_xml(flat / "a.xml", [("dog", 5, 5, 30, 30)], name="a.png")
    data = data_module(flat, val_fraction=0.0, class_names=["cat", "dog"])
    assert data.class_names == ["cat", "dog"]
    assert data.annotations("train").labels.tolist() == [1]


def test_predict__numbers_images_and_leaves_out_the_unreadable(coco: Path, tmp_path: Path) -> None:
    for index, name in enumerate(["b.jpg", "a.JPG", "c.png"]):
        shutil.copy(coco / "val" / f"{index + 1:06d}.jpg", tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "notes.txt").touch()
    data = DetectionDataModule(predict=str(tmp_path), batch_size=2, num_workers=0)
    batches = make_trainer(tmp_path).predict(Recorder(), datamodule=data)
    assert batches == [[1, 2], [4]]  # a.JPG, b.jpg; broken.jpg is 3; c.png
    loader = data.predict_dataloader()
    names = [Path(target["file_name"]).name for _, targets in loader for target in targets]
    assert names == ["a.JPG", "b.jpg", "c.png"]


def test_predict__file_pattern_and_list(coco: Path) -> None:
    def files(predict: str | list[str]) -> list[str]:
        return [Path(file).name for file in DetectionDataModule(predict=predict).predict_dataloader().dataset.files]

    one = str(coco / "val" / "000003.jpg")
    assert files(one) == ["000003.jpg"]
    assert files([one, str(coco / "val"), one]) == ["000003.jpg", *(f"00000{index}.jpg" for index in (1, 2, 4, 5))]
    assert len(files(str(coco / "**" / "*.jpg"))) == 19
    assert len(files(str(coco / "*" / "*"))) == 19  # the annotation files are no images


def test_predict__alone_has_no_classes(coco: Path) -> None:
    data = DetectionDataModule(predict=str(coco / "val"))
    for name in ("num_classes", "class_names", "category_ids"):
        with pytest.raises(DataError, match=r"LCD-D130.*set data.root"):
            getattr(data, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "trian"}, r"data\.train: there is no split 'trian'.*has .*; did you mean 'train'\?"),
        ({"val": "nowhere.json"}, r"nowhere\.json: there is no such file"),
        (
            {"val": "annotations/instances_val.json", "val_images": "nowhere"},
            r"nowhere: there is no such file or folder",
        ),
        ({"classes": ["disc", "cube"]}, "'cube' is not a class of the data; it has disc, ring, square"),
    ],
)
def test_setup__refuses(coco: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        data_module(coco, **options).setup("fit")
    assert "\n" not in str(caught.value)


def change_annotations(coco: Path, root: Path, split: str, **changes: object) -> Path:
    shutil.copytree(coco, root)
    file = root / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return root


def test_setup__empty_split(coco: Path, tmp_path: Path) -> None:
    root = change_annotations(coco, tmp_path / "set", "val", images=[], annotations=[])
    with pytest.raises(DataError, match=r"split 'val' has no images"):
        data_module(root).setup("fit")


def test_setup__nothing_to_learn_from(coco: Path, tmp_path: Path) -> None:
    root = change_annotations(coco, tmp_path / "set", "train", annotations=[])
    with pytest.raises(DataError, match=r"LCD-D134.*no boxes to learn from"):
        data_module(root).setup("fit")


def test_setup__other_classes_in_validation(coco: Path, tmp_path: Path) -> None:
    categories = [
        {"id": index + 1, "name": name} for index, name in enumerate(["disc", "ring", "cube", "cone", "star"])
    ]
    root = change_annotations(coco, tmp_path / "set", "val", categories=categories)
    with pytest.raises(DataError, match=r"instances_val\.json.*'square' is not among") as caught:
        data_module(root).setup("fit")
    assert "\n" not in str(caught.value)


def test_setup__other_category_ids_in_validation(coco: Path, tmp_path: Path) -> None:
    categories = [{"id": 5 - index, "name": name} for index, name in enumerate(CLASS_NAMES)]
    root = change_annotations(coco, tmp_path / "set", "val", categories=categories)
    message = r"LCD-D120.*split 'val': the classes differ from those of split 'train': class .* of id"
    with pytest.raises(DataError, match=message):
        data_module(root).setup("fit")


def test_setup__missing_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        data_module(tmp_path / "nowhere").setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"num_workers": -1}, "-1"),
    ],
)
def test_init__refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionDataModule(**options)


@pytest.mark.parametrize("predict", [None, "nowhere.jpg", "tests"])
def test_predict__nothing_found(predict: str | None) -> None:
    with pytest.raises(DataError, match="LCD-P001"):
        DetectionDataModule(predict=predict).predict_dataloader()


def test_train_dataloader__little_shared_memory_is_said(
    coco: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 26, 0, 1000))
    with caplog.at_level(logging.WARNING):
        data_module(coco, num_workers=0).train_dataloader()
        assert "LCD-R001" not in caplog.text
        data_module(coco, num_workers=2).train_dataloader()
    assert "LCD-R001" in caplog.text


@pytest.mark.heavy
def test_two_ranks__each_image_once(coco: Path, tmp_path: Path) -> None:
    run_on_two_ranks(recorder.main, tmp_path / "log", coco, tmp_path)
    (first, few), (second, few_second) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for key, count in [("train0", 11), ("train1", 11), ("val0", 5), ("val1", 5), ("test2", 3), ("predict2", 5)]:
        assert sorted(ids(first, key) + ids(second, key)) == list(range(1, count + 1)), key
    assert len(first["train0"]) == len(second["train0"])
    assert few["train0"] == few["train1"]
    assert few_second["train0"] == few_second["train1"]
    assert not set(ids(few, "train0")) & set(ids(few_second, "train0"))


def test_transfer_batch_to_device__xla_gets_nothing_of_varying_size() -> None:
    data = DetectionDataModule("anywhere")
    batch = ([torch.zeros(3, 4, 5)], [{"boxes": torch.zeros(1, 4), "labels": torch.zeros(1, dtype=torch.int64)}])
    (image,), (target,) = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert image.device.type == target["boxes"].device.type == "meta"
    assert data.transfer_batch_to_device(batch, torch.device("xla"), 0) is batch


@pytest.mark.parametrize(("num_images", "message"), [(2, "LCD-P002.*none of 2 images"), (5, None)])
def test_teardown__two_ranks_that_only_had_unreadable_images_left(
    num_images: int, message: str | None, tmp_path: Path
) -> None:
    files = [tmp_path / f"{i}.png" for i in range(num_images)]
    for file in files:
        file.write_bytes(b"no image")
    data = DetectionDataModule(predict=[str(file) for file in files], num_workers=0, batch_size=5)
    data.predict_dataloader()  # of five, an earlier prediction has read three
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda counts, reduce_op: torch.tensor([0, 2]))
    data.trainer = SimpleNamespace(world_size=2, strategy=strategy)  # type: ignore[assignment]
    with pytest.raises(DataError, match=message) if message else nullcontext():
        data.teardown("predict")
