"""A data set of COCO's size: seconds to read and check it, and memory with two workers over an epoch.

Compared with torchvision's plain ``CocoDetection`` on the same files, each in a process of its own. Memory is
proportional (PSS): a page that several processes share counts once in all.

    python benchmarks/coco_scale.py [--pictures 118000] [--boxes 860000] [--folder FOLDER] [--batches 0]
        [--only ours|torchvision]
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64  # the annotations are what is measured
FILES = 1000  # each is listed many times
CLASSES = 80


def write_data_set(root: Path, pictures: int, boxes: int) -> Path:
    """Write pictures and a JSON file whose records are as long as COCO's, outlines included."""
    chance = random.Random(0)
    (root / "train").mkdir(parents=True)
    (root / "annotations").mkdir()
    for number in range(min(FILES, pictures)):
        pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
        Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(root / "train" / f"{number:012d}.jpg")
    path = root / "annotations" / "instances_train.json"
    with open(path, "w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        for i in range(pictures):
            record = {
                "license": 3, "file_name": f"{i % FILES:012d}.jpg", "coco_url": f"http://host/train/{i:012d}.jpg",
                "height": HEIGHT, "width": WIDTH, "date_captured": "2013-11-14 17:02:52", "id": i,
            }  # fmt: skip
            file.write("," * (i > 0) + json.dumps(record))
        file.write('], "annotations": [')
        for i in range(boxes):
            x, y = round(chance.uniform(0, WIDTH - 12), 2), round(chance.uniform(0, HEIGHT - 12), 2)
            box = [x, y, round(chance.uniform(1, 12), 2), round(chance.uniform(1, 12), 2)]
            outline = [round(x + chance.random(), 2) for _ in range(40)]
            record = {
                "segmentation": [outline], "area": round(box[2] * box[3] * 0.7, 4), "iscrowd": int(i % 90 == 0),
                "image_id": i % pictures, "bbox": box, "category_id": 1 + i % CLASSES, "id": i,
            }  # fmt: skip
            file.write("," * (i > 0) + json.dumps(record))
        categories = [{"supercategory": "x", "id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path


def proportional_megabytes(processes: Iterable[int]) -> float:
    """Sum of the proportional set sizes of processes."""
    total = 0
    for process in processes:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def children() -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def measure(what: str, root: Path, batches: int) -> dict[str, float]:
    """Read the data set and pass through an epoch with two workers; seconds and megabytes."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    found: dict[str, float] = {}
    before = proportional_megabytes([os.getpid()])
    start = time.perf_counter()
    if what == "ours":
        from lightning_convnext_det.data.datamodule import DetectionDataModule

        data = DetectionDataModule(str(root), num_workers=2, batch_size=16, val_fraction=0.0)
        before = proportional_megabytes([os.getpid()])  # the imports of Lightning are not the data set's
        start = time.perf_counter()
        data.setup("fit")
        loader = data.train_dataloader()
    else:
        from torchvision.datasets import CocoDetection
        from torchvision.transforms import v2

        before = proportional_megabytes([os.getpid()])
        start = time.perf_counter()
        files = CocoDetection(str(root / "train"), str(root / "annotations/instances_train.json"), v2.ToImage())
        loader = DataLoader(
            files, 16, shuffle=True, num_workers=2, collate_fn=lambda batch: list(zip(*batch, strict=True))
        )
    found["seconds to read"] = time.perf_counter() - start
    found["seconds of CPU until then, imports included"] = time.process_time()
    found["MB of the process before that"] = before
    found["MB of the data set, one process"] = proportional_megabytes([os.getpid()]) - before
    most, last = 0.0, min(len(loader), batches or len(loader)) - 3  # the workers end with the last batches
    for number, _ in enumerate(loader):
        if number == 0:
            found["seconds to the first batch"] = time.perf_counter() - start
            workers = children()
            found["MB of all processes, first batch"] = proportional_megabytes([os.getpid(), *workers])
        if number % 500 == 0:
            most = max(most, proportional_megabytes([os.getpid(), *workers]))
        if number == last:
            found["MB of all processes, end of the epoch"] = proportional_megabytes([os.getpid(), *workers])
            break
    found["MB of all processes, at most"] = max(most, found["MB of all processes, end of the epoch"])
    found["seconds of the epoch"] = time.perf_counter() - start - found["seconds to the first batch"]
    with open("/proc/self/status") as status:
        found["MB at the peak of reading, one process"] = next(int(x.split()[1]) for x in status if "VmHWM" in x) / 1024
    return found


def seconds_to_check(root: Path) -> float:
    from lightning_convnext_det.data.check import check_dataset

    start = time.perf_counter()
    report = check_dataset(root)
    assert not [problem for problem in report.problems if problem.action != "noted"]
    return time.perf_counter() - start


def run(what: str, root: Path, batches: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, "--folder", str(root), "--batches", str(batches)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    line = result.stdout.splitlines()[-1]
    print(f"{what}: {line}", file=sys.stderr, flush=True)
    return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, default=860_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batches", type=int, default=0, help="end the epoch after so many of 16 pictures")
    parser.add_argument("--only", choices=("ours", "torchvision"))
    parser.add_argument("--measure", choices=("ours", "torchvision", "check"))
    options = parser.parse_args()
    if options.measure == "check":
        seconds = seconds_to_check(options.folder)
        print(json.dumps({"seconds to check": seconds, "seconds of CPU to check": time.process_time()}))
        return
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.batches)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = options.folder or Path(folder) / "set"
        path = root / "annotations" / "instances_train.json"
        if not path.exists():
            write_data_set(root, options.pictures, options.boxes)
        machine = (
            f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
        )
        print(f"{time.strftime('%Y-%m-%d')}, {machine}")
        print(f"{options.pictures:,} pictures, {options.boxes:,} boxes, {path.stat().st_size / 2**20:.0f} MB of JSON\n")
        names = [options.only] if options.only else ["ours", "torchvision"]
        results = {
            name: run(name, root, options.batches) | (run("check", root, 0) if name == "ours" else {}) for name in names
        }
        print("| |" + "|".join(names) + "|\n|---|" + "---|" * len(names))
        for key in dict.fromkeys(key for found in results.values() for key in found):
            print(
                f"| {key} |"
                + "|".join(f"{found[key]:,.1f}" if key in found else "-" for found in results.values())
                + "|"
            )


if __name__ == "__main__":
    main()
