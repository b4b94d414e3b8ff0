"""Callback that writes the predictions of a detector: COCO results, and images with boxes drawn."""

import heapq
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_convnext_det.arguments import Fraction, NonNegativeInt, check_arguments
from lightning_convnext_det.data.batch import Batch, split_batch
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.metrics.coco_results import coco_results
from lightning_convnext_det.types import Detection, image_id_of
from lightning_convnext_det.visualization import SCORE_THRESHOLD, class_colors, draw_detections

_RESULTS = "predictions.json"
_LOSSLESS = (".png", ".bmp", ".gif", ".tif", ".tiff")  # images without the noise of JPEG are drawn as PNG


# Not Lightning's BasePredictionWriter: that one warns of every loader without a batch sampler, whose indices are no use
# here, for an image that cannot be read is left out of its batch.
class PredictionWriter(Callback):
    """Writes the predictions of a detector: a file of COCO results, and the images with boxes drawn.

    ``predictions.json`` is a list of ``{image_id, category_id, bbox, score, category_name, file_name}`` with the
    dataset's own category ids and boxes (x, y, width, height) in pixels of the upright image: all that the detector
    returns. pycocotools reads it. It appears when the prediction is complete, with the images of all ranks.

    >>> import torch
    >>> from tempfile import mkdtemp
    >>> from torch.utils.data import DataLoader
    >>> from lightning_convnext_det import FasterRCNNModule
    >>> module = FasterRCNNModule(1, ["cat"], backbone="test_convnext", min_size=64, max_size=96)
    >>> images = [torch.rand(3, 64, 80)]
    >>> writer = PredictionWriter(mkdtemp())
    >>> trainer = pl.Trainer(callbacks=[writer], logger=False, accelerator="cpu", enable_progress_bar=False)
    >>> _ = trainer.predict(module, DataLoader([images], batch_size=None, num_workers=0))
    >>> sorted(path.name for path in writer.folder.glob("*.json"))
    ['predictions.json']

    A drawing has the name of its image; where that is taken, the image id is added. What an earlier prediction wrote
    into the folder is replaced; other files are left alone.

    Args:
        folder: where to write.
        score_threshold: boxes with a lower score are not drawn; the file holds them.
        draw: write images with boxes, names and scores.
        draw_limit: draw no more than this many images; all if not given.
        font: TrueType file for class names that Pillow's own font (Latin script) cannot write.
    """

    def __init__(
        self,
        folder: str | Path = "predictions",
        score_threshold: Fraction = SCORE_THRESHOLD,
        draw: bool = True,
        draw_limit: NonNegativeInt | None = None,
        font: str | None = None,
    ) -> None:
        check_arguments(PredictionWriter.__init__, locals())
        self.folder = Path(folder)
        self.score_threshold = score_threshold
        self.draw = draw
        self.draw_limit = draw_limit
        self.font = font
        self._part: _Part | None = None
        self._limit: int | None = None  # of this rank
        self._num_images = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the results of an earlier prediction; all ranks wait for rank 0 to do so.

        Raises:
            ValueError: if the folder cannot be written to.
        """
        self._part = None
        if stage != "predict" or not trainer.is_global_zero:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if _clear(self.folder):
                rank_zero_info(f"the earlier results in '{self.folder}' are replaced")
            _hidden(self.folder, 0, "part").touch()
        except OSError as error:
            raise ArgumentError(
                f"cannot write predictions to folder '{self.folder}' ({error}); choose another"
            ) from error

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the files of this rank.

        Raises:
            TypeError: if the module has no ``class_names`` and ``category_ids``.
            ValueError: if the folder is not the one that rank 0 has prepared.
        """
        names, ids = (getattr(pl_module, name, None) for name in ("class_names", "category_ids"))
        if names is None or ids is None:
            raise TypeError(
                f"{type(pl_module).__name__} has no class_names and category_ids; PredictionWriter names boxes by them"
            )
        rank = trainer.global_rank
        if not _hidden(self.folder, 0, "part").exists():
            raise ArgumentError(f"rank {rank} does not see the '{self.folder}' of rank 0; choose a shared folder")
        self._part = _Part(self.folder, rank, list(names), list(ids))
        self._num_images = 0
        limit = self.draw_limit if self.draw else 0
        self._limit = None if limit is None else _share(limit, rank, trainer.world_size)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Sequence[Detection],
        batch: Batch | list[Tensor] | Tensor,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the records of a batch and draw its images.

        An image without ``image_id`` gets the next number: 1, 2, ... on one rank, in turn on several.

        Raises:
            DivergenceError: if a box or score is not finite.
        """
        assert self._part is not None  # opened when the prediction began
        images, targets = split_batch(batch)
        names: Sequence[Mapping[str, object]] = targets or [{}] * len(images)
        for image, target, detection in zip(images, names, outputs, strict=True):
            image_id = image_id_of(target)
            if image_id is None:
                image_id = self._num_images * trainer.world_size + trainer.global_rank + 1
            self._num_images += 1
            file_name = str(target.get("file_name", image_id))
            found = Detection(
                boxes=detection["boxes"].cpu(), labels=detection["labels"].cpu(), scores=detection["scores"].cpu()
            )
            self._part.write(found, image_id, file_name)
            if self._limit is None or self._part.num_drawn < self._limit:
                self._part.draw(image, found, image_id, file_name, self.score_threshold, self.font)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Merge the parts of all ranks into ``predictions.json``."""
        if stage != "predict":
            return
        self._close()
        # not at the end of the epoch: a rank without images has none
        trainer.strategy.barrier("PredictionWriter: parts complete")
        if trainer.is_global_zero:
            parts = [_hidden(self.folder, rank, "part") for rank in range(trainer.world_size)]
            parts = [part for part in parts if part.exists()]
            _merge(parts, self.folder / _RESULTS)
            for part in parts:
                part.unlink()
            rank_zero_info(f"predictions are in '{self.folder / _RESULTS}'")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove this rank's part of the results, which will not be completed; drawings stay until the next run."""
        self._close()
        with suppress(OSError):  # the exception may be that the folder cannot be used
            _hidden(self.folder, trainer.global_rank, "part").unlink()

    def _close(self) -> None:
        if self._part is not None:
            self._part.close()


