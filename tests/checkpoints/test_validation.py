"""Checkpoints that state another network than they hold: what is stated must not be built."""

import builtins
import json
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lightning_convnext_det.checkpoints import file
from lightning_convnext_det.checkpoints.build_module import build_module
from lightning_convnext_det.checkpoints.weightless import without_weights
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.models.rcnn.conventions import Convention
from lightning_convnext_det.modules import (
    CascadeRCNNModule,
    ClassifierModule,
    DeformableDETRModule,
    FasterRCNNModule,
    start_module,
)
from lightning_convnext_det.modules.registry import MODULES, save_module
from tests.callbacks.test_exact_resume import DETR
from tests.mutations import limit_memory
from tests.processes import forget_peak, peak_megabytes, run_script
from tests.training import TINY

SECONDS = 30  # of CPU for a file
MEGABYTES = 200  # for all files; the networks have less than one
Content = dict[str, Any]
NAMES = ["cat", "dog"]


def kinds() -> dict[str, Any]:
    return {
        "faster": FasterRCNNModule(2, NAMES, [3, 7], **TINY),
        "cascade": CascadeRCNNModule(2, NAMES, [3, 7], **TINY),
        "detr": DeformableDETRModule(2, NAMES, [3, 7], **DETR),
        "two_stage": DeformableDETRModule(2, NAMES, [3, 7], **DETR, two_stage=True),
        "classifier": ClassifierModule(2, NAMES, backbone="test_convnext"),
    }


def states(**parameters: object) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        content["hyper_parameters"] |= parameters

    return change


def repeats(classes: int) -> Callable[[Content], None]:
    """As many classes as it says, out of one number each."""

    def change(content: Content) -> None:
        content["hyper_parameters"] |= {"num_classes": classes, "class_names": None, "category_ids": None}
        for name, tensor in content["state_dict"].items():
            if "box_predictor" in name:
                rows = (classes + 1) * (4 if "bbox_pred" in name else 1)
                content["state_dict"][name] = torch.zeros(()).expand(rows, *tensor.shape[1:])

    return change


def holds(name: str, value: object) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        content["state_dict"][name] = value

    return change


def lacks(name: str) -> Callable[[Content], None]:
    return lambda content: content["state_dict"].pop(name)


def nested(depth: int) -> list[Any]:
    """Ten to the power of ``depth`` numbers, in a file of a few hundred bytes."""
    values: list[Any] = [1] * 10
    for _ in range(depth - 1):
        values = [values] * 10
    return values


UNNAMED = {"class_names": None, "category_ids": None}
BIAS = "detector.roi_heads.box_predictor.cls_score.bias"
CASES: dict[str, tuple[str, Callable[[Content], None]]] = {
    "channels": ("faster", states(fpn_channels=10**6)),
    "one bit in the channels": ("faster", states(fpn_channels=32 ^ 1 << 20)),
    "channels beyond all numbers": ("faster", states(fpn_channels=10**12)),
    "features": ("faster", states(box_head_features=10**9)),
    "rows of the pooled map": ("faster", states(roi_output_size=10**5)),
    "channels of the image": ("faster", states(in_chans=10**9, image_mean=[0.5] * 3)),
    "classes": ("faster", states(num_classes=10**9, **UNNAMED)),
    "classes as infinite": ("faster", states(num_classes=float("inf"), **UNNAMED)),
    "classes by one number each": ("faster", repeats(10**9)),
    "a larger backbone": ("faster", states(backbone="convnext_xxlarge")),
    "anchors": ("faster", states(anchor_sizes=[[8] * 10**6] * 5, aspect_ratios=[1.0] * 10**6)),
    "anchors, all of them the same": ("faster", states(anchor_sizes=[[8] * 150] * 5, aspect_ratios=[1.0] * 900)),
    "numbers in lists in lists": ("faster", states(min_size=nested(12))),
    "names in lists in lists": ("faster", states(class_names=nested(12))),
    "a number of hundreds of digits": ("faster", states(max_size=1 << 2000)),
    "a long word": ("faster", states(backbone="convnext_" + "a" * 10**6)),
    "a table": ("faster", states(backbone={"class_path": "os.system"})),
    "a number for a name": ("faster", lambda content: content["hyper_parameters"].update({7: 7})),
    "a word for a number": ("faster", states(max_size="large")),
    "an unknown argument": ("faster", states(fpn_chanels=32)),
    "stages": ("cascade", states(stage_iou_thresholds=[0.5] * 900, stage_loss_weights=[1.0] * 900)),
    "channels of four convolutions": ("cascade", states(fpn_channels=10**6)),
    "queries": ("detr", states(num_queries=10**9)),
    "width": ("detr", states(hidden_dim=2**20)),
    "width of the blocks": ("detr", states(feedforward_dim=10**10)),
    "heads": ("detr", states(num_heads=2**20, hidden_dim=2**20)),
    "layers of the encoder": ("detr", states(encoder_layers=10**9)),
    "layers of the decoder": ("detr", states(decoder_layers=10**7)),
    "levels": ("detr", states(extra_levels=10**8)),
    "points": ("detr", states(encoder_points=10**9)),
    "classes of two stages": ("two_stage", states(num_classes=10**9, **UNNAMED)),
    "classes of a classifier": ("classifier", states(num_classes=10**9, class_names=None)),
    "channels of a classifier": ("classifier", states(in_chans=10**9)),
    "a larger classifier": ("classifier", states(backbone="vit_giant_patch14_224")),
    "no tensor": ("faster", holds(BIAS, 3)),
    "a tensor too many": ("faster", holds("more", torch.zeros(3))),
    "a tensor too few": ("faster", lacks(BIAS)),
    "a tensor of another shape": ("faster", holds(BIAS, torch.zeros(4))),
}


