"""A dataset of COCO's size: CPU time to read and check it, and memory with two workers over an epoch.

Compared with torchvision's plain ``CocoDetection`` on the same files, each in a process of its own. Memory is
proportional (PSS): a page that several processes share counts once in all.

    python benchmarks/coco_scale.py [--images 118000] [--boxes 860000] [--folder FOLDER] [--batches 0]
        [--only ours|torchvision] > benchmarks/results/cpu/coco_scale.md
    python benchmarks/coco_scale.py --starts --images 1000000 --boxes 7300000
    python benchmarks/coco_scale.py --evaluation --images 1000000

``--starts`` measures the first start, which fills the cache of annotations, a second one, and four at once; its image
files are links to a thousand different ones. ``--evaluation`` measures the memory of an evaluator that has the detections
of that many images, as rank 0 has at the end of a validation.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64  # the annotations are what is measured
DIFFERENT = 1000  # images and outlines; the files differ in a comment
CLASSES = 80


def write_dataset(root: Path, num_images: int, boxes: int, links: bool = False) -> Path:
    """Write images, no two alike or links, and a JSON file whose records are as long as COCO's, outlines included."""
    (root / "train").mkdir(parents=True)
    (root / "annotations").mkdir()
    images = [encode_image(number) for number in range(min(DIFFERENT, num_images))]
    for number in range(num_images):
        content, comment = images[number % DIFFERENT], b"%012d" % number
        content = content[:2] + b"\xff\xfe\x00\x0e" + comment + content[2:]  # JPEG's comment, after its first marker
        if links and number >= DIFFERENT:
            os.link(root / "train" / f"{number % DIFFERENT:012d}.jpg", root / "train" / f"{number:012d}.jpg")
        else:
            (root / "train" / f"{number:012d}.jpg").write_bytes(content)
    path = root / "annotations" / "instances_train.json"
    with open(path, "w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        file.write(", ".join(map(image_record, range(num_images))))
        file.write('], "annotations": [')
        for number, record in enumerate(annotation_records(boxes, num_images)):
            file.write(f", {record}" if number else record)
        categories = [{"supercategory": "x", "id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path


def encode_image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(file, "JPEG")
    return file.getvalue()


def image_record(number: int) -> str:
    return (
        f'{{"license": 3, "file_name": "{number:012d}.jpg", "coco_url": "http://host/train/{number:012d}.jpg", '
        f'"height": {HEIGHT}, "width": {WIDTH}, "date_captured": "2013-11-14 17:02:52", "id": {number}}}'
    )


def annotation_records(count: int, num_images: int) -> Iterator[str]:
    chance = np.random.default_rng(0)
    outlines = [json.dumps(chance.uniform(0, HEIGHT, 40).round(2).tolist()) for _ in range(DIFFERENT)]
    xs, ys = chance.uniform(0, WIDTH - 12, count).round(2), chance.uniform(0, HEIGHT - 12, count).round(2)
    widths, heights = chance.uniform(1, 12, (2, count)).round(2)
    for i, (x, y, width, height) in enumerate(zip(xs, ys, widths, heights, strict=True)):
        yield (
            f'{{"segmentation": [{outlines[i % DIFFERENT]}], "area": {width * height * 0.7:.4f}, '
            f'"iscrowd": {int(i % 90 == 0)}, "image_id": {i % num_images}, '
            f'"bbox": [{x:.2f}, {y:.2f}, {width:.2f}, {height:.2f}], "category_id": {1 + i % CLASSES}, "id": {i}}}'
        )


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
    """Read the dataset and pass through an epoch with two workers; seconds of CPU and megabytes."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    found: dict[str, float] = {}
    if what == "ours":
        from lightning_convnext_det.data.datamodule import DetectionDataModule

        data = DetectionDataModule(str(root), num_workers=2, batch_size=16, val_fraction=0.0, cache="none")
        before = proportional_megabytes([os.getpid()])  # the imports of Lightning are not the dataset's
        begun = time.process_time()
        data.setup("fit")
        loader = data.train_dataloader()
    else:
        from torchvision.datasets import CocoDetection
        from torchvision.transforms import v2

        before = proportional_megabytes([os.getpid()])
        begun = time.process_time()
        files = CocoDetection(str(root / "train"), str(root / "annotations/instances_train.json"), v2.ToImage())
        loader = DataLoader(
            files, 16, shuffle=True, num_workers=2, collate_fn=lambda batch: list(zip(*batch, strict=True))
        )
    found["seconds of CPU to read"] = time.process_time() - begun
    found["MB of the process before that"] = before
    found["MB that the dataset adds to one process"] = proportional_megabytes([os.getpid()]) - before
    most, wanted = 0.0, min(len(loader), batches or len(loader))
    for number, _ in enumerate(loader):
        if number == 0:
            found["seconds of CPU until the first batch, imports included"] = time.process_time()
            workers = children()
            found["MB of all processes, first batch"] = proportional_megabytes([os.getpid(), *workers])
        if number % 500 == 0 or number == wanted - 3:  # the workers end with the last batches
            most = max(most, last := proportional_megabytes([os.getpid(), *workers]))
        if number == wanted - 1:
            break
    found["MB of all processes, at the end"] = last
    found["MB of all processes, at most"] = most
    del _, loader  # which ends the workers
    found["batches"] = wanted
    found["seconds of CPU from reading to the end, workers included"] = cpu_seconds() - begun
    found["MB resident at the peak, one process, libraries included"] = peak_megabytes()
    return found


def cpu_seconds() -> float:
    """Seconds of CPU of this process, and of its children that have ended."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(t.ru_utime + t.ru_stime for t in times)


def peak_megabytes() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if "VmHWM" in line) / 1024


def measure_start(root: Path, cache: str) -> None:
    """Start once, print a line of figures, and live on until a line comes, so that several share their pages."""
    import torch

    from lightning_convnext_det.data.datamodule import DetectionDataModule

    torch.set_num_threads(1)
    before, cpu, wall = anonymous_megabytes(), time.process_time(), time.perf_counter()
    data = DetectionDataModule(str(root), num_workers=0, batch_size=16, val_fraction=0.0, cache=cache)
    data.setup("fit")
    loader = data.train_dataloader()
    found = {"seconds to read": time.perf_counter() - wall, "seconds of CPU to read": time.process_time() - cpu}
    next(iter(loader))
    found["seconds until the first batch"] = time.perf_counter() - wall
    print("started", flush=True)
    sys.stdin.readline()
    found["MB that the dataset adds, anonymous"] = anonymous_megabytes() - before
    found["MB that the dataset adds, its share of the mapped cache"] = mapped_megabytes(".annotations")
    found["MB resident at the peak, libraries included"] = peak_megabytes()
    print(json.dumps(found), flush=True)
    sys.stdin.readline()


def measure_evaluation(num_images: int, found: int = 10, objects: int = 7) -> dict[str, float]:
    """Evaluate synthetic detections in batches of 16."""
    import torch

    from lightning_convnext_det.metrics.coco_map import DetectionEvaluator

    torch.set_num_threads(1)
    evaluator = DetectionEvaluator([f"class {i}" for i in range(CLASSES)])
    batches = [synthetic_detections(16, found, objects, seed) for seed in range(64)]
    before, cpu = anonymous_megabytes(), time.process_time()
    for start in range(0, num_images, 16):
        detections, targets = batches[start // 16 % len(batches)]
        for number, target in enumerate(targets):
            target["image_id"] = start + number
        evaluator.update(detections, targets)
    kept, updated = anonymous_megabytes() - before, time.process_time() - cpu
    metrics = evaluator.compute()
    return {
        "seconds of CPU to add the images": updated,
        "MB that their records take": kept,
        "bytes of an image": kept * 2**20 / num_images,
        "seconds of CPU to compute the metrics": time.process_time() - cpu - updated,
        "MB resident at the peak, libraries included": peak_megabytes(),
        "MB of the process without them": before,
        "mAP": metrics["map"],
    }


def synthetic_detections(images: int, found: int, objects: int, seed: int) -> tuple[list, list]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    detections, targets = [], []
    for _ in range(images):
        corners = torch.rand(objects, 2, generator=generator) * 400
        boxes = torch.cat([corners, corners + 10 + 100 * torch.rand(objects, 2, generator=generator)], 1)
        labels = torch.randint(CLASSES, (objects,), generator=generator)
        chosen = torch.randint(objects, (found,), generator=generator)
        moved = boxes[chosen] + 5 * torch.randn(found, 4, generator=generator)
        scores = torch.rand(found, generator=generator).sort(descending=True).values
        detections.append({"boxes": moved, "labels": labels[chosen], "scores": scores})
        targets.append({"boxes": boxes, "labels": labels})
    return detections, targets


def anonymous_megabytes() -> float:
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss_Anon:")) / 1024


def mapped_megabytes(suffix: str) -> float:
    """Proportional size of the mapped files with a suffix."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counts = line.endswith(suffix)
        elif counts and line.startswith("Pss:"):
            total += int(line.split()[1])
    return total / 1024


def run_starts(root: Path, cache: Path, processes: int) -> dict[str, float]:
    """Start processes at once; the mean of what they measure."""
    command = [sys.executable, __file__, "--measure", "start", "--folder", str(root), "--cache", str(cache)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(processes)]
    results = []
    for process in running:  # all have started
        while not process.stdout.readline().startswith("started"):
            if process.poll() is not None:
                raise SystemExit("a start failed")
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
        results.append(json.loads(process.stdout.readline()))
    for process in running:
        process.communicate("\n")
    return {key: sum(result[key] for result in results) / processes for key in results[0]}


def print_starts(options: argparse.Namespace, root: Path) -> None:
    cache = root.parent / "cache"
    columns = {"first start": 1, "second start": 1, "four at once, each": 4}
    results = {}
    for name, processes in columns.items():
        results[name] = run_starts(root, cache, processes)
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    sizes = [sum(f.stat().st_size for f in folder.glob("*")) / 2**20 for folder in (root / "annotations", cache)]
    print(f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}.")
    print(
        f"{options.images:,} images, {options.boxes:,} boxes, {sizes[0]:,.0f} MB of JSON, {sizes[1]:,.0f} MB of cache. "
        "Reading and the first batch of 16, in the process itself, after the imports.\n"
    )
    print("| `benchmarks/coco_scale.py --starts` | " + " | ".join(results) + " |\n|---" + "|---:" * len(results) + "|")
    for key in results["first start"]:
        print(f"| {key} | " + " | ".join(f"{found[key]:,.1f}" for found in results.values()) + " |")


def measure_check(root: Path) -> dict[str, float]:
    """Run ``convnext-det check`` to its end."""
    from lightning_convnext_det.cli.main import main as command

    sizes = [before := anonymous_megabytes()]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            sizes.append(anonymous_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with redirect_stdout(sys.stderr):
        status = command(["check", str(root)])
    ended.set()
    watcher.join()
    if status:
        raise SystemExit(f"check ended with status {status}")
    return {
        "seconds of CPU of `convnext-det check`, imports included": cpu_seconds(),
        "MB that `convnext-det check` adds at most, without mapped files": max(sizes) - before,
        "MB resident at the peak of `convnext-det check`, libraries included": peak_megabytes(),
    }


def run(what: str, root: Path, batches: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, "--folder", str(root), "--batches", str(batches)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    line = result.stdout.splitlines()[-1]
    print(f"{what}: {line}", file=sys.stderr, flush=True)
    return json.loads(line)


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text()
    return next((line.partition(": ")[2] for line in text.splitlines() if "model name" in line), platform.machine())


def print_table(options: argparse.Namespace, size: int, results: dict[str, dict[str, float]]) -> None:
    import torch
    import torchvision

    print("# A dataset of COCO's size\n")
    print(
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__.partition('+')[0]}, torchvision {torchvision.__version__.partition('+')[0]}."
    )
    print(
        f"{options.images:,} images, {options.boxes:,} boxes, {size / 2**20:.0f} MB of JSON. Memory is proportional "
        "(PSS) unless called resident, batches of 16, two workers.\nOurs checks every record and opens every image's "
        "header while it reads.\n"
    )
    print("| `benchmarks/coco_scale.py` | " + " | ".join(results) + " |\n|---" + "|---:" * len(results) + "|")
    for key in dict.fromkeys(key for found in results.values() for key in found):
        cells = (f"{found[key]:,.0f}" if key in found else "" for found in results.values())
        print(f"| {key} | " + " | ".join(cells) + " |")


def print_evaluation(num_images: int) -> None:
    print(f"{time.strftime('%Y-%m-%d')}, {processor()}, {num_images:,} images of 10 detections and 7 objects.\n")
    print("| `benchmarks/coco_scale.py --evaluation` | |\n|---|---:|")
    for key, value in measure_evaluation(num_images).items():
        print(f"| {key} | {value:,.3g} |" if value < 1 else f"| {key} | {value:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, default=860_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batches", type=int, default=0, help="end the epoch after so many of 16 images")
    parser.add_argument("--only", choices=("ours", "torchvision"))
    parser.add_argument("--starts", action="store_true", help="measure starts with the cache of annotations")
    parser.add_argument("--evaluation", action="store_true", help="measure the memory of an evaluator")
    parser.add_argument("--cache", default="none")
    parser.add_argument("--measure", choices=("ours", "torchvision", "check", "start"))
    options = parser.parse_args()
    if options.measure == "start":
        measure_start(options.folder, options.cache)
        return
    if options.measure:
        check = options.measure == "check"
        found = measure_check(options.folder) if check else measure(options.measure, options.folder, options.batches)
        print(json.dumps(found))
        return
    if options.evaluation:
        print_evaluation(options.images)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = options.folder or Path(folder) / "set"
        path = root / "annotations" / "instances_train.json"
        if not path.exists():
            write_dataset(root, options.images, options.boxes, links=options.starts)
        if options.starts:
            print_starts(options, root)
            return
        results = {}
        if options.only != "torchvision":
            results["ours"] = run("check", root, 0) | run("ours", root, options.batches)
        if options.only != "ours":
            results["torchvision's CocoDetection"] = run("torchvision", root, options.batches)
        print_table(options, path.stat().st_size, results)


if __name__ == "__main__":
    main()