class _Part:
    """Files of one rank: a line of results per image, its drawings, and a list of their names.

    Both files are JSON in ASCII, so that they hold any file name.
    """

    def __init__(self, folder: Path, rank: int, class_names: list[str], category_ids: list[int]) -> None:
        self.folder = folder
        self.class_names, self.category_ids = class_names, category_ids
        self.colors = class_colors(class_names)
        self.num_drawn = 0
        with ExitStack() as files:
            self._records = files.enter_context(open(_hidden(folder, rank, "part"), "w"))
            self._drawings = files.enter_context(open(_hidden(folder, rank, "drawn"), "w"))
            self._files = files.pop_all()

    def write(self, detection: Detection, image_id: int, file_name: str) -> None:
        records = coco_results(detection, image_id, file_name, self.class_names, self.category_ids)
        if records:
            self._records.write(f"{image_id}\t{', '.join(json.dumps(record) for record in records)}\n")

    def draw(
        self,
        image: Tensor,
        detection: Detection,
        image_id: int,
        file_name: str,
        score_threshold: float,
        font: str | None,
    ) -> None:
        kept = detection["scores"] >= score_threshold
        names = [self.class_names[label] for label in detection["labels"][kept].tolist()]
        drawing = draw_detections(image, detection["boxes"][kept], names, detection["scores"][kept], self.colors, font)
        path = _reserve(self.folder, Path(file_name), image_id)
        self._drawings.write(f"{json.dumps(path.name)}\n")
        self._drawings.flush()  # a rank that is killed has listed its drawings, too
        # full resolution of colour: half of it blurs coloured text
        drawing.save(path, quality=92, subsampling=0) if path.suffix == ".jpg" else drawing.save(path)
        self.num_drawn += 1

    def close(self) -> None:
        self._files.close()


def _share(number: int, rank: int, world_size: int) -> int:
    return number // world_size + (rank < number % world_size)


def _hidden(folder: Path, rank: int, ending: str) -> Path:
    return folder / f".predictions-{rank}.{ending}"


def _clear(folder: Path) -> bool:
    """Remove the files of an earlier prediction from a folder; tell whether there were any."""
    lists = list(folder.glob(".predictions-*.drawn"))
    drawings = [folder / name for path in lists for name in _listed(path)]
    own = {folder / _RESULTS, *drawings, *folder.glob(".predictions-*.part")}
    found = [path for path in own if path.parent == folder and path.is_file()]
    for path in [*found, *lists]:
        path.unlink()
    return bool(found)


def _listed(path: Path) -> Iterator[str]:
    """Read the names in a list of drawings; skip a line that a crash has truncated."""
    for line in path.read_text(errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            yield str(json.loads(line))


def _reserve(folder: Path, image: Path, image_id: int) -> Path:
    """Create an empty file for the drawing of an image, under a name that no rank and no file of the user has."""
    suffix = ".png" if image.suffix.lower() in _LOSSLESS else ".jpg"
    for name in _names(image.stem, image_id):
        path = folder / f"{name}{suffix}"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise AssertionError("names do not end")


def _names(stem: str, image_id: int) -> Iterator[str]:
    yield stem
    yield f"{stem}-{image_id}"
    yield from (f"{stem}-{image_id}-{i}" for i in itertools.count(2))


def _merge(parts: Sequence[Path], target: Path) -> None:
    """Write the lines of all parts, each sorted by image id, as one JSON list; the target is complete or absent."""
    temporary = target.with_name(f".{target.name}.tmp")
    with ExitStack() as files:
        lines = [files.enter_context(open(part)) for part in parts]
        out = files.enter_context(open(temporary, "w"))
        separator = "[\n"
        for line in heapq.merge(*lines, key=lambda line: int(line.partition("\t")[0])):
            out.write(separator + line.partition("\t")[2].rstrip("\n"))
            separator = ",\n"
        out.write("\n]\n" if separator == ",\n" else "[]\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, target)
