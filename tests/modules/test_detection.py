import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_convnext_det.errors import ArgumentError, CheckpointError, DataError
from lightning_convnext_det.metrics.coco_summary import METRICS
from lightning_convnext_det.modules import DetectionModule, FasterRCNNModule, load_module, start_module
from lightning_convnext_det.modules.detection import Batch
from lightning_convnext_det.modules.registry import save_module
from tests.training import create_batches, create_module, create_trainer

# Lightning's advice on loaders: those made here have no workers, and not every test validates
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def test_detection_module__logs_every_loss_and_metric(loader: DataLoader[Batch], tmp_path: Path) -> None:
    trainer = create_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(create_module(class_names=["dark", "bright"]), loader, loader)
    logged = trainer.callback_metrics
    losses = ("loss_objectness", "loss_rpn_box", "loss_classification", "loss_box")
    assert float(logged["train/loss"]) == pytest.approx(
        sum(float(logged[f"train/{name}"]) for name in losses), rel=1e-5
    )
    assert {name for name in logged if name.startswith("val/")} == {f"val/{name}" for name in METRICS}


@pytest.mark.heavy
def test_detection_module__metrics_of_each_class(loader: DataLoader[Batch], tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(300)]
    for per_class in (False, True):
        logger = CSVLogger(tmp_path, name=str(per_class))
        module = create_module(300, class_names=names, log_per_class=per_class)
        trainer = create_trainer(tmp_path, max_epochs=2, enable_checkpointing=False, logger=logger)
        trainer.fit(module, loader, loader)
        assert sum("class" in name for name in trainer.callback_metrics if "/map/" in name) == 300 * per_class
        assert set(module.metric_names) == {n for n in trainer.callback_metrics if n.startswith("val/")}
        with open(Path(logger.log_dir) / "val_per_class.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["class"] for row in rows] == names * 2
        assert [row["epoch"] for row in rows] == ["0"] * 300 + ["1"] * 300
        assert not math.isnan(float(rows[0]["map"]))  # classes 0 and 1 have objects
        assert math.isnan(float(rows[2]["map"]))


def test_detection_module__table_of_classes_without_a_logger(
    loader: DataLoader[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, options, found in (("a", {}, 1), ("b", {"fast_dev_run": True}, 0), (None, {}, 0)):
        create_trainer(folder, enable_checkpointing=False, **options).validate(create_module(), loader, verbose=False)
        assert len(list(tmp_path.rglob("val_per_class.csv"))) == found
        shutil.rmtree(tmp_path / "a", ignore_errors=True)


@pytest.mark.heavy
def test_detection_module__learns_and_tests(loader: DataLoader[Batch], tmp_path: Path) -> None:
    trainer = create_trainer(tmp_path, max_epochs=60, enable_checkpointing=False, check_val_every_n_epoch=60)
    # the rate falls to 0: with a constant one, what the last step happens to do differs from processor to processor
    options = {"lr": 2e-3, "warmup_steps": 5, "schedule": "cosine"}
    module = create_module(anchor_sizes=[[16], [32], [64], [96], [128]], **options)
    trainer.fit(module, loader, loader)
    assert float(trainer.callback_metrics["val/map_50"]) > 0.9
    assert trainer.test(module, loader, verbose=False)[0]["test/map_50"] > 0.9
    found = trainer.predict(module, loader)
    assert len(found) == 3
    assert found[0][0]["boxes"].shape[1] == 4


@pytest.mark.heavy
def test_detection_module__sanity_check_is_not_evaluated(loader: DataLoader[Batch], tmp_path: Path) -> None:
    module, calls = create_module(), []
    compute = module.evaluator.compute
    module.evaluator.compute = lambda: calls.append(len(module.evaluator._records)) or compute()  # type: ignore[method-assign]
    trainer = create_trainer(tmp_path, num_sanity_val_steps=2, max_epochs=2, enable_checkpointing=False)
    trainer.fit(module, loader, loader)
    assert calls == [6, 6]  # all images, once per epoch, nothing kept


def test_parameter_groups__decay_and_backbone_factor() -> None:
    module = create_module(lr=1e-3, weight_decay=0.1, backbone_lr_factor=0.25, out_norm=True)
    groups = {g["name"]: g for g in module.parameter_groups()}
    names = {id(p): n for n, p in module.detector.named_parameters()}
    of_group = {name: {names[id(p)] for p in g["params"]} for name, g in groups.items()}
    assert sum(len(g) for g in of_group.values()) == len(names)
    assert groups["lr x0.25, decay"]["lr"] == 2.5e-4
    assert groups["lr x0.25, no decay"]["weight_decay"] == 0
    assert groups["lr x1, decay"]["weight_decay"] == 0.1
    assert "backbone.body.net.stem_0.weight" in of_group["lr x0.25, decay"]
    assert "backbone.body.net.stages_0.blocks.0.gamma" in of_group["lr x0.25, no decay"]  # layer scale
    assert "backbone.body.norms.0.weight" in of_group["lr x0.25, no decay"]
    assert "backbone.fpn.inner_blocks.0.0.weight" in of_group["lr x1, decay"]
    assert "roi_heads.box_head.fc6.bias" in of_group["lr x1, no decay"]


def test_parameter_groups__frozen_parameters_are_left_out() -> None:
    module = create_module(frozen_stages=4)
    trained = {id(p) for g in module.parameter_groups() for p in g["params"]}
    assert trained
    assert not trained & {id(p) for p in module.detector.backbone.body.net.parameters()}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant", "warmup_steps": 0}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "step", "milestones": [1], "warmup_steps": 0}, [1, 1, 1, 0.1, 0.1, 0.1]),
        ({"schedule": "step", "milestones": [1], "step_factor": 0.5, "warmup_steps": 0}, [1, 1, 1, 0.5, 0.5, 0.5]),
        ({"schedule": "cosine", "warmup_steps": 0}, [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]),
    ],
)
def test_schedule__learning_rates(
    loader: DataLoader[Batch], tmp_path: Path, options: dict[str, object], expected: list[float]
) -> None:
    module, rates = create_module(lr=1e-4, **options), []
    module.on_train_batch_start = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])  # type: ignore[method-assign]
    create_trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(module, loader)
    assert rates == pytest.approx([1e-4 * x for x in expected])


