"""Modules that a user has written on top of ours: saved, loaded by their own class, and continued."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_convnext_det.checkpoints.build_module import read_checkpoint
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.inference.predictor import Predictor
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.modules import (
    ClassifierModule,
    DeformableDETRModule,
    DetectionModule,
    FasterRCNNModule,
    load_module,
    start_module,
)
from lightning_convnext_det.modules.detection import Batch
from lightning_convnext_det.modules.registry import MODULES as REGISTRY
from lightning_convnext_det.modules.registry import save_module
from tests.training import TINY, create_batches, create_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]
NAMES, IDS = ["cat", "dog"], [3, 7]
IMAGES = list(torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(0)))


class Plain(FasterRCNNModule):
    """Overrides a step only."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        outcome = super().training_step(batch, batch_idx)
        return {**outcome, "loss": outcome["loss"] * 2}


class Fixed(FasterRCNNModule):
    """Knows its dataset; says nothing of classes to its caller."""

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__(2, NAMES, IDS, **TINY)
        self.alpha = alpha


class Open(FasterRCNNModule):
    """Decides some arguments itself, hands others on, and has a layer of its own."""

    def __init__(self, num_classes: int, alpha: float = 0.5, **options: Any) -> None:
        super().__init__(num_classes, **{k: v for k, v in TINY.items() if k != "min_size"}, **options)
        self.alpha = alpha
        self.extra = nn.Linear(3, 4)


class Own(DetectionModule):
    """Has a detector of its own."""

    def build_detector(self, num_classes: int, width: int = 8) -> nn.Module:
        detector = FasterRCNN(num_classes, **{**TINY, "fpn_channels": width})
        detector.stem = nn.Linear(width, 2)
        return detector


class NeedsNumbers(Open):
    """Cannot be built without memory."""

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.start = float(torch.arange(3).sum().item())


class Given(Plain):
    """Takes what no checkpoint can hold."""

    def __init__(self, num_classes: int, head: nn.Module) -> None:
        super().__init__(num_classes, **TINY)
        self.head = head


class Longer(Plain):
    """Has a layer of its own."""

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.extra = nn.Linear(3, 4)


class Wide(FasterRCNNModule):
    """Builds another network from the same arguments."""

    def build_detector(self, num_classes: int, **options: Any) -> FasterRCNN:
        return FasterRCNN(num_classes, **{**options, "fpn_channels": 16})


class Kind(ClassifierModule):
    """A classifier."""


