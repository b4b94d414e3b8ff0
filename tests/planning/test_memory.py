"""The memory that is planned, against the peak of torch's allocator in a real step."""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lightning_convnext_det import FasterRCNN
from lightning_convnext_det.planning.machine import Machine
from lightning_convnext_det.planning.memory import PER_PARAMETER, measure_step
from lightning_convnext_det.planning.plan import plan
from tests.planning.sets import SETS

NARROW = {"fpn_channels": 64, "box_head_features": 256, "box_batch_size_per_image": 128}
ROWS = [
    ("test_convnext", (128, 160), 2, {}),
    ("test_convnext", (256, 320), 1, {"fpn_channels": 64}),
    ("convnext_atto", (128, 160), 2, NARROW),
    pytest.param("convnext_atto", (256, 320), 2, NARROW, marks=pytest.mark.slow),
    pytest.param("resnet18", (192, 256), 1, {"fpn_channels": 128}, marks=pytest.mark.slow),
    pytest.param("convnext_atto", (320, 416), 1, {}, marks=pytest.mark.slow),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("backbone", "size", "batch", "options"), ROWS)
def test_measure_step__is_the_peak_of_a_step(
    backbone: str, size: tuple[int, int], batch: int, options: dict[str, int], tmp_path: Path
) -> None:
    detector = FasterRCNN(3, backbone, min_size=size[0], max_size=size[1], **options).train()
    planned = measure_step(3, backbone, size, **options).bytes(batch)
    assert planned == pytest.approx(measure_peak(detector, size, batch, tmp_path), rel=0.15)


def measure_peak(detector: FasterRCNN, size: tuple[int, int], batch: int, folder: Path) -> float:
    """Bytes at the peak of a step, with weights and the moments of AdamW, which are there before it."""
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-4)
    images = [torch.rand(3, *size) for _ in range(batch)]
    boxes = torch.tensor([[4.0, 8.0, 60.0, 60.0], [10.0, 10.0, 40.0, 90.0]])

    def step() -> None:
        targets = [{"boxes": boxes, "labels": torch.tensor([0, 1])} for _ in images]
        torch.stack(list(detector(images, targets).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    allocated = [e["args"] for e in events if e.get("name") == "[memory]"]
    before = allocated[0]["Total Allocated"] - allocated[0]["Bytes"]
    learning = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    standing = PER_PARAMETER - 4  # of each parameter all but its gradient
    return float(max(a["Total Allocated"] for a in allocated) - before + standing * learning)


@pytest.mark.parametrize(("gib", "batch", "accumulated"), [(80, 16, None), (24, 16, None), (6, 4, 4), (1, 1, 16)])
def test_plan__batches_fit_and_are_accumulated(gib: int, batch: int, accumulated: int | None) -> None:
    machine = Machine(8, gib * 2**30, "cuda", bfloat16=True)
    made = plan(SETS["COCO's size"], machine)
    assert made["data.batch_size"] == batch
    assert ("trainer.accumulate_grad_batches" in made) == (accumulated is not None)
    assert accumulated is None or made["trainer.accumulate_grad_batches"] == accumulated
