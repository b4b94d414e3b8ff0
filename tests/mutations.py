"""Damaged files of every kind that the package reads, and what must be true of each: run by ``test_mutations.py``.

    python -m tests.mutations KIND COUNT SEED

reads COUNT files in this process, under a limit of its address space, and prints the number of a file before it is
read, so that a crash can be laid to it: the same number gives the same bytes. What must hold: an error of this package,
or a result that an independent parser finds in the same bytes. A digit turned into another is a file that states
another box, which nothing can notice; what may never happen is a box that the file does not state, or one left out
without a word.
"""

import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from lightning_convnext_det.data.annotations import DetectionAnnotations, Problem
from lightning_convnext_det.data.check import check_dataset
from lightning_convnext_det.data.dataset import DetectionDataset
from lightning_convnext_det.data.formats.discovery import find_splits, read_split
from lightning_convnext_det.errors import CheckpointError, DataError, WeightsError
from lightning_convnext_det.models.backbone_weights import load_backbone_weights
from lightning_convnext_det.modules import FasterRCNNModule
from lightning_convnext_det.modules.registry import load_module, save_module

SPACE = 1 << 30  # bytes of address space beyond what the imports take
SECONDS = 30  # of CPU for one file
TOKENS = [b"null", b"-1", b"1e999", b"NaN", b'"', b"{", b"]", b"</", b"&", b"\0", b"\xff", b"../", b"_", b" ", b"\n"]
TOKENS += [b"99999999999999999999", b"[" * 3000, b"<a>" * 40, b"!!python/object/apply:os.abort []", b"&a [*a]"]
HEIGHT, WIDTH = 48, 64

Read = Callable[[Path], object]
"""Reads a damaged file; raises AssertionError if it gives what the file does not state."""


class Kind(NamedTuple):
    """A kind of file: two good ones, where to put the damaged one, and how to read it."""

    good: bytes
    donor: bytes
    path: Path
    read: Read


def mutate(good: bytes, donor: bytes, chance: random.Random) -> bytes:
    """Flip bits, change digits, put tokens in, repeat or drop stretches, cut short, or go on as another file does."""
    damaged = bytearray(good)
    for _ in range(chance.choice([1, 1, 2, 4])):
        place = chance.randrange(max(1, len(damaged)))
        match chance.randrange(8):
            case 0 | 1 if damaged:
                damaged[place % len(damaged)] ^= 1 << chance.randrange(8)
            case 5 | 6:
                digits = [i for i, byte in enumerate(damaged) if chr(byte).isdigit()] or [0]
                damaged[(place := chance.choice(digits)) : place + 1] = b"%d" % chance.randrange(10)
            case 2:
                damaged[place : place + chance.randrange(6)] = chance.choice(TOKENS)
            case 3:
                damaged[place : place + chance.randrange(64)] = damaged[: chance.randrange(64)]
            case 4:
                del damaged[place:]
            case _:
                damaged[place:] = donor[chance.randrange(len(donor)) :]
    return bytes(damaged)


# ---- annotations: the table must hold what an independent parser reads


def _read(root: Path) -> DetectionAnnotations:
    """The table of a dataset of one split, refused like a training refuses it."""
    (split,) = find_splits(root).values()
    table = read_split(split)
    assert np.isfinite(table.boxes).all()
    assert np.isfinite(table.area).all()
    assert (table.boxes[:, 2:] > table.boxes[:, :2]).all()
    assert np.isin(table.labels, np.arange(len(table.class_names))).all()
    assert table.offsets[-1] == len(table.boxes) == len(table.area) == len(table.crowd)
    return table


def _compare(root: Path, stated: Callable[[], list[tuple[float, ...]]]) -> None:
    """Read a dataset of one annotation file; ``stated`` gives the corners in it by another parser."""
    check_dataset(root)
    table = _read(root)
    left_out = sum(_is_of_record(problem) for problem in table.problems if problem.action == "dropped")
    corners = stated()
    assert len(table.boxes) + left_out == len(corners), f"{len(corners)} stated, {len(table.boxes)} + {left_out} read"
    limits = [WIDTH, HEIGHT, WIDTH, HEIGHT]
    known = {tuple(np.clip(np.float64(box), 0, limits).astype(np.float32).tolist()) for box in corners}
    assert {tuple(box) for box in table.boxes.tolist()} <= known, f"{table.boxes.tolist()} are not among {known}"


def _is_of_record(problem: Problem) -> bool:
    return problem.record.startswith(("annotation", "object", "line"))


