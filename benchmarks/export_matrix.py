"""ONNX files of every detector with four backbones beside PyTorch: differences, seconds to export, size.

    python benchmarks/export_matrix.py IMAGES [--cells cascade/resnet50,...] [--rows rows.jsonl]
    python benchmarks/export_matrix.py IMAGES --cells faster/resnet50 --heads random --float64
    python benchmarks/export_matrix.py IMAGES --checkpoint trained.ckpt

Weights are random, with heads that find many objects. ``--heads trained`` (the default) scales the outputs of an
R-CNN's heads to the spread that trained ones have (see `TRAINED`): random ones move anchors 15 times as far, and so
multiply the rounding errors of the layers before. Where a file differs by more than the goal, ``--float64`` also
compares PyTorch's own float32 with its float64: what these differ by is rounding, without any file. Where the file of
an R-CNN has detections without a counterpart, PyTorch is also run with proposals of equal objectness in ascending and in
descending order of their index, which torch leaves open: those that then have one are counted as ties.

Images are small, since differences do not depend on their size and the seconds of an export do not either. IMAGES is a
folder of real images, resized to 20 shapes: odd ones, portrait 1:3, landscape 3:1. Two shapes also in batches of 2 and
5, and one image on which nothing is found. Each cell appends a line to the rows, and the table of all rows is printed,
so that cells can run one by one.
"""

import argparse
import copy
import datetime
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from lightning_convnext_det import CascadeRCNN, DeformableDETR, FasterRCNN, load_module
from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.data.io.listing import walk_images
from lightning_convnext_det.inference.export.graph import ExportGraph, record
from lightning_convnext_det.inference.export.onnx_file import write_onnx
from lightning_convnext_det.inference.export.runtimes import load_runner
from lightning_convnext_det.inference.export.verify import Differences, Tolerance, compare
from lightning_convnext_det.models.rcnn import rpn
from lightning_convnext_det.models.rcnn.roi_heads import BoxPredictor
from lightning_convnext_det.models.rcnn.rpn import FloatRPNHead
from lightning_convnext_det.models.tensor_detections import split_detections
from lightning_convnext_det.ops.batch_nms import batch_nms
from lightning_convnext_det.types import Detection