def test_schedule__warm_up_is_linear_and_at_most_a_tenth(tmp_path: Path) -> None:
    module, rates = create_module(lr=1.0, schedule="constant", warmup_steps=500, weight_decay=0.0), []
    module.on_train_batch_start = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])  # type: ignore[method-assign]
    weight = next(module.parameters())
    module.training_step = lambda batch, batch_idx: weight.sum()  # type: ignore[method-assign]
    loader = DataLoader(create_batches(40), batch_size=None)
    create_trainer(tmp_path, enable_checkpointing=False).fit(module, loader)
    assert rates[:6] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 1])


@pytest.mark.heavy
def test_detection_module__sgd_has_momentum(tmp_path: Path, loader: DataLoader[Batch]) -> None:
    trainer = create_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(create_module(optimizer="sgd", lr=1e-3), loader)
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.9


def fit_and_save(tmp_path: Path, loader: DataLoader[Batch], **options: object) -> tuple[Path, FasterRCNNModule]:
    module = create_module(class_names=["dark", "bright"], category_ids=[7, 3], **options)
    trainer = create_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt", module


@pytest.mark.heavy
def test_checkpoint__is_self_contained(tmp_path: Path, loader: DataLoader[Batch]) -> None:
    path, module = fit_and_save(tmp_path, loader, image_mean=[0.4, 0.4, 0.4])
    for loaded in (load_module(path), FasterRCNNModule.load_from_checkpoint(path, weights_only=True)):
        assert isinstance(loaded, FasterRCNNModule)
        assert (loaded.class_names, loaded.category_ids) == (["dark", "bright"], [7, 3])
        assert loaded.detector.transform.image_mean == (0.4, 0.4, 0.4)
        assert loaded.detector.transform.min_sizes == [64]
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))
    image = torch.rand(3, 64, 72)
    with torch.no_grad():
        assert torch.equal(load_module(path)([image])[0]["boxes"], module.eval()([image])[0]["boxes"])


@pytest.mark.heavy
def test_checkpoint__never_asks_for_pretrained_weights(
    tmp_path: Path, loader: DataLoader[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_convnext_det.models import backbone

    module = create_module()
    module.hparams.update({"pretrained_backbone": True, "backbone_weights": "gone.pth"})  # as if trained from them
    trainer = create_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    monkeypatch.setattr(backbone, "fetching", lambda name: pytest.fail("asked for pretrained weights"))
    load_module(tmp_path / "a.ckpt")
    FasterRCNNModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)


@pytest.mark.heavy
def test_checkpoint__other_classes_are_refused(tmp_path: Path, loader: DataLoader[Batch]) -> None:
    path, _ = fit_and_save(tmp_path, loader)
    with pytest.raises(CheckpointError, match="class 0 is 'dark', the dataset's is 'bright'"):
        create_trainer(tmp_path).test(create_module(class_names=["bright", "dark"]), loader, ckpt_path=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a checkpoint of this package"),
        (b"<html>not found</html>", "is not a checkpoint of this package"),
        ({"state_dict": {"a": torch.zeros(1)}}, "third-party weights need convnext-det import-weights"),
        ({"lightning_convnext_det": {"module": "os.system"}}, "is not a checkpoint of this package"),
        ({"lightning_convnext_det": {"module": "FasterRCNNModule"}}, "lacks hyper-parameters or weights"),
        (
            {
                "lightning_convnext_det": {"module": "FasterRCNNModule"},
                "hyper_parameters": {"num_classes": 2, "shell": "x"},
                "state_dict": {"a": torch.zeros(2)},
            },
            "describes: FasterRCNNModule has no argument 'shell'",
        ),
    ],
)
def test_load_module__foreign_file(tmp_path: Path, content: bytes | dict[str, object], message: str) -> None:
    path = tmp_path / "a.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_module(path)