def _coco(root: Path) -> Kind:
    def content(boxes: list[list[float]]) -> bytes:
        annotations = [
            {"id": i, "image_id": 1 + i % 2, "category_id": 1, "bbox": box, "area": 90, "iscrowd": 0}
            for i, box in enumerate(boxes, 1)
        ]
        images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (1, 2)]
        return json.dumps({"images": images, "annotations": annotations, "categories": [_CAT]}).encode()

    path = root / "annotations" / "instances_train.json"

    def corners() -> list[tuple[float, ...]]:
        members = json.loads(path.read_bytes().decode("utf-8-sig"))["annotations"]
        boxes = [[float(value) for value in member["bbox"]] for member in members]
        return [(x, y, x + width, y + height) for x, y, width, height in boxes]

    good = content([[1.25, 2, 9.5, 9], [12, 20, 30, 20], [40, 5, 12.75, 40]])
    return Kind(good, content([[3, 3, 8, 8], [1, 1, 60, 40]]), path, lambda _: _compare(root, corners))


def _voc(root: Path) -> Kind:
    path = root / "train" / "1.xml"

    def content(boxes: list[list[float]]) -> bytes:
        tags = ("xmin", "ymin", "xmax", "ymax")
        objects = "".join(
            "<object><name>cat</name><difficult>0</difficult><bndbox>"
            + "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(tags, box, strict=True))
            + "</bndbox></object>"
            for box in boxes
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        return f"<annotation><filename>1.png</filename>{size}{objects}</annotation>".encode()

    def corners() -> list[tuple[float, ...]]:
        def number(element: ElementTree.Element, tag: str) -> float:
            text = (element.findtext(f"bndbox/{tag}") or "").strip()
            assert re.fullmatch(r"[-+]?[0-9]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?", text), f"{text!r} is taken for a number"
            return float(text)

        objects = ElementTree.fromstring(path.read_bytes()).findall("object")
        return [(number(e, "xmin") - 1, number(e, "ymin") - 1, number(e, "xmax"), number(e, "ymax")) for e in objects]

    good = content([[2, 3, 10.5, 12], [13, 21, 42, 40], [41, 6, 52, 45]])
    return Kind(good, content([[4, 4, 11, 11], [2, 2, 61, 41]]), path, lambda _: _compare(root, corners))


def _yolo(root: Path) -> Kind:
    path = root / "train" / "1.txt"
    (root / "data.yaml").write_text("train: train\nnames: [cat]\n")

    def corners() -> list[tuple[float, ...]]:
        rows = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        found = []
        for row in rows:
            assert all(re.fullmatch(r"[-+0-9.eE]+", word) for word in row), f"{row} is taken for numbers"
            if len(row) > 5:  # an outline
                xs, ys = [float(v) for v in row[1::2]], [float(v) for v in row[2::2]]
                x, y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
                width, height = max(xs) - min(xs), max(ys) - min(ys)
            else:
                x, y, width, height = (float(v) for v in row[1:])
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            found.append(tuple(v * side for v, side in zip(box, (WIDTH, HEIGHT) * 2, strict=True)))
        return found

    good = b"0 0.5 0.5 0.25 0.5\n0 0.25 0.3 0.125 0.2\n0 0.75 0.25 0.5 0.375\n"
    return Kind(good, b"0 0.4 0.4 0.2 0.2\n0 0.6 0.6 0.25 0.25\n", path, lambda _: _compare(root, corners))


def _yaml(root: Path) -> Kind:
    path = root / "data.yaml"
    (root / "train" / "1.txt").write_text("0 0.5 0.5 0.25 0.5\n1 0.875 0.5 0.125 1.0\n")

    def read(_: Path) -> None:
        check_dataset(root)
        table = _read(root)
        names = yaml.safe_load(path.read_text(encoding="utf-8-sig"))["names"]
        assert list(table.class_names) == [str(names[i]).strip() for i in range(len(names))]

    return Kind(b"path: .\ntrain: train\nnames:\n  0: cat\n  1: dog\n", b"train: [train]\nnames: [a, b]\n", path, read)


# ---- images: what is decoded has the size that the boxes refer to


def _image(root: Path, suffix: str) -> Kind:
    path = root / "train" / f"1{suffix}"
    image = {"id": 1, "file_name": path.name, "height": HEIGHT, "width": WIDTH}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 30], "area": 900}
    file = root / "annotations" / "instances_train.json"
    file.write_text(json.dumps({"images": [image], "annotations": [annotation], "categories": [_CAT]}))
    good = _encoded(0, suffix)
    Path(path).write_bytes(good)
    pixels = DetectionDataset(read_split(find_splits(root)["train"]), training=False)[0][0]

    def read(_: Path) -> None:
        report = check_dataset(root, decode=True)
        table = read_split(find_splits(root)["train"])
        found, target = DetectionDataset(table, training=False)[0]
        assert found.shape == (3, HEIGHT, WIDTH)
        assert target["boxes"].tolist() == [[1, 2, 31, 32]]
        # a PNG has checksums, which check --decode compares; damage of a JPEG is not to be told from its pixels
        if suffix == ".png" and not any(problem.action == "refused" for problem in report.problems):
            assert torch.equal(found, pixels), "check --decode passes a damaged PNG with other pixels"

    return Kind(good, _encoded(1, suffix), path, read)


