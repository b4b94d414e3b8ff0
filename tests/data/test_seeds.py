"""What `seed_everything` and `data.seed` decide: the order of the images and their augmentation, on every rank."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_convnext_det.data.datamodule import DetectionDataModule
from lightning_convnext_det.data.image_folder import ImageFolderDataModule
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from tests.data.recorder import Recorder, SaveAndStop, make_trainer


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_coco(tmp_path_factory.mktemp("seeds"), 11, 5, seed=1, min_side=32, max_side=48)


def first_batch(coco: Path, run_seed: int, **options: object) -> tuple[list[int], list[Tensor]]:
    pl.seed_everything(run_seed, verbose=False)
    options = {"batch_size": 4, "num_workers": 0, "train_transforms": "lsj", "crop_size": 32, **options}
    images, targets = next(iter(DetectionDataModule(str(coco), **options).train_dataloader()))
    return [target["image_id"] for target in targets], images


def equal(first: tuple[list[int], list[Tensor]], second: tuple[list[int], list[Tensor]]) -> bool:
    return first[0] == second[0] and all(map(torch.equal, first[1], second[1]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_seed__follows_seed_everything(coco: Path, num_workers: int) -> None:
    batches = [first_batch(coco, seed, num_workers=num_workers) for seed in (1, 2, 3, 1)]
    assert len({tuple(ids) for ids, _ in batches}) == 3  # another order for each seed
    assert equal(batches[0], batches[3])
    assert equal(batches[0], first_batch(coco, 1))  # workers or not
    one = [first_batch(coco, seed, classes=["disc"], batch_size=11) for seed in (1, 2)]
    by_id = [dict(zip(ids, images, strict=True)) for ids, images in one]
    assert not any(torch.equal(by_id[0][i], by_id[1][i]) for i in by_id[0])  # another augmentation of every image


def test_seed__a_number_given_rules(coco: Path) -> None:
    batches = [first_batch(coco, seed, seed=7) for seed in (1, 2)]
    assert equal(*batches)
    assert equal(batches[0], first_batch(coco, 7))


def test_seed__images_held_out_are_those_of_every_run(coco: Path, tmp_path: Path) -> None:
    held_out = []
    for seed in (1, 2):
        pl.seed_everything(seed, verbose=False)
        data = DetectionDataModule(train=str(coco / "annotations" / "instances_train.json"), val_fraction=0.4)
        held_out.append(data.annotations("val").image_ids.tolist())
    assert held_out[0] == held_out[1]  # else `validate` would score images that `fit` has trained on


def test_seed__a_resumed_run_follows_its_checkpoint(coco: Path, tmp_path: Path) -> None:
    def fit(run_seed: int, callbacks: list, ckpt: Path | None = None, **options: object) -> dict:
        pl.seed_everything(run_seed, verbose=False)
        model = Recorder()
        data = DetectionDataModule(str(coco), batch_size=2, num_workers=0, train_transforms="none", **options)
        trainer = make_trainer(tmp_path, limit_val_batches=0, callbacks=callbacks)
        trainer.fit(model, datamodule=data, **({"ckpt_path": ckpt, "weights_only": True} if ckpt else {}))
        return model.seen

    file = tmp_path / "a.ckpt"
    whole = fit(1, [])
    first = fit(1, [SaveAndStop(file, 4)])
    second = fit(2, [], file)  # another seed_everything: the epoch that is under way must not change
    assert first["train0"] + second["train0"] == whole["train0"]
    assert second["train1"] == whole["train1"]
    assert fit(2, [], file, seed=9)["train1"] != whole["train1"]  # a number given rules


def test_seed__image_folders_follow_seed_everything(tmp_path: Path) -> None:
    from tests.data.test_image_folder import write

    write(tmp_path / "train", count=6)
    names = []
    for seed in (1, 2, 1):
        pl.seed_everything(seed, verbose=False)
        data = ImageFolderDataModule(str(tmp_path), image_size=16, batch_size=4, num_workers=0, val_fraction=0.0)
        names.append([name for batch in data.train_dataloader() for name in batch["file_names"]])
    assert names[0] == names[2] != names[1]