def test_load_module__address_and_absence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"LCD-S010.*give its local path"):
        load_module("http://127.0.0.1:1/evil.ckpt")
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        load_module(tmp_path / "absent.ckpt")


def test_detection_module__wrong_arguments() -> None:
    with pytest.raises(ValueError, match="class_names has 1 entries, but num_classes is 2"):
        create_module(class_names=["a"])
    with pytest.raises(ValueError, match="needs milestones"):
        create_module(schedule="step")
    with pytest.raises(TypeError, match="has no argument 'fpn_chanels'; did you mean 'fpn_channels'"):
        create_module(fpn_chanels=3)
    with pytest.raises(NotImplementedError, match="use a subclass"):
        DetectionModule(2)


def test_init__refuses_class_names_that_are_not_unique() -> None:
    with pytest.raises(ArgumentError, match=r"class_names is \['a', 'a'\]; each class needs one of its own"):
        create_module(2, class_names=["a", "a"])


class _Data:
    def __init__(self, names: list[str]) -> None:
        self.class_names, self.category_ids, self.resizes = names, [5, 6], True


def test_setup__takes_or_checks_the_classes_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    class _Trainer:
        datamodule = _Data(["a", "b"])

    unnamed, named = create_module(), create_module(class_names=["b", "a"])
    for module in (unnamed, named):
        monkeypatch.setattr(type(module), "trainer", _Trainer())
    unnamed.setup("fit")
    assert (unnamed.class_names, unnamed.category_ids) == (["a", "b"], [5, 6])
    assert isinstance(unnamed.detector, nn.Module)
    assert not unnamed.detector.transform.resize_in_training
    with pytest.raises(DataError, match=r"LCD-D120.*class 0 is 'b', the dataset's is 'a'"):
        named.setup("test")


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_setup__precision_without_float32(tmp_path: Path, loader: DataLoader[Batch], precision: str) -> None:
    trainer = create_trainer(tmp_path, precision=precision, enable_checkpointing=False)
    with pytest.raises(ValueError, match=f"precision is '{precision}'.*use '32-true', 'bf16-mixed'"):
        trainer.fit(create_module(), loader)


def test_on_load_checkpoint__of_another_network() -> None:
    checkpoint = {"state_dict": create_module().state_dict()}
    create_module().on_load_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=r"LCD-K014.*'detector.backbone.fpn.*' is \[32, .*expected \[16, "):
        create_module(fpn_channels=16).on_load_checkpoint(checkpoint)
    del checkpoint["state_dict"]["detector.rpn.head.cls_logits.bias"]
    with pytest.raises(CheckpointError, match=r"cls_logits.bias' is missing, expected \[3\]"):
        create_module().on_load_checkpoint(checkpoint)


@pytest.mark.heavy
def test_start_module__batch_norm_that_learns_again_and_tensors_without_a_place(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_module(create_module(backbone="test_resnet", out_norm=True), path)
    module = start_module(path, 3, batch_norm="train")
    assert "detector.backbone.body.net.conv1.1.num_batches_tracked" in module.state_dict()
    with pytest.raises(CheckpointError, match=r"LCD-K014.*'detector.backbone.body.norms.0.weight' has no place in it"):
        start_module(path, 3, out_norm=False)


@pytest.mark.heavy
def test_detection_module__checkpoints_hold_the_thresholds_of_the_last_validation(
    loader: DataLoader[Batch], tmp_path: Path
) -> None:
    module = create_module(3, class_names=["dark", "bright", "absent"])
    trainer = create_trainer(tmp_path, max_epochs=20, enable_checkpointing=False, check_val_every_n_epoch=20)
    trainer.fit(module, loader, loader)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    chosen = module.score_thresholds
    assert chosen is not None
    assert chosen == [one.threshold for one in module.evaluator.thresholds]
    assert chosen[0] is not None
    assert chosen[2] is None
    assert load_module(path).score_thresholds == chosen
    assert start_module(path, 2, ["dark", "bright"]).score_thresholds is None
    trainer.validate(module, loader, verbose=False, ckpt_path=str(path))
    assert module.score_thresholds == chosen
    module.score_thresholds = [0.5, "high", 2.0]  # type: ignore[list-item]
    save_module(module, path)
    assert load_module(path).score_thresholds is None