def _encoded(seed: int, suffix: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(file, {".png": "PNG", ".jpg": "JPEG"}[suffix])
    return file.getvalue()


# ---- weights: an error, or tensors of the right names and shapes


def _module(seed: int) -> FasterRCNNModule:
    torch.manual_seed(seed)
    sizes = {"min_size": 64, "max_size": 96, "fpn_channels": 8, "box_head_features": 8}
    return FasterRCNNModule(2, ["cat", "dog"], backbone="test_convnext", **sizes)


def _checkpoint(root: Path) -> Kind:
    path = root / "a.ckpt"
    contents = []
    for seed in (0, 1):
        save_module(_module(seed), path)
        contents.append(path.read_bytes())

    def read(damaged: Path) -> None:
        module = load_module(damaged)
        assert isinstance(module, FasterRCNNModule)
        assert (module.class_names, module.num_classes) == (["cat", "dog"], 2)

    return Kind(*contents, path, read)


def _weights(root: Path, suffix: str) -> Kind:
    path = root / f"a{suffix}"
    contents = []
    for seed in (0, 1):
        net = _module(seed).detector.backbone.body.net
        state = {key: tensor.contiguous() for key, tensor in net.state_dict().items()}
        if suffix == ".pth":
            torch.save(state, path)
        else:
            save_file(state, path)
        contents.append(path.read_bytes())

    return Kind(*contents, path, lambda damaged: load_backbone_weights(net, damaged, "test_convnext"))


_CAT = {"id": 1, "name": "cat"}
KINDS: dict[str, Callable[[Path], Kind]] = {
    "json": _coco,
    "xml": _voc,
    "yolo": _yolo,
    "yaml": _yaml,
    "png": lambda root: _image(root, ".png"),
    "jpeg": lambda root: _image(root, ".jpg"),
    "checkpoint": _checkpoint,
    "pth": lambda root: _weights(root, ".pth"),
    "safetensors": lambda root: _weights(root, ".safetensors"),
}


def prepare(kind: str, root: Path) -> Kind:
    """A dataset of two images without annotations, and the files of a kind."""
    for folder in ("train", "annotations"):
        (root / folder).mkdir()
    for number in (1, 2) if kind == "json" else (1,):
        (root / "train" / f"{number}.png").write_bytes(_encoded(number, ".png"))
    if kind in ("png", "jpeg"):
        (root / "train" / "1.png").unlink()
    return KINDS[kind](root)


def outcomes(kind: str, count: int, seed: int, root: Path) -> Iterator[tuple[int, str]]:
    """Read ``count`` damaged files; gives ``(number, "")`` before each is read, then what came of it."""
    files = prepare(kind, root)
    files.path.write_bytes(files.good)
    files.read(files.path)  # undamaged, it is good
    for number in range(count):
        files.path.write_bytes(mutate(files.good, files.donor, random.Random(f"{kind} {seed} {number}")))
        yield number, ""
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)  # kills the process
        try:
            files.read(files.path)
            outcome = "accepted"
        except (DataError, CheckpointError, WeightsError) as error:
            outcome = f"refused {re.match(r'.(LCD-[A-Z][0-9]{3}).', str(error))[1]}"  # type: ignore[index]
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        yield number, outcome


def limit_memory() -> None:
    """Let this process take ``SPACE`` more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + SPACE, hard))


def main(kinds: str, count: int, seed: int) -> None:
    """Read files of one or more kinds, separated by commas; print what came of them."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    limit_memory()
    for kind in kinds.split(","):
        counts: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as folder:
            for number, outcome in outcomes(kind, count, seed, Path(folder)):
                if outcome:
                    counts[outcome] += 1
                else:
                    print(f"{kind} {number} of seed {seed}", flush=True)
        print(f"{kind}: {count} files, " + ", ".join(f"{n} {what}" for what, n in counts.most_common()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