DETECTORS = {"faster": FasterRCNN, "cascade": CascadeRCNN, "detr": DeformableDETR}
BACKBONES = ("convnext_tiny", "convnextv2_atto", "resnet50", "swin_tiny_patch4_window7_224")
SHAPES = [
    (160, 160), (161, 199), (240, 320), (320, 240), (375, 500), (333, 500), (427, 640), (480, 640), (97, 131), (131, 97),
    (150, 450), (450, 150), (201, 603), (603, 201), (127, 129), (255, 257), (512, 512), (640, 427), (181, 309), (224, 97),
]  # fmt: skip
# standard deviations of logits and of the deltas x, y, w, h over four images of BCCD, in Faster R-CNN and Cascade R-CNN
# of configs/bccd_*_convnext_atto.yaml after training: 0.08, 0.08, 0.5, 0.5 of the RPN; 0.8, 0.8, 0.7, 0.7 of the box
# head. Logits: 3.3 and 4; half of the latter here, so that scores are not all near 0 and 1.
TRAINED = {"rpn": (3.3, (0.08, 0.08, 0.5, 0.5)), "box": (2.0, (0.8, 0.8, 0.7, 0.7))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images")
    parser.add_argument("--checkpoint", help="compare this detector instead of the cells")
    parser.add_argument("--cells", default=",".join(f"{d}/{b}" for d in DETECTORS for b in BACKBONES))
    parser.add_argument("--rows", default="rows.jsonl")
    parser.add_argument("--heads", choices=("trained", "random"), default="trained", help="scale of an R-CNN's heads")
    parser.add_argument("--float64", action="store_true", help="compare float32 with float64 beyond the goal")
    options = parser.parse_args()
    files = walk_images([Path(options.images)])
    real = [read_image(file) for file in files[:: max(1, len(files) // len(SHAPES))][: len(SHAPES)]]
    rows = Path(options.rows)
    cells = [options.checkpoint] if options.checkpoint else filter(None, options.cells.split(","))
    for cell in cells:
        name, detector = load(cell) if options.checkpoint else build(*cell.split("/"), real, options.heads)
        row = {**name, **measure(detector, real, options.float64)}
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
    print_table([json.loads(line) for line in rows.read_text().splitlines()])


def load(checkpoint: str) -> tuple[dict[str, str], nn.Module]:
    """A trained detector, and what to call it."""
    module = load_module(checkpoint)
    name = {type_: name for name, type_ in DETECTORS.items()}[type(module.detector)]
    return {"detector": name, "backbone": module.hparams["backbone"], "heads": "trained"}, module.detector.eval()


def build(detector_name: str, backbone: str, real: list[Tensor], heads: str) -> tuple[dict[str, str], nn.Module]:
    """A detector of random weights, and what to call it."""
    torch.manual_seed(0)
    detector = DETECTORS[detector_name](
        3, backbone=backbone, min_size=128, max_size=320, pretrained_backbone=False
    ).eval()
    spread(detector)
    if heads == "trained" and detector_name != "detr":
        scale_heads(detector, real[:4])
    spread_of = "as trained" if heads == "trained" else "random"
    return {"detector": detector_name, "backbone": backbone, "heads": spread_of}, detector


def measure(detector: nn.Module, real: list[Tensor], with_float64: bool) -> dict[str, object]:
    """Export one detector and compare it."""
    given, empty = batches(real), choose_empty(detector, real)
    start = time.process_time()
    program = record(ExportGraph(detector), torch.zeros(3, 3, 640, 640, dtype=torch.uint8))
    recorded = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        write_onnx(program, path, {})
        seconds = time.process_time() - start
        run = load_runner(path)
        found, ties = compare_all(
            lambda x: split_detections(run(x)), lambda x: detector(list(x)), detector, [*given, empty]
        )
        objects = int(run(empty).count[0])
        megabytes = path.stat().st_size / 1e6
    arbiter = {}
    if with_float64 and found.exceed(Tolerance()):
        double = copy.deepcopy(detector).double()
        own, _ = compare_all(lambda x: detector(list(x)), lambda x: detect_in_float64(double, x), detector, given)
        arbiter = {"boxes_64": own.boxes, "scores_64": own.scores, "unmatched_64": len(own.unmatched)}
    return {
        "record_s": round(recorded), "export_s": round(seconds),
        "mb": round(megabytes, 1), "batches": len(found.shapes), "detections": found.detections,
        "boxes": found.boxes, "scores": found.scores, "unmatched": len(found.unmatched), "ties": ties, "on_empty": objects,
        "date": str(datetime.date.today()), "cpu": processor(), "torch": torch.__version__,
        **arbiter,
    }  # fmt: skip


def choose_empty(detector: nn.Module, real: list[Tensor]) -> Tensor:
    """The image of one colour with the lowest scores, below which nothing is an object, if others have objects then."""
    plain = [torch.full((1, 3, 160, 200), grey, dtype=torch.uint8) for grey in (0, 114, 255)]
    with torch.no_grad():
        best = [float(detector(list(image))[0]["scores"].max()) for image in plain]
        threshold = min(best) + 1e-3
        scores = [detector([image])[0]["scores"] for image in real[:4]]
    if all((of_image > threshold).sum() > 3 for of_image in scores):
        detector.score_threshold = threshold
    return plain[best.index(min(best))]


Detect = Callable[[Tensor], list[Detection]]


def compare_all(run: Detect, reference: Detect, detector: nn.Module, given: list[Tensor]) -> tuple[Differences, int]:
    """What `verify` compares, without its limit; and how many detections have a counterpart only after ties."""
    differences, ties = Differences(), 0
    for images in given:
        differences.shapes.append("x".join(str(n) for n in (images.shape[0], *images.shape[2:])))
        with torch.no_grad():
            found = run(images)
            own = compare_batch(found, reference(images), differences.shapes[-1], detector)
            if own.unmatched and hasattr(detector, "rpn"):
                for sign in (1, -1):
                    with order_ties(sign):
                        other = compare_batch(found, reference(images), differences.shapes[-1], detector)
                    if len(other.unmatched) < len(own.unmatched):
                        ties += len(own.unmatched) - len(other.unmatched)
                        own = other
        differences.boxes, differences.scores = max(differences.boxes, own.boxes), max(differences.scores, own.scores)
        differences.detections += own.detections
        differences.unmatched += own.unmatched
    return differences, ties


def compare_batch(found: list[Detection], expected: list[Detection], name: str, detector: nn.Module) -> Differences:
    own = Differences()
    for ours, theirs in zip(found, expected, strict=True):
        compare(ours, theirs, Tolerance(), own, name, detector.score_threshold, 100)
    return own


@contextmanager
def order_ties(sign: int) -> Iterator[None]:
    """Let NMS take proposals of equal objectness by descending (1) or ascending (-1) index."""

    def reordered(boxes: Tensor, scores: Tensor, *rest: object) -> Tensor:
        last = torch.arange(len(scores), device=scores.device)
        order = last.flip(0) if sign > 0 else last
        order = order[scores[order].argsort(descending=True, stable=True)]
        ranks = torch.empty_like(scores)
        ranks[order] = torch.arange(len(scores), 0, -1, dtype=scores.dtype)
        return batch_nms(boxes, ranks, *rest)

    with patch.object(rpn, "batch_nms", reordered):
        yield


def detect_in_float64(double: nn.Module, images: Tensor) -> list[Detection]:
    """What an R-CNN finds in images [B, 3, H, W] if it computes in float64 from the pixels on."""
    rule, old = double.transform, (images.shape[-2], images.shape[-1])
    mean, std = (images.new_tensor(x, dtype=torch.float64)[:, None, None] for x in (rule.image_mean, rule.image_std))
    new = rule.new_size(*old)
    pixels = F.interpolate((images.double() / 255 - mean) / std, size=new, mode="bilinear")
    # without the heads' conversion to float32
    with (
        patch.object(BoxPredictor, "forward", FastRCNNPredictor.forward),
        patch.object(FloatRPNHead, "forward", RPNHead.forward),
    ):
        found = double.forward_tensors(rule._batch(list(pixels)), torch.tensor([new] * len(images)))
    return rule.restore(split_detections(found), [new] * len(images), [old] * len(images))


def scale_heads(detector: nn.Module, images: list[Tensor]) -> None:
    """Give each head of an R-CNN outputs of mean 0 with the standard deviations of `TRAINED`, one after the other."""
    stages = getattr(detector.roi_heads, "stages", [detector.roi_heads])
    heads = [(detector.rpn.head.cls_logits, detector.rpn.head.bbox_pred, "rpn")]
    heads += [(stage.box_predictor.cls_score, stage.box_predictor.bbox_pred, "box") for stage in stages]
    for logits, deltas, kind in heads:
        seen: dict[nn.Module, list[Tensor]] = {logits: [], deltas: []}
        hooks = [
            layer.register_forward_hook(lambda layer, _, out, seen=seen: seen[layer].append(out.movedim(1, -1)))
            for layer in seen
        ]
        with torch.no_grad():
            detector(images)
        for hook in hooks:
            hook.remove()
        for layer, wanted in ((logits, TRAINED[kind][:1]), (deltas, TRAINED[kind][1])):
            values = torch.cat([out.flatten(0, -2) for out in seen[layer]])  # [positions, channels]
            mean, variance = values.mean(0), values.var(0).view(-1, len(wanted)).mean(0)
            factor = (values.new_tensor(wanted) / variance.sqrt()).repeat(len(mean) // len(wanted))
            layer.bias.data = (layer.bias.data - mean) * factor
            layer.weight.data *= factor.view(-1, *[1] * (layer.weight.dim() - 1))


def spread(detector: nn.Module) -> None:
    """Give random heads scores and boxes that differ, so that their order means something."""
    for name, parameter in detector.named_parameters():
        if "predictor" in name or "class_heads" in name or "box_heads" in name or "rpn.head" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)


def batches(real: list[Tensor]) -> list[Tensor]:
    """The real images in the 20 shapes; the first two also several at once, with their reflections and negatives."""
    resized = [
        F.interpolate(image[None].float(), shape, mode="bilinear").round().to(torch.uint8)
        for image, shape in zip(real, SHAPES, strict=True)
    ]
    several = [torch.cat([x, x.flip(-1), 255 - x, x.flip(-2), x.flip(-1, -2)]) for x in resized[:2]]
    return [*resized, *(x[:n] for x in several for n in (2, 5))]


def print_table(rows: list[dict[str, object]]) -> None:
    print(
        "| detector | backbone | heads | boxes, px | scores | detections | unmatched | ties | export, CPU s | size, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            "| {detector} | {backbone} | {heads} | {boxes:.1g} | {scores:.1g} | {detections} | {unmatched} | {ties} | {export_s} "
            "| {mb} |".format(**row)
        )
    print("\n| float32 beside float64 | backbone | heads | boxes, px | scores | unmatched |\n|---|---|---|---|---|---|")
    for row in (row for row in rows if "boxes_64" in row):
        print("| {detector} | {backbone} | {heads} | {boxes_64:.1g} | {scores_64:.1g} | {unmatched_64} |".format(**row))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