MODULES: dict[str, Any] = {
    "plain": lambda: Plain(2, NAMES, IDS, **TINY),
    "fixed": lambda: Fixed(alpha=0.25),
    "open": lambda: Open(2, 0.25, class_names=NAMES, category_ids=IDS, min_size=80),
    "own": lambda: Own(2, NAMES, IDS, width=16),
    "needs_numbers": lambda: NeedsNumbers(2, alpha=0.25, class_names=NAMES, category_ids=IDS),
    "kind": lambda: Kind(2, NAMES, backbone="test_convnext"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", MODULES)
def test_load_from_checkpoint__of_a_subclass(tmp_path: Path, name: str) -> None:
    module = MODULES[name]()
    save_module(module, tmp_path / "a.ckpt")
    found = type(module).load_from_checkpoint(tmp_path / "a.ckpt")
    assert type(found) is type(module)
    assert not found.training
    assert getattr(found, "alpha", 0.25) == 0.25
    assert (found.class_names, getattr(found, "category_ids", IDS)) == (NAMES, IDS)
    assert found.state_dict().keys() == module.state_dict().keys()
    for key, tensor in module.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key
    save_module(found, tmp_path / "b.ckpt")  # and again
    assert type(module).load_from_checkpoint(tmp_path / "b.ckpt").class_names == NAMES


def test_load_from_checkpoint__options_of_a_subclass(tmp_path: Path) -> None:
    save_module(MODULES["open"](), tmp_path / "a.ckpt")
    found = Open.load_from_checkpoint(tmp_path / "a.ckpt", alpha=0.75, score_threshold=0.5)
    assert (found.alpha, found.detector.score_threshold) == (0.75, 0.5)
    assert found.detector.transform.min_sizes == [80]


def test_load_from_checkpoint__classes_that_came_from_the_data(tmp_path: Path) -> None:
    module = Open(2)
    module.set_classes(NAMES, IDS)  # as setup does
    save_module(module, tmp_path / "a.ckpt")
    found = Open.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (found.class_names, found.category_ids, found.evaluator.class_names) == (NAMES, IDS, NAMES)


def test_load_from_checkpoint__what_a_checkpoint_cannot_hold_is_given_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.warns(UserWarning, match="Attribute 'head' is an instance of `nn.Module`"):
        module = Given(2, nn.Linear(2, 3))
    save_module(module, tmp_path / "a.ckpt")
    assert "argument 'head' of Given is a Linear, which a checkpoint cannot hold; give it to" in caplog.text
    with pytest.warns(UserWarning, match="Attribute 'head' is an instance of `nn.Module`"):
        found = Given.load_from_checkpoint(tmp_path / "a.ckpt", head=nn.Linear(2, 3))
    assert torch.equal(found.head.weight, module.head.weight)
    with pytest.raises(CheckpointError, match=r"LCD-K015.* missing 1 required positional argument: 'head'"):
        Given.load_from_checkpoint(tmp_path / "a.ckpt")


def test_load_from_checkpoint__what_another_class_has_written(tmp_path: Path) -> None:
    save_module(FasterRCNNModule(2, NAMES, IDS, **TINY), tmp_path / "ours.ckpt")
    assert type(Plain.load_from_checkpoint(tmp_path / "ours.ckpt")) is Plain
    with pytest.raises(CheckpointError, match=r"LCD-K015.*'extra.weight' is missing, its .* declare \[4, 3\]"):
        Longer.load_from_checkpoint(tmp_path / "ours.ckpt")
    save_module(MODULES["plain"](), tmp_path / "plain.ckpt")
    for other in (DeformableDETRModule, ClassifierModule, Kind):
        with pytest.raises(CheckpointError, match=rf"\[LCD-K001\] .*plain.ckpt holds a Plain, no {other.__name__}"):
            other.load_from_checkpoint(tmp_path / "plain.ckpt")


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["plain", "fixed", "open", "longer", "renamed"])
def test_load_module__of_a_subclass_reads_its_detector(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.ckpt"
    module = {"longer": lambda: Longer(2, **TINY), "renamed": _renamed, **MODULES}[name]().eval()
    save_module(module, path)
    with torch.no_grad():
        wanted = module(IMAGES)
    kind = type(module).__name__
    for found in (load_module(path), FasterRCNNModule.load_from_checkpoint(path)):
        assert f"[LCD-K020] {path} was written by {kind}; its detector is read as a FasterRCNNModule" in caplog.text
        assert type(found) is FasterRCNNModule
        assert (found.class_names, found.category_ids) == (module.class_names, module.category_ids)
        assert_equal(found(IMAGES), wanted)
    assert_equal(Predictor.from_checkpoint(path)(IMAGES), wanted)
    started = start_module(path, 3)
    assert torch.equal(started.detector.rpn.head.conv[0][0].weight, module.detector.rpn.head.conv[0][0].weight)
    save_module(load_module(path), tmp_path / "b.ckpt")  # ours from now on
    assert "subclass" not in torch.load(tmp_path / "b.ckpt", weights_only=True)["lightning_convnext_det"]


def _renamed() -> FasterRCNNModule:
    module = Open(2)
    module.set_classes(NAMES, IDS)  # as setup does
    return module


def assert_equal(found: list[Any], wanted: list[Any]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert len(one["boxes"])
        for key in ("boxes", "labels", "scores"):
            assert torch.equal(one[key], other[key])


def test_load_module__of_a_subclass_with_a_network_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.ckpt"
    wider = Plain(2, NAMES, IDS, **TINY)
    wider.detector.rpn.extra = nn.Linear(3, 4)
    for module, base in ((Wide(2, NAMES, IDS, **TINY), "Wide"), (wider, "Plain")):
        save_module(module, path)
        said = rf"\[LCD-K016\] {path} was written by {base}, a subclass of FasterRCNNModule with a network of its own"
        for read in (
            load_module, lambda p: read_checkpoint(p, REGISTRY), Predictor.from_checkpoint,
            FasterRCNNModule.load_from_checkpoint, DetectionModule.load_from_checkpoint, lambda p: start_module(p, 3),
        ):  # fmt: skip
            with pytest.raises(CheckpointError, match=f"^{said}.*; add --model MODULE.{base} on the command line, or"):
                read(path)
        assert main(["predict", f"--data.predict={tmp_path}", f"--ckpt_path={path}"]) == 6
        assert "[LCD-K016]" in capsys.readouterr().err


@pytest.mark.heavy
def test_command__runs_the_detector_of_a_subclass_and_does_not_train_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, root = tmp_path / "a.ckpt", write_synthetic_coco(tmp_path / "data", num_train=2, num_val=1)
    save_module(Longer(5, class_names=["disc", "ring", "square", "triangle", "star"], **TINY), path)
    common = [f"--data.root={root}", "--data.num_workers=0", f"--ckpt_path={path}", "--trainer.accelerator=cpu"]
    common += ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--data.batch_size=1"]
    assert main(["fit", *common]) == 6
    assert "add --model MODULE.Longer to go on training it, or --start_from" in capsys.readouterr().err
    assert main(["predict", *common, "--data.predict_split=val", f"--output.folder={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "predictions.json").exists()
    started = [option.replace("--ckpt_path", "--start_from") for option in common]
    assert main(["fit", *started, "--trainer.fast_dev_run=1"]) == 0


@pytest.mark.heavy
def test_load_from_checkpoint__nothing_is_imported_by_the_name_of_a_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.ckpt"
    save_module(MODULES["plain"](), path)
    content = torch.load(path, weights_only=True)
    for name in ("os.system", "tests.checkpoints.test_subclass.Open", "", "a\nb", 3):
        content["lightning_convnext_det"]["subclass"] = name
        torch.save(content, path)
        caplog.clear()
        assert type(load_module(path)) is FasterRCNNModule
        assert "was written by a subclass;" in caplog.messages[0]
        assert type(Plain.load_from_checkpoint(path)) is Plain  # whatever the file says


def test_load_from_checkpoint__stated_sizes_of_a_subclass_are_not_built(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_module(MODULES["own"](), path)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["width"] = 10**6
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"LCD-K015.* declare \[1000000, "):
        Own.load_from_checkpoint(path)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["plain", "fixed", "open"])
def test_fit__of_a_subclass_is_continued(tmp_path: Path, name: str) -> None:
    loader = DataLoader(create_batches(3), batch_size=None)
    each = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    torch.manual_seed(0)
    whole = MODULES[name]()
    create_trainer(tmp_path, max_epochs=2, callbacks=[each]).fit(whole, loader)
    half = type(whole).load_from_checkpoint(tmp_path / "epoch=0.ckpt")
    continued = MODULES[name]()
    create_trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(
        continued, loader, ckpt_path=tmp_path / "epoch=0.ckpt"
    )
    for key, tensor in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[key], tensor), key
    assert not torch.equal(half.detector.rpn.head.cls_logits.weight, whole.detector.rpn.head.cls_logits.weight)


@pytest.mark.parametrize(
    "place", [None, "cpu", torch.device("cpu"), {"cuda:0": "cpu"}, lambda storage, _: storage, lambda *_: None],
    ids=["none", "name", "device", "mapping", "function", "function without an answer"],
)  # fmt: skip
def test_load_from_checkpoint__any_map_location(tmp_path: Path, place: Any) -> None:
    save_module(MODULES["plain"](), tmp_path / "a.ckpt")
    found = Plain.load_from_checkpoint(tmp_path / "a.ckpt", map_location=place)
    assert {p.device.type for p in found.parameters()} == {"cpu"}


def test_load_from_checkpoint__map_location_is_heard(tmp_path: Path) -> None:
    save_module(MODULES["plain"](), tmp_path / "a.ckpt")
    for place in ("meta", {"cpu": "meta"}, lambda storage, _: torch.empty(1, device="meta").untyped_storage()):
        found = Plain.load_from_checkpoint(tmp_path / "a.ckpt", map_location=place)
        assert {p.device.type for p in found.parameters()} == {"meta"}


def test_load_from_checkpoint__not_strict_names_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = FasterRCNNModule(2, NAMES, IDS, **TINY)
    save_module(ours, tmp_path / "ours.ckpt")
    found = Longer.load_from_checkpoint(tmp_path / "ours.ckpt", strict=False)
    assert "lacks 2 tensors, which keep random weights: extra.weight, extra.bias" in caplog.text
    assert all(p.isfinite().all() for p in found.parameters())
    assert not any(p.is_meta for p in found.parameters())
    for key, tensor in ours.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor)
    save_module(found, tmp_path / "longer.ckpt")
    caplog.clear()
    FasterRCNNModule.load_from_checkpoint(tmp_path / "ours.ckpt", strict=False)
    assert not caplog.text
    Plain.load_from_checkpoint(tmp_path / "longer.ckpt", strict=False)
    assert "has 2 tensors more: extra.weight, extra.bias" in caplog.text
    with pytest.raises(CheckpointError, match=r"LCD-K014.*size mismatch"):
        Plain.load_from_checkpoint(tmp_path / "ours.ckpt", strict=False, fpn_channels=16)


@pytest.mark.parametrize(
    "options", [{"num_classes": 3}, {"num_classes": 3, "class_names": ["a", "b", "c"]}], ids=["number", "names"]
)  # fmt: skip
def test_load_from_checkpoint__other_classes_begin_anew(
    tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ours = FasterRCNNModule(2, NAMES, IDS, **TINY)
    save_module(ours, tmp_path / "a.ckpt")
    found = FasterRCNNModule.load_from_checkpoint(tmp_path / "a.ckpt", **options)
    assert (found.num_classes, found.class_names) == (3, options.get("class_names", ["0", "1", "2"]))
    assert "[LCD-K017]" in caplog.text
    assert "4 tensors begin with random weights" in caplog.text
    assert found.detector.roi_heads.box_predictor.cls_score.out_features == 4
    for key, tensor in found.state_dict().items():
        if "box_predictor" not in key:
            assert torch.equal(tensor, ours.state_dict()[key]), key


def test_load_from_checkpoint__new_names_of_the_same_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = FasterRCNNModule(2, NAMES, IDS, **TINY)
    save_module(ours, tmp_path / "a.ckpt")
    found = FasterRCNNModule.load_from_checkpoint(tmp_path / "a.ckpt", class_names=["a", "b"], num_classes=2)
    assert (found.class_names, caplog.text) == (["a", "b"], "")
    assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in ours.state_dict().items())


def test_load_from_checkpoint__arguments_that_do_not_fit(tmp_path: Path) -> None:
    save_module(MODULES["plain"](), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"LCD-K014\] .* does not fit the arguments given: '.*' is \[32, 24"):
        Plain.load_from_checkpoint(tmp_path / "a.ckpt", fpn_channels=16)
    with pytest.raises(ValueError, match="lr is -1"):
        Plain.load_from_checkpoint(tmp_path / "a.ckpt", lr=-1)
