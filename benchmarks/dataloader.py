"""Images per second of CPU that one process decodes, augments and batches, side by side with torchvision's datasets.

    python benchmarks/dataloader.py DIR

DIR is a dataset in COCO layout. The peer is ``CocoDetection`` with transforms v2 on tensors ("tensors first"), as
torchvision's detection references use them: Pillow decodes, ``pil_to_tensor``, flip, resize. Both draw sizes from the
same lists; for the crop of ``multiscale``, which torchvision lacks, the peer uses ours. A turn is one pass over the
images without workers, whose transfers would drown the difference; the contestants alternate.
"""

import contextlib
import io
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from lightning_convnext_det.data.batch import collate
from lightning_convnext_det.data.dataset import DetectionDataset
from lightning_convnext_det.data.formats.discovery import find_splits, read_split
from lightning_convnext_det.data.io import decode
from lightning_convnext_det.data.transforms import MULTISCALE_SIZES, RandomSizeCrop, create_transforms
from side_by_side import create_parser, print_header

ROWS = {"multiscale": MULTISCALE_SIZES, "320 px": (320,), "flip": ()}


def ours(root: str, sizes: tuple[int, ...]) -> DataLoader:
    transforms = create_transforms("multiscale" if sizes else "flip", sizes or MULTISCALE_SIZES)
    dataset = DetectionDataset(read_split(find_splits(root)["train"]), transforms, training=True)
    return DataLoader(dataset, batch_size=4, collate_fn=collate)


def theirs(root: str, sizes: tuple[int, ...]) -> DataLoader:
    steps: list[v2.Transform] = [v2.PILToTensor(), v2.RandomHorizontalFlip()]
    if sizes:
        unit = max(sizes) / 800
        resize = v2.RandomShortestSize(list(sizes), 1333)
        shorter = v2.RandomShortestSize([round(side * unit) for side in (400, 500, 600)])
        crop = RandomSizeCrop(round(384 * unit), round(600 * unit))
        steps.append(v2.RandomChoice([resize, v2.Compose([shorter, crop, resize])]))
    steps += [v2.ConvertBoundingBoxFormat("XYXY"), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()]
    annotations = next(Path(root, "annotations").glob("*train*.json"))
    folder = next(path for path in (Path(root, "train2017"), Path(root, "train"), Path(root)) if path.is_dir())
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = CocoDetection(str(folder), str(annotations), transforms=v2.Compose(steps))
    wrapped = wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels", "image_id"))
    with_boxes = [i for i, image in enumerate(dataset.ids) if dataset.coco.getAnnIds(image)]  # it fails without boxes
    return DataLoader(torch.utils.data.Subset(wrapped, with_boxes), batch_size=4, collate_fn=collate)


def seconds_per_image(loader: DataLoader) -> float:
    torch.manual_seed(0)
    random.seed(0)
    start = time.process_time()
    count = sum(len(images) for images, _ in loader)
    return (time.process_time() - start) / count


@contextlib.contextmanager
def without_simplejpeg() -> Iterator[None]:
    with patch.object(decode, "decode_jpeg", lambda _: None):
        yield


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("root")
    parser.set_defaults(repeats=3, threads=1, clock="cpu")
    options = parser.parse_args()
    print_header("Loading", options, ("torchvision", "pillow", "simplejpeg"))
    for name, sizes in ROWS.items():
        loaders = {"torchvision": theirs(options.root, sizes), "here, Pillow": ours(options.root, sizes)}
        loaders["here, simplejpeg"] = loaders["here, Pillow"]
        for label, (times, ratio) in alternate(loaders, options.repeats).items():
            print(f"| {name} | {label} | {times * 1e3:.2f} | {ratio:.3f} | |", flush=True)


def alternate(loaders: dict[str, DataLoader], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds per image, and median ratio to the first, of each loader."""
    times: dict[str, list[float]] = {label: [] for label in loaders}
    contexts: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {"here, Pillow": without_simplejpeg}
    for turn in range(repeats + 1):
        for label, loader in loaders.items():
            with contexts.get(label, contextlib.nullcontext)():
                seconds = seconds_per_image(loader)
            if turn:  # the first one warms up the file cache
                times[label].append(seconds)
    first = next(iter(times.values()))
    return {
        label: (statistics.median(own), statistics.median(a / b for a, b in zip(own, first, strict=True)))
        for label, own in times.items()
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    main()
