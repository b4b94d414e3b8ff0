"""Deformable DETR and DINO on an XLA device; run by ``make test-xla``, in an environment that has torch_xla."""

import math
import os
from collections.abc import Callable

import pytest
import torch

from lightning_convnext_det.metrics.coco_map import DetectionEvaluator
from lightning_convnext_det.models.deformable_detr import denoising
from lightning_convnext_det.models.deformable_detr.criterion import Objects
from lightning_convnext_det.models.deformable_detr.denoising import Noise, draw_noise
from lightning_convnext_det.models.deformable_detr.detector import QueryDetector
from lightning_convnext_det.models.deformable_detr.dino import DINO
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
from lightning_convnext_det.types import Target

pytestmark = pytest.mark.xla

SMALL = {
    "backbone": "test_convnext",
    "num_queries": 20,
    "hidden_dim": 32,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "strides": [16, 32],
    "feedforward_dim": 64,
    "dropout": 0.0,
    "fixed_size": [96, 128],
    "objects_multiple": 8,
}
STEPS = 5


@pytest.fixture(scope="module")
def device() -> torch.device:
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles in half the time
    torch_xla = pytest.importorskip("torch_xla")
    found: torch.device = torch_xla.device()
    return found


def build(**options: object) -> DeformableDETR:
    torch.manual_seed(0)
    return DeformableDETR(3, **{**SMALL, **options})  # type: ignore[arg-type]


def batches(seed: int = 0) -> list[tuple[list[torch.Tensor], list[Target]]]:
    """Images of many sizes with 0 to 7 objects."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(STEPS):
        images, targets = [], []
        for image in range(2):
            height, width = (int(x) for x in torch.randint(60, 150, (2,), generator=generator))
            images.append(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator))
            count = 0 if step == 1 else int(torch.randint(8, (), generator=generator))
            corner = torch.rand(count, 2, generator=generator) * 30
            sides = torch.rand(count, 2, generator=generator) * 25 + 4
            labels = torch.randint(3, (count,), generator=generator)
            boxes = torch.cat([corner, corner + sides], 1)
            targets.append(Target(boxes=boxes, labels=labels, image_id=2 * step + image))
        found.append((images, targets))
    return found


def compiled_graphs() -> int:
    from torch_xla.debug import metrics

    data = metrics.metric_data("CompileTime")
    return int(data[0]) if data else 0


def train(detector: QueryDetector, device: torch.device) -> tuple[list[dict[str, float]], list[int]]:
    """The losses of every step, and how many graphs have been compiled by the end of it."""
    detector.to(device).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    losses, graphs = [], []
    for images, targets in batches():
        optimizer.zero_grad()
        found = detector(images, targets)
        torch.stack(list(found.values())).sum().backward()
        optimizer.step()
        schedule.step()
        if device.type == "xla":
            import torch_xla

            torch_xla.sync()
            graphs.append(compiled_graphs())
        losses.append({name: float(loss.detach().cpu()) for name, loss in found.items()})
    return losses, graphs


def build_dino() -> DINO:
    torch.manual_seed(0)
    return DINO(3, **{**SMALL, "denoising_queries": 16})  # type: ignore[arg-type]


def draw_on_the_host(copies: int, objects: Objects, num_classes: int) -> Noise:
    """Draw the same noise on any device."""
    host = torch.zeros(objects.labels.shape, dtype=torch.int64)
    noise = draw_noise(copies, Objects(torch.zeros(*host.shape, 4), host, objects.counts), num_classes)
    return Noise(*(x.to(objects.boxes.device) for x in noise))


@pytest.mark.parametrize(
    "build",
    [build, lambda: build(two_stage=True), build_dino],
    ids=["boxref", "two_stage", "dino"],
)
def test_query_detector__trains_on_xla_as_on_the_cpu(
    device: torch.device, build: Callable[[], QueryDetector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoising, "draw_noise", draw_on_the_host)
    expected, _ = train(build(), torch.device("cpu"))
    losses, graphs = train(build(), device)
    print(f"\ngraphs compiled by the end of each step: {graphs}")
    for step, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
        worst = max(abs(ours[name] - theirs[name]) for name in theirs)
        print(f"step {step}: sum of losses {sum(ours.values()):.6f} on XLA, {sum(theirs.values()):.6f} on the CPU")
        assert ours.keys() == theirs.keys()
        assert worst < 1e-3 * (step + 1)
    assert graphs[1] == graphs[-1], "shapes that change from step to step are compiled anew"


@pytest.mark.parametrize("build", [build, build_dino], ids=["boxref", "dino"])
def test_query_detector__evaluates_on_xla_as_on_the_cpu(
    device: torch.device, build: Callable[[], QueryDetector]
) -> None:
    figures, found, graphs = [], [], []
    for place in (torch.device("cpu"), device):
        detector = build().to(place).eval()
        evaluator = DetectionEvaluator(["a", "b", "c"])
        for images, targets in batches():
            with torch.no_grad():
                detections = detector(images)
            assert all(d["boxes"].device.type == "cpu" for d in detections)
            evaluator.update(detections, targets)
            found.append(detections)
            graphs.append(compiled_graphs())
        figures.append(evaluator.compute())
    for ours, theirs in zip(found[STEPS:], found[:STEPS], strict=True):
        for detection, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(detection["scores"], other["scores"], atol=1e-5, rtol=0)
            torch.testing.assert_close(detection["boxes"][:5], other["boxes"][:5], atol=1e-2, rtol=0)
    for name, value in figures[0].items():
        assert math.isclose(figures[1][name], value, abs_tol=1e-3) or math.isnan(value), name
    print(f"\ngraphs compiled by the end of each batch: {graphs[STEPS:]}")
    assert graphs[STEPS] == graphs[-1]


@pytest.mark.parametrize("build", [build, build_dino], ids=["boxref", "dino"])
def test_query_detector__nothing_is_computed_on_the_host(
    device: torch.device, build: Callable[[], QueryDetector]
) -> None:
    """Operations that XLA lacks run on the host, with a transfer each way; there must be none within a step."""
    import torch_xla
    from torch_xla.debug import metrics

    metrics.clear_counters()
    detector = build().to(device).train()
    losses = detector(*batches()[0])
    torch.stack(list(losses.values())).sum().backward()
    torch_xla.sync()
    fallbacks = [name for name in metrics.counter_names() if name.startswith("aten::")]
    assert set(fallbacks) <= {"aten::_local_scalar_dense"}