def read_all(folder: Path) -> None:
    """Read the file of each case in this process, under a limit of its memory; print what came of each."""
    warnings.simplefilter("ignore")
    good = {}
    for name, module in kinds().items():
        save_module(module, folder / f"{name}.ckpt")
        good[name] = torch.load(folder / f"{name}.ckpt", weights_only=True)
        build_module(folder / f"{name}.ckpt", MODULES)
    limit_memory()
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)  # ends the process
    forget_peak()
    before = peak_megabytes()
    for name, (kind, change) in CASES.items():
        content = {**good[kind], "state_dict": dict(good[kind]["state_dict"])}
        content["hyper_parameters"] = dict(content["hyper_parameters"])
        change(content)
        torch.save(content, folder / "evil.ckpt")
        del content
        print(name, flush=True)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        begun = time.process_time()
        try:
            build_module(folder / "evil.ckpt", MODULES)
            outcome = "built"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        grown = peak_megabytes() - before
        print(json.dumps([name, outcome, time.process_time() - begun, grown]), flush=True)


@pytest.mark.heavy
def test_build_module__stated_sizes_are_not_built(tmp_path: Path) -> None:
    script = "import sys, pathlib; from tests.checkpoints.test_validation import read_all"
    run = run_script(f"{script}; read_all(pathlib.Path(sys.argv[1]))", tmp_path, timeout=600)
    assert run.returncode == 0, f"{run.stdout.splitlines()[-1:]} ended with {run.returncode}:\n{run.stderr[-2000:]}"
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    assert [name for name, *_ in found] == list(CASES)
    for name, outcome, seconds, grown in found:
        print(f"{name}: {seconds:.2f} s, {grown} MB, {outcome}")
    for name, outcome, _, grown in found:
        assert outcome.startswith("CheckpointError: [LCD-K015] "), (name, outcome)
        assert "evil.ckpt does not hold the network that it describes: " in outcome, name
        assert "\n" not in outcome
        assert len(outcome) < 700, name
        assert grown < MEGABYTES, name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("faster", {"frozen_stages": 2, "drop_path_rate": 0.1, "out_norm": True, "gradient_checkpointing": True}),
        ("faster", {"backbone": "resnet18", "batch_norm": "train", "frozen_stages": 1, "channels_last": False}),
        ("faster", {"min_size": list(range(64, 97)), "image_mean": (0.4, 0.4, 0.4), "convention": "mmdetection"}),
        ("faster", {"convention": {"base": "mmdetection", "roi_aligned": False}}),
        ("faster", {"convention": Convention(roi_sampling_ratio=0)}),
        ("faster", {"fpn_channels": np.int64(16), "lr": np.float32(0.5), "image_std": np.full(3, 0.25)}),
        ("detr", {"two_stage": True, "frozen_stages": 4, "gradient_checkpointing": True}),
        ("detr", {"box_refinement": False, "extra_levels": 1, "fixed_size": [64, 64], "objects_multiple": 10}),
        ("classifier", {"in_chans": 1, "mixup": 0.2, "drop_path_rate": 0.1, "random_erasing": 0.1}),
        ("faster", {"backbone": "swinv2_tiny_window8_256"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_build_module__what_was_saved(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    defaults = {"faster": TINY, "detr": DETR, "classifier": {"backbone": "test_convnext"}}[kind]
    builder = {"faster": FasterRCNNModule, "detr": DeformableDETRModule, "classifier": ClassifierModule}[kind]
    module = builder(2, NAMES, **{**defaults, **options})
    save_module(module, tmp_path / "a.ckpt")
    found = build_module(tmp_path / "a.ckpt", MODULES)
    assert type(found) is builder
    for name, tensor in module.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", ["faster", "cascade", "detr", "classifier"])
def test_build_module__reads_once_and_builds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The file is opened by us and hashed once (torch opens it to map it); the network's constructor runs once."""
    module = kinds()[kind]
    save_module(module, tmp_path / "a.ckpt")
    build_module(tmp_path / "a.ckpt", MODULES)  # what is found out about a timm network is found out once
    seen: list[str] = []

    def count(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            seen.append(name)  # timm refuses an option that a network does not have, and is asked again without it
            return result

        monkeypatch.setattr(owner, name, counted)

    count(file, "find_fault")
    count(file, "_digest")
    count(torch, "load")
    count(timm, "create_model")
    original, opened = builtins.open, []

    def counted_open(path: object, *args: Any, **options: Any) -> Any:
        opened.append(path)
        return original(path, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(file, "open", counted_open, raising=False)
    build_module(tmp_path / "a.ckpt", MODULES)
    assert sorted(seen) == ["_digest", "create_model", "find_fault", "load"]
    assert opened == [tmp_path / "a.ckpt"]


@pytest.mark.parametrize("size", [70_000, 2_000_000], ids=["small", "larger than the file"])
def test_build_module__what_no_checkpoint_holds(tmp_path: Path, size: int) -> None:
    """Buffers that are not saved, tensors that are no buffers, shared and frozen parameters are as constructed."""

    class Shared(FasterRCNNModule):
        def __init__(self, num_classes: int, **options: Any) -> None:
            super().__init__(num_classes, **options)
            self.register_buffer("indices", torch.arange(size), persistent=False)
            self.first, self.second = nn.Linear(300, 300), nn.Linear(300, 300)
            self.second.weight = self.first.weight

    module = Shared(2, **{**TINY, "backbone": "test_resnet"}, frozen_stages=2, batch_norm="train")
    save_module(module, tmp_path / "a.ckpt")
    found = Shared.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(found.indices, torch.arange(size))
    assert found.second.weight is found.first.weight
    anchors = [m.detector.rpn.anchor_generator.cell_anchors for m in (module, found)]
    assert all(torch.equal(a, b) for a, b in zip(*anchors, strict=True))
    facts = [
        {name: (p.requires_grad, p.stride(), p.device) for name, p in m.named_parameters()} for m in (module, found)
    ]
    assert facts[0] == facts[1]
    assert sum(not learns for learns, *_ in facts[0].values()) > 5


def test_without_weights__in_this_thread_only() -> None:
    made: list[nn.Module] = []
    with without_weights(0):
        thread = threading.Thread(target=lambda: made.append(nn.Linear(300, 300)))
        thread.start()
        thread.join()
        made.append(nn.Linear(300, 300))
    made.append(nn.Linear(300, 300))
    assert [part.weight.is_meta for part in made] == [False, True, False]


def test_constructor__arguments_that_no_checkpoint_could_hold() -> None:
    with pytest.raises(
        TypeError, match="argument 'image_mean' of FasterRCNNModule is a Tensor, which a checkpoint cannot hold"
    ):
        FasterRCNNModule(2, **TINY, image_mean=torch.full((3,), 0.5))


def test_start_module__stated_sizes_are_not_built(tmp_path: Path) -> None:
    save_module(FasterRCNNModule(2, NAMES, **TINY), tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["hyper_parameters"]["fpn_channels"] = 10**6
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"\[LCD-K015\] .*a.ckpt .*hyper-parameters declare \[1000000, "):
        start_module(tmp_path / "a.ckpt", 3)
