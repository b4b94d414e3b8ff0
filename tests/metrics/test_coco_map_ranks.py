"""Evaluation on 1, 2 and 3 processes with uneven shares, over gloo."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_script

# row -> the images of each process
SHARES = {
    "1 process": [range(9)],
    "2 even": [range(5), range(5, 9)],
    "2 uneven": [range(1), range(1, 9)],
    "2, one idle": [range(9), range(0)],
    "2, the first idle": [range(0), range(9)],
    "2, interleaved": [range(0, 9, 2), range(1, 9, 2)],
    "2, one image twice": [range(5), range(4, 9)],
    "3 uneven": [range(2), range(2, 3), range(3, 9)],
    "3, two idle": [range(0), range(9), range(0)],
    "3, only images without boxes on one": [[0, 3], [1, 2, 4, 5, 6], [7, 8]],
}
UNDEFINED = {
    "1, nobody has images": [range(0)],
    "2, nobody has images": [range(0), range(0)],
    "2, no boxes": [[0], [3]],
    "3, one crowd": [[0], [8], [3]],
}

SCRIPT = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from lightning_convnext_det.metrics.coco_map import DetectionEvaluator
from tests.processes import launch

def images():
    # 9 images of up to 6 objects of 3 classes; 0 and 3 have none, 8 only a crowd; two digits of score: many ties
    generator = torch.Generator().manual_seed(5)
    for i in range(9):
        count = 0 if i in (0, 3) else 1 if i == 8 else 2 + i % 5
        corners = torch.rand(count, 2, generator=generator) * 300
        boxes = torch.cat([corners, corners + 8 + torch.rand(count, 2, generator=generator) * 150], 1)
        labels = torch.randint(0, 3, (count,), generator=generator)
        crowd = torch.full((count,), i == 8)
        shifted = boxes + torch.randn(count, 4, generator=generator) * 6
        extra = torch.rand(3, 4, generator=generator) * 100
        extra[:, 2:] += extra[:, :2] + 5
        scores = (torch.rand(count + 3, generator=generator) * 100).round() / 100
        found = {"boxes": torch.cat([shifted, extra]), "scores": scores,
                 "labels": torch.cat([labels, torch.randint(0, 3, (3,), generator=generator)])}
        target = {"boxes": boxes, "labels": labels, "image_id": i * 10}
        if i % 2 or crowd.any():  # the optional fields are not in every target, nor on every process
            target |= {"iscrowd": crowd, "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])}
        yield found, target

def evaluate(rank, world_size):
    if world_size > 1:
        dist.init_process_group("gloo")
    everything = list(images())
    for name, shares in rows[world_size].items():
        evaluator = DetectionEvaluator(["a", "b", "c"])
        for i in shares[rank]:
            evaluator.update([everything[i][0]], [everything[i][1]])
        figures = evaluator.compute()
        print(json.dumps([name, rank, figures, evaluator.undefined]))

table = json.loads(sys.argv[2])
rows = {n: {k: v for k, v in table.items() if len(v) == n} for n in (1, 2, 3)}
for world_size in rows:
    log = Path(sys.argv[1], f"world{world_size}")
    assert launch(evaluate, world_size, log) == [0] * world_size, log
"""


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[dict[str, float], str | None]]]:
    """For each row what each process has computed."""
    folder = tmp_path_factory.mktemp("figures")
    table = {name: [list(share) for share in shares] for name, shares in (SHARES | UNDEFINED).items()}
    run = run_script(SCRIPT, folder, json.dumps(table))
    logs = "".join(log.read_text() for log in sorted(folder.glob("world*")))
    assert run.returncode == 0, run.stderr + logs
    found: dict[str, Any] = {}
    for line in logs.splitlines():
        if line.startswith('["'):  # torch 2.9 prints "[Gloo] Rank 0 is connected" there, too
            name, _, values, reason = json.loads(line)
            found.setdefault(name, []).append((values, reason))
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("row", SHARES)
def test_compute__the_same_to_12_digits_for_any_shares(
    figures: dict[str, list[tuple[dict[str, float], str | None]]], row: str
) -> None:
    expected = figures["1 process"][0][0]
    assert 0.1 < expected["map"] < 0.9
    assert len(figures[row]) == len(SHARES[row])
    for found, reason in figures[row]:
        assert reason is None
        assert set(found) == set(expected)
        for name, value in expected.items():
            same = math.isnan(found[name]) if math.isnan(value) else abs(found[name] - value) < 1e-12
            assert same, (name, value, found[name])


@pytest.mark.heavy
@pytest.mark.parametrize("row", UNDEFINED)
def test_compute__undefined_says_why_on_every_process(
    figures: dict[str, list[tuple[dict[str, float], str | None]]], row: str
) -> None:
    whys = {
        "1, nobody has images": "no image was evaluated",
        "2, nobody has images": "no image was evaluated",
        "2, no boxes": "the 2 images have no boxes",
        "3, one crowd": "the 3 images have 1 boxes, which are all crowd regions or difficult",
    }
    for found, reason in figures[row]:
        assert all(math.isnan(value) for value in found.values())
        assert reason == whys[row]


def test_steps__communicate_nothing() -> None:
    """Collective calls are made when the epoch ends and nowhere else: shares have different numbers of steps."""
    source = Path(__file__).parents[2] / "src" / "lightning_convnext_det"
    text = (source / "metrics" / "coco_map.py").read_text() + (source / "modules" / "detection.py").read_text()
    assert "sync_dist" not in text
    assert text.count("dist.gather_object") == text.count("dist.broadcast_object_list") == 1
