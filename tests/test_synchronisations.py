"""How often the host waits for a GPU in a training step and in a prediction of each detector."""

import gc
import json
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_convnext_det.modules import CascadeRCNNModule, DeformableDETRModule, DINOModule, FasterRCNNModule
from lightning_convnext_det.modules.detection import DetectionModule
from lightning_convnext_det.types import Target
from tests.processes import run_script
from tests.synchronisations import move_module, pretended_device, to_device

SIZES = {"backbone": "test_convnext", "min_size": 64, "max_size": 96}
RCNN = {**SIZES, "fpn_channels": 16, "box_head_features": 16}
QUERIES = {
    **SIZES, "num_queries": 8, "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "feedforward_dim": 32,
}  # fmt: skip
BUILDERS: dict[str, Callable[[], DetectionModule]] = {
    "faster": lambda: FasterRCNNModule(2, **RCNN),
    "faster, mmdetection": lambda: FasterRCNNModule(2, convention="mmdetection", **RCNN),
    "cascade": lambda: CascadeRCNNModule(2, **RCNN),
    "detr": lambda: DeformableDETRModule(2, **QUERIES),
    "detr, two stages": lambda: DeformableDETRModule(2, two_stage=True, **QUERIES),
    "dino": lambda: DINOModule(2, **QUERIES),
}
# of which two are the check of the targets and NMS or matching
TRAINING = {
    "faster": 4, "faster, mmdetection": 4, "cascade": 8, "detr": 2, "detr, two stages": 2, "dino": 2,
}  # fmt: skip


def create_batch() -> tuple[list[Tensor], list[Target]]:
    """Images of two sizes, one with a crowd region, one without an object, whose padding differs."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 64, 80), (3, 60, 70), (3, 96, 64))
    images = [torch.randint(256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
    boxes = torch.tensor([[4.0, 8.0, 40.0, 50.0], [20.0, 20.0, 60.0, 60.0], [1.0, 1.0, 30.0, 20.0]])
    labels, crowd = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 0])
    nothing = torch.zeros(0, dtype=torch.int64)
    return images, [
        Target(boxes=boxes, labels=labels, iscrowd=crowd),
        Target(boxes=boxes[:1], labels=labels[:1], iscrowd=crowd[:1]),
        Target(boxes=torch.zeros(0, 4), labels=nothing, iscrowd=nothing),
    ]


def create_step(
    module: DetectionModule, images: list[Tensor], targets: list[Target], backward: bool = True
) -> Callable[[], None]:
    """A training step as the trainer runs it: losses, gradients (else zeros), clipping, optimizer."""
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss = torch.stack(list(module.detector(images, targets).values())).sum()
        if backward:
            loss.backward()
        else:  # torch's engine looks for the device
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()

    return step


def create_prediction(module: DetectionModule, images: list[Tensor]) -> Callable[[], None]:
    def predict() -> None:
        with torch.no_grad():
            module.detector(images)

    return predict


def describe(notes: list[str]) -> str:
    return "\n".join(f"{count} x {note}" for note, count in Counter(notes).items())


PREDICTION = {"faster": 6, "faster, mmdetection": 6, "cascade": 8, "detr": 1, "detr, two stages": 1, "dino": 1}


def print_counts() -> None:
    """Print what `pretended_counts` reads: what makes the host wait in each detector, and in single calls, as JSON."""
    counts = {}
    with pretended_device() as device:
        for name, build in BUILDERS.items():
            module = move_module(build())
            images, targets = to_device(create_batch())
            step, predict = create_step(module, images, targets, backward=False), create_prediction(module, images)
            step()
            counts[name] = {"training": device.count(step)}
            module.eval()
            counts[name]["prediction"] = device.count(predict)
        x = to_device(torch.tensor([1.0, 2.0, 3.0]))
        names = {"torch": torch, "x": x}
        counts["calls"] = {call: device.count(partial(eval, call, names)) for call in CALLS}
    print(json.dumps(counts))


# how often the host waits for each, by hand
CALLS = {
    "x + 1": 0,
    "torch.where(x > 1, x, 0.0)": 0,
    "x[1:]": 0,
    "x.topk(2)": 0,
    "torch.tensor([1.0]).to(x.device, non_blocking=True)": 0,
    "torch.arange(3, device=x.device)": 0,
    "torch.where(x > 1)": 1,
    "x[x > 1]": 1,
    "x[[0, 1]]": 1,
    "bool((x > 1).all())": 1,
    "float(x.sum())": 1,
    "x.tolist()": 1,
    "x.cpu().numpy()": 1,
    "x.new_tensor([1.0, 2.0])": 1,
    "torch.tensor([1.0], device=x.device)": 1,
    "torch.tensor([1.0]).to(x.device)": 1,
    "torch.unique(x)": 1,
}


@pytest.fixture(scope="module")
def pretended_counts() -> dict[str, dict[str, list[str]]]:
    """In a process of its own: gradients do not work any more in one that has pretended a device."""
    script = "from tests.test_synchronisations import print_counts; print_counts()"
    done = run_script(script, DISABLE_CUSTOM_KERNELS="1")  # Triton's need the device
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.heavy
def test_device_count__single_calls(pretended_counts: dict[str, dict[str, list[str]]]) -> None:
    assert {call: len(notes) for call, notes in pretended_counts["calls"].items()} == CALLS


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "declared"), [("training", TRAINING), ("prediction", PREDICTION)])
@pytest.mark.parametrize("name", BUILDERS)
def test_detector__waits_as_often_as_declared(
    name: str, kind: str, declared: dict[str, int], pretended_counts: dict[str, dict[str, list[str]]]
) -> None:
    notes = pretended_counts[name][kind]
    print(f"\n{name}, {kind}: {len(notes)}\n{describe(notes)}")
    assert len(notes) == declared[name], describe(notes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["training", "prediction"])
@pytest.mark.parametrize("name", BUILDERS)
def test_detector__waits_on_a_gpu_as_often_as_declared(name: str, kind: str) -> None:
    """The same as CUDA itself reports it, after two steps that compile, allocate and fill caches."""
    device = torch.device("cuda")
    module = BUILDERS[name]().to(device).train(kind == "training")
    images, targets = create_batch()
    images = [image.to(device) for image in images]
    targets = [Target(**{key: value.to(device) for key, value in target.items()}) for target in targets]
    run = create_step(module, images, targets) if kind == "training" else create_prediction(module, images)
    run()
    run()
    gc.collect()
    torch.cuda.synchronize()
    notes = record_warnings(run)
    limit = (TRAINING if kind == "training" else PREDICTION)[name]
    print(f"\n{name}, {kind}: {len(notes)}\n{describe(notes)}")
    assert len(notes) <= limit, describe(notes)


def record_warnings(run: Callable[[], None]) -> list[str]:
    """Return where CUDA has reported that the host waited: the file and line of Python that made the call."""
    notes: list[str] = []

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "synchronizing CUDA operation" in str(message):
            frames = [f for f in traceback.extract_stack() if "lightning_convnext_det" in f.filename]
            where = frames[-1] if frames else traceback.extract_stack()[-2]
            notes.append(f"{where.filename.rpartition('/')[2]}:{where.lineno} {where.line}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]  # with the stack, which a record does not have
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return notes
