"""Comparison of an exported file with the detector in PyTorch, image by image and box by box."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_convnext_det.errors import ArgumentError, ExportError, first_line
from lightning_convnext_det.inference.export.graph import ExportGraph
from lightning_convnext_det.inference.export.runtimes import Runner
from lightning_convnext_det.models.tensor_detections import split_detections
from lightning_convnext_det.types import Detection, TensorDetections


class Tolerance(NamedTuple):
    """How far an exported file may be from the detector."""

    boxes: float = 1e-2
    """Greatest difference of a corner in pixels."""
    scores: float = 1e-4
    """Greatest difference of a score."""
    unmatched: float = 0.0
    """Greatest share of detections without a counterpart."""
    least_score: float = 0.0
    """Detections with a lower score do not count."""


TOLERANCES = {
    "fp32": Tolerance(),
    "fp16": Tolerance(boxes=2.0, scores=0.03, unmatched=0.02, least_score=0.1),
}
_KEPT_BYTES = 1 << 28  # of the images on which PyTorch is compared with itself: photos would be gigabytes


@dataclass
class Differences:
    """The greatest differences between a file and the detector over all images compared."""

    boxes: float = 0.0
    """In pixels."""
    scores: float = 0.0
    detections: int = 0
    """How many detections were compared."""
    unmatched: list[str] = field(default_factory=list)
    """Detections of one that the other has not, in words."""
    shapes: list[str] = field(default_factory=list)
    """Batches compared, e.g. ``2x480x640``."""
    resized_otherwise: "Differences | None" = None
    """Of batches that the file resizes to a side one pixel shorter or longer; None if there are none."""
    rounding: "Differences | None" = None
    """Of PyTorch that rounds otherwise, where these allow for differences above the tolerance; None elsewhere."""

    def __str__(self) -> str:
        text = (
            f"{self.detections} detections in {len(self.shapes)} batches ({' '.join(self.shapes)}): boxes differ by "
            f"at most {self.boxes:.2g} px, scores by {self.scores:.2g}, {len(self.unmatched)} without a counterpart"
        )
        if self.resized_otherwise:
            text = f"{text}; resized otherwise: {self.resized_otherwise}"
        elif not self.detections and self.shapes:
            text = f"{text}; that says little of the file: compare on images with objects (--verify IMAGES)"
        if self.rounding:
            own = self.rounding
            text = (
                f"{text}; PyTorch that rounds otherwise differs from itself as well, by {own.boxes:.2g} px, "
                f"{own.scores:.2g} and {len(own.unmatched)} without a counterpart: rounding decides which of nearly "
                "equal boxes these weights keep, as those of a detector that has hardly been trained"
            )
        return text

    def exceed(self, tolerance: Tolerance) -> bool:
        """Whether a difference is above the tolerance."""
        share = len(self.unmatched) / max(1, self.detections)
        return self.boxes > tolerance.boxes or self.scores > tolerance.scores or share > tolerance.unmatched

    def allow_for(self, tolerance: Tolerance) -> Tolerance:
        """The tolerance of a file that is as far from the detector as other rounding alone, which these are of."""
        share = len(self.unmatched) / max(1, self.detections)
        return tolerance._replace(
            boxes=max(tolerance.boxes, 2 * self.boxes),
            scores=max(tolerance.scores, 2 * self.scores),
            unmatched=max(tolerance.unmatched, 3 * share),  # few, and by chance
        )


def verify(
    run: Runner,
    detector: nn.Module,
    batches: Iterable[Tensor],
    include: Sequence[str] = ("resize", "normalise"),
    tolerance: Tolerance = TOLERANCES["fp32"],
    name: object = "the file",
    resized_otherwise: Tolerance | None = None,
    refuse: bool = True,
) -> Differences:
    """Compare an exported file with the detector.

    Args:
        run: the file, by its runtime.
        detector: in PyTorch.
        batches: uint8 images [B, C, H, W].
        include: what the file does itself, see `ExportGraph`.
        tolerance: what is allowed.
        name: of the file, for messages.
        resized_otherwise: what is allowed for images whose new size is another in float32, for a runtime that computes
            it so; None for runtimes that compute it in float64, as PyTorch does.
        refuse: whether differences above the tolerance are an error; if not, they are told.

    Raises:
        ExportError: if a difference is above the tolerance, and above what other rounding alone does in PyTorch; it
            names the greatest.
    """
    differences, others = Differences(), Differences()
    compared: list[Tensor] = []
    graph = ExportGraph(detector, include)  # type: ignore[arg-type]  # checked there
    for images in batches:
        is_other = resized_otherwise is not None and not _rounds_alike(graph, images.shape[-2], images.shape[-1])
        into, limit = (others, resized_otherwise or tolerance) if is_other else (differences, tolerance)
        into.shapes.append("x".join(str(n) for n in (images.shape[0], *images.shape[2:])))
        given = images if "normalise" in include else graph.normalise(images, 1.0)
        with torch.no_grad():
            expected = (
                graph.detector(list(images)) if len(include) == 2 else split_detections(TensorDetections(*graph(given)))
            )
            rows_of_file = run(given)
            found = split_detections(rows_of_file)
        if fault := find_fault(rows_of_file):
            raise ExportError(f"[LCD-X001] {name} gives rows that {fault}, in a batch {into.shapes[-1]}")
        _compare_images(found, expected, detector, limit, into, into.shapes[-1])
        if not is_other and (not compared or sum(x.numel() for x in compared) + images.numel() <= _KEPT_BYTES):
            compared.append(images)
    differences.resized_otherwise = others if others.shapes else None
    if refuse and differences.exceed(tolerance):
        own = _measure_rounding(graph, compared, tolerance)
        if differences.exceed(own.allow_for(tolerance)):
            raise _refusal(name, differences, tolerance)
        differences.rounding = own
    if refuse and others.exceed(resized_otherwise or tolerance):
        remedy = ". The runtime resizes these images to a side one pixel off; include=normalise leaves that to you"
        raise _refusal(name, others, resized_otherwise or tolerance, remedy)
    return differences


def _refusal(name: object, found: Differences, limit: Tolerance, remedy: str = "") -> ExportError:
    example = f", e.g. {found.unmatched[0]}" if found.unmatched else ""
    return ExportError(
        f"[LCD-X001] {name} finds other objects than the detector: {found}{example}; allowed are {limit.boxes} px and "
        f"{limit.scores}{remedy}"
    )


def _compare_images(
    found: Sequence[Detection],
    expected: Sequence[Detection],
    detector: nn.Module,
    limit: Tolerance,
    differences: Differences,
    batch: str = "",
) -> None:
    """Add the differences of a batch to the greatest so far."""
    threshold = float(getattr(detector, "score_threshold", 0.0))
    rows = int(getattr(detector, "detections_per_image", 100))
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        compare(ours, theirs, limit, differences, f"{batch}[{i}]", threshold, rows)


def find_fault(found: TensorDetections) -> str | None:
    """Say what is wrong with the order of rows, or with those that are no detections.

    >>> boxes = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 4.0, 4.0]]])
    >>> scores, labels = torch.tensor([[0.5, 0.9]]), torch.tensor([[0, 0]])
    >>> find_fault(TensorDetections(boxes, scores, labels, torch.tensor([2])))
    'are not by descending score'
    >>> find_fault(TensorDetections(boxes, scores, labels, torch.tensor([1])))
    'are not zeros after count'
    """
    beyond = torch.arange(found.scores.shape[1]) >= found.count[:, None]  # [B, K]
    rises = (found.scores.diff(dim=1) > 1e-6) & ~beyond[:, 1:]  # runtimes approximate the sigmoid
    if rises.any():
        return "are not by descending score"
    filled = (found.scores != 0) | (found.boxes != 0).any(-1) | (found.labels != 0)
    return "are not zeros after count" if (filled & beyond).any() else None


def verify_weights(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Compare the tensors of a safetensors file with those of a detector, bit for bit.

    Raises:
        ExportError: naming the first that differs, or if the file cannot be read.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"[LCD-X001] {path} cannot be loaded: {first_line(error)}") from error
    for name in sorted({*found, *expected}):
        ours, theirs = found.get(name), expected.get(name)
        if ours is None or theirs is None or ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            raise ExportError(f"[LCD-X001] {path} holds other weights than the detector, e.g. {name}")


def _measure_rounding(graph: ExportGraph, batches: Iterable[Tensor], limit: Tolerance) -> Differences:
    """How far PyTorch is from itself when it rounds otherwise: in float64, or with weights rounded as fp16 does."""
    rounded = copy.deepcopy(graph)
    if limit.unmatched:  # as for fp16
        rounded.detector.half().float()
    else:
        rounded.detector.double()
    own = Differences()
    for images in batches:
        given = images if "normalise" in graph.include else graph.normalise(images, 1.0)
        with torch.no_grad():
            ours, theirs = (split_detections(TensorDetections(*run(given))) for run in (rounded, graph))
        _compare_images(ours, theirs, graph.detector, limit, own)
    return own


def _rounds_alike(graph: ExportGraph, height: int, width: int) -> bool:
    """Whether an image is resized to the same size if that is computed in float32."""
    sizes = [graph.new_sizes(torch.tensor([height, width], dtype=kind))[0] for kind in (torch.float32, torch.float64)]
    return torch.equal(*sizes)


def compare(
    found: Detection,
    expected: Detection,
    tolerance: Tolerance,
    differences: Differences,
    image: str = "",
    threshold: float = 0.0,
    rows: int = 100,
) -> None:
    """Add the differences of one image to the greatest so far; ties in score may be in any order.

    >>> box, label = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([0])
    >>> ours = Detection(boxes=box + 0.5, labels=label, scores=torch.tensor([0.5]))
    >>> differences = Differences()
    >>> compare(ours, Detection(boxes=box, labels=label, scores=torch.tensor([0.5])), Tolerance(boxes=1), differences)
    >>> differences.boxes, differences.unmatched
    (0.5, [])
    """
    free = torch.ones(found["scores"].shape[0], dtype=torch.bool)
    last = [float(d["scores"][-1]) if len(d["scores"]) >= rows else -1.0 for d in (found, expected)]
    edges = [threshold, tolerance.least_score, *last]  # where a small difference decides whether a box is kept

    # where some may be missing, one that is far away is another: NMS may keep the other of two
    reach = tolerance.boxes if tolerance.unmatched else max(100 * tolerance.boxes, 1.0)

    def matters(score: float) -> bool:
        return score >= tolerance.least_score and all(abs(score - edge) > tolerance.scores for edge in edges)

    for box, label, score in zip(expected["boxes"], expected["labels"], expected["scores"], strict=True):
        if score < tolerance.least_score:
            break
        box_differences = (found["boxes"] - box).abs().amax(1)
        score_differences = (found["scores"] - score).abs()
        alike = free & (found["labels"] == label) & (score_differences <= max(tolerance.scores, 1e-3))
        distance = box_differences.masked_fill(~alike, float("inf"))
        differences.detections += 1
        if distance.numel() and distance.min() <= reach:
            best = int(distance.argmin())
            free[best] = False
            differences.boxes = max(differences.boxes, float(box_differences[best]))
            differences.scores = max(differences.scores, float(score_differences[best]))
        elif matters(float(score)):
            differences.unmatched.append(_describe("not found", image, box, int(label), float(score)))
    for i in free.nonzero().flatten().tolist():
        if matters(float(found["scores"][i])):
            box, label, score = found["boxes"][i], found["labels"][i], found["scores"][i]
            differences.unmatched.append(_describe("found in addition", image, box, int(label), float(score)))


def _describe(what: str, image: str, box: Tensor, label: int, score: float) -> str:
    return f"{what} in {image}: label {label} at {[round(x, 1) for x in box.tolist()]}, score {score:.4f}"


def create_batches(
    images: Sequence[Tensor],
    batch_sizes: Sequence[int] = (1, 2, 5),
    size: tuple[int | None, int | None] = (None, None),
    in_chans: int = 3,
) -> Iterator[Tensor]:
    """Make batches to compare on: of the images given, or of synthetic ones of several sizes, one of them empty.

    Args:
        images: uint8 [C, H, W].
        batch_sizes: the first two images also make batches of these sizes, of the image and its reflections.
        size: (height, width) that the file is fixed to.
        in_chans: channels of the images.

    Raises:
        ArgumentError: if an image is another.
    """
    chosen = list(images) or _draw_images(in_chans)
    for i, image in enumerate(chosen):
        check_image(image, in_chans, "images")
        height, width = size[0] or image.shape[1], size[1] or image.shape[2]
        if (height, width) != image.shape[1:]:
            image = F.interpolate(image[None].float(), (height, width), mode="bilinear")[0].round().to(torch.uint8)
        variants = [image, image.flip(-1), image.flip(-2), image.flip(-1, -2), 255 - image]
        for count in batch_sizes if i < 2 else batch_sizes[:1]:
            yield torch.stack([variants[k % len(variants)] for k in range(count)])


def check_image(image: object, channels: int, name: str) -> None:
    """Refuse what is not a uint8 image [channels, height, width].

    Raises:
        ArgumentError: naming the argument and what it holds.
    """
    what = type(image).__name__
    if isinstance(image, Tensor):
        if image.dtype == torch.uint8 and image.dim() == 3 and image.shape[0] == channels:
            return
        what = f"{image.dtype} {list(image.shape)}"
    raise ArgumentError(f"{name} holds {what}; give uint8 tensors [{channels}, height, width], 0..255")


def _draw_images(in_chans: int) -> list[Tensor]:
    """Rectangles on noise: landscape, odd, portrait 1:3, square; and noise alone."""
    random = torch.Generator().manual_seed(0)
    drawn = []
    for height, width in ((240, 320), (187, 251), (360, 120), (224, 224)):
        image = torch.randint(0, 80, (in_chans, height, width), dtype=torch.uint8, generator=random)
        for _ in range(6):
            y, x = (int(torch.randint(0, side - 24, (), generator=random)) for side in (height, width))
            h, w = (int(torch.randint(12, 90, (), generator=random)) for _ in range(2))
            colour = torch.randint(0, 256, (in_chans, 1, 1), dtype=torch.uint8, generator=random)
            image[:, y : y + h, x : x + w] = colour
        drawn.append(image)
    # not one colour: norms over a flat map divide rounding errors by nearly nothing
    return [*drawn, torch.randint(90, 130, (in_chans, 160, 200), dtype=torch.uint8, generator=random)]
