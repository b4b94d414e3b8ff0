"""Callback that writes the predictions of a detector: tables, annotation files, crops, and images with boxes drawn."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_convnext_det.arguments import Count, Fraction, NonNegativeInt, check_arguments
from lightning_convnext_det.data.base_datamodule import LoadingDataModule
from lightning_convnext_det.data.batch import Batch, split_batch
from lightning_convnext_det.data.writers.files import OF_ALL_IMAGES, hidden, remove_files, writing_to
from lightning_convnext_det.data.writers.parquet import (
    FOLDER,
    FinishedPart,
    ImageKey,
    ParquetWriter,
    check_pyarrow,
    clear_parts,
    read_part,
)
from lightning_convnext_det.data.writers.rank_results import TABLES, Format, RankResults
from lightning_convnext_det.data.writers.tables import MERGED, check_tables, remove_tables, write_line
from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.fonts import load_font
from lightning_convnext_det.metrics.coco_results import coco_results
from lightning_convnext_det.models.fused import FusedDetector
from lightning_convnext_det.suggestions import suggest
from lightning_convnext_det.types import Detection, image_id_of
from lightning_convnext_det.visualization import SCORE_THRESHOLD


# Not Lightning's BasePredictionWriter: that one warns of every loader without a batch sampler, whose indices are no use
# here, for an image that cannot be read is left out of its batch.
class PredictionWriter(Callback):
    """Writes the predictions of a detector in the formats asked for, and the images with boxes drawn.

    Format ``coco`` is ``predictions.json``, a list of ``{image_id, category_id, bbox, score, category_name,
    file_name}`` with the dataset's own category ids and boxes (x, y, width, height) in pixels of the upright image,
    which pycocotools reads. It appears when the prediction is complete, with the images of all ranks.

    >>> import torch
    >>> from tempfile import mkdtemp
    >>> from torch.utils.data import DataLoader
    >>> from lightning_convnext_det import FasterRCNNModule
    >>> module = FasterRCNNModule(1, ["cat"], backbone="test_convnext", min_size=64, max_size=96)
    >>> images = [torch.rand(3, 64, 80)]
    >>> writer = PredictionWriter(mkdtemp(), formats="coco,csv")
    >>> trainer = pl.Trainer(callbacks=[writer], logger=False, accelerator="cpu", enable_progress_bar=False)
    >>> _ = trainer.predict(module, DataLoader([images], batch_size=None, num_workers=0))
    >>> sorted(path.name for path in writer.folder.glob("predictions.*"))
    ['predictions.csv', 'predictions.json']

    ``csv`` is ``predictions.csv``, ``parquet`` a folder of parts that a prediction which was ended goes on with; these
    three hold all that the detector returns. ``yolo``, ``voc`` and ``labelme`` are folders of annotation files,
    ``crops`` one of the objects by class; these and the drawings hold what reaches ``score_threshold``. Files have the
    name of their image; where that is taken, the image id is added. What an earlier prediction wrote into the folder
    is replaced; other files are left alone.

    Args:
        folder: where to write.
        score_threshold: boxes with a lower score are left out of drawings, crops and annotation files; ``best`` is the
            threshold of their class in the checkpoint; 0.3 where it has none, and for ensembles and test-time
            augmentation, whose scores are others.
        draw: write images with boxes, names and scores.
        draw_limit: draw no more than this many images; all if not given.
        font: TrueType file for class names (default: Pillow's own, or an installed one that can write them).
        formats: ``coco``, ``csv``, ``parquet``, ``yolo``, ``voc``, ``labelme`` and ``crops``, separated by commas.
        images_per_part: images of a Parquet file; the batch that fills it goes in whole.
    """

    def __init__(
        self,
        folder: str | Path = "predictions",
        score_threshold: Fraction | Literal["best"] = "best",
        draw: bool = True,
        draw_limit: NonNegativeInt | None = None,
        font: str | None = None,
        formats: str | list[str] = "coco",
        images_per_part: Count = 1000,
    ) -> None:
        check_arguments(PredictionWriter.__init__, locals())
        if "://" in str(folder):
            raise ArgumentError(f"folder is '{folder}'; results are written to folders of this machine")
        self.folder = Path(folder).expanduser()  # shells leave --output.folder=~/found as it is
        self.score_threshold: float | Literal["best"] = score_threshold
        self.draw = draw
        self.draw_limit = draw_limit
        self.font = font
        load_font(font, 12)  # refuses one that cannot be read now, not at the first drawing
        self.formats = _check_formats(formats)
        self.images_per_part = images_per_part
        self._results: RankResults | None = None
        self._fingerprint = ""
        self._num_drawn = 0  # by an earlier prediction that is continued
        self._num_images = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the results of an earlier prediction; all ranks wait for rank 0 to do so.

        Raises:
            ValueError: if the folder cannot be written to, or holds a table of the user's own that would be replaced.
        """
        self._results, self._fingerprint, self._num_drawn = None, "", 0
        if stage != "predict":
            return
        data = getattr(trainer, "datamodule", None)
        continues = "parquet" in self.formats and isinstance(data, LoadingDataModule)
        if isinstance(data, LoadingDataModule):
            data.find_finished = partial(self._find_finished, trainer, pl_module) if continues else None
        if not trainer.is_global_zero:
            return
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            check_tables(self.folder, self.formats)
            if not continues and self._clear():
                rank_zero_info(f"the earlier results in '{self.folder}' are replaced")
            hidden(self.folder, 0, "part").touch()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the files of this rank.

        Raises:
            TypeError: if the module has no ``class_names`` and ``category_ids``.
            ValueError: if the folder is not the one that rank 0 has prepared.
        """
        names, ids = _classes_of(pl_module)
        rank, data = trainer.global_rank, getattr(trainer, "datamodule", None)
        if not hidden(self.folder, 0, "part").exists():
            raise ArgumentError(f"rank {rank} does not see the '{self.folder}' of rank 0; choose a shared folder")
        if "parquet" in self.formats and isinstance(data, LoadingDataModule) and not self._fingerprint:
            self._find_finished(trainer, pl_module, [])  # the data do not know their images before they are read
        parquet = None
        if "parquet" in self.formats:
            parquet = ParquetWriter(self.folder / FOLDER, rank, self.images_per_part, self._fingerprint, names, ids)
        limit = 0 if not self.draw else None if self.draw_limit is None else max(0, self.draw_limit - self._num_drawn)
        with writing_to(self.folder):
            self._results = RankResults(
                self.folder,
                rank,
                self.formats,
                names,
                ids,
                self._thresholds(pl_module, len(names)),
                None if limit is None else _share(limit, rank, trainer.world_size),
                self.font,
                parquet,
            )
        self._num_images = 0

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Sequence[Detection],
        batch: Batch | list[Tensor] | Tensor,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the results of a batch.

        An image without ``image_id`` gets the next number: 1, 2, ... on one rank, in turn on several.

        Raises:
            DivergenceError: if a box or score is not finite.
        """
        assert self._results is not None  # opened when the prediction began
        images, targets = split_batch(batch)
        names: Sequence[Mapping[str, object]] = targets or [{}] * len(images)
        with writing_to(self.folder):
            for image, target, detection in zip(images, names, outputs, strict=True):
                image_id = image_id_of(target)
                if image_id is None:
                    image_id = self._num_images * trainer.world_size + trainer.global_rank + 1
                self._num_images += 1
                file_name = str(target.get("file_name", image_id))
                found = Detection(
                    boxes=detection["boxes"].cpu(), labels=detection["labels"].cpu(), scores=detection["scores"].cpu()
                )
                self._results.write(image, found, image_id, file_name)
            self._results.end_batch()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what is left of this rank's results."""
        if self._results is not None:
            with writing_to(self.folder):
                self._results.finish()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Merge the parts of all ranks into ``predictions.json`` and ``predictions.csv``."""
        if stage != "predict":
            return
        if isinstance(data := getattr(trainer, "datamodule", None), LoadingDataModule):
            data.find_finished = None
        self._close()
        # not at the end of the epoch: a rank without images has none
        trainer.strategy.barrier("PredictionWriter: parts complete")
        if not trainer.is_global_zero:
            return
        ranks: list[int | str] = [*range(trainer.world_size), "finished"]
        parts = [path for rank in ranks if (path := hidden(self.folder, rank, "part")).exists()]
        for name, (file, merge) in MERGED.items():
            if name in self.formats:
                with writing_to(self.folder):
                    merge(parts, self.folder / file)
                rank_zero_info(f"predictions are in '{self.folder / file}'")
        for part in parts:
            part.unlink()
        for name in sorted(set(self.formats) - set(TABLES)):
            rank_zero_info(f"predictions are in '{self.folder / name}'")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove this rank's part of the results, which will not be completed; drawings stay until the next run."""
        with suppress(OSError):  # the exception may be that the folder cannot be used, or is full
            self._close()
        with suppress(OSError):
            hidden(self.folder, trainer.global_rank, "part").unlink()

    def _close(self) -> None:
        if self._results is not None:
            self._results.close()

    def _thresholds(self, pl_module: pl.LightningModule, num_classes: int) -> list[float]:
        if self.score_threshold != "best":
            return [self.score_threshold] * num_classes
        best: Sequence[float | None] | None = getattr(pl_module, "score_thresholds", None)
        if any(isinstance(part, FusedDetector) for part in _network(pl_module).modules()):
            best = None  # fusion changes scores
        return [SCORE_THRESHOLD if value is None else value for value in best or [None] * num_classes]

    # ---- going on with a prediction that was ended

    def _find_finished(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Sequence[ImageKey]
    ) -> Collection[int]:
        """The ids of the images that finished parts hold; what does not belong to them is removed. Collective."""
        answer: tuple[str, frozenset[int], int] | None = None
        if trainer.is_global_zero:
            fingerprint = _fingerprint(pl_module, self._options(trainer, pl_module))
            parts, num_removed = clear_parts(self.folder / FOLDER, fingerprint, images)
            if num_removed:
                rank_zero_info(f"{num_removed} parts of other weights, settings or images are replaced")
            finished = frozenset(image_id for part in parts for image_id, _ in part.images)
            answer = fingerprint, finished, self._keep(parts, finished, pl_module)
            if finished:
                rank_zero_info(
                    f"{len(finished)} of {len(images)} images are done: their results in '{self.folder}' stay, and the "
                    "prediction goes on with the others; choose another folder to begin anew"
                )
        answer = trainer.strategy.broadcast(answer)
        assert answer is not None  # rank 0 has it
        self._fingerprint, finished, self._num_drawn = answer
        return finished

    def _keep(self, parts: Sequence[FinishedPart], finished: Collection[int], pl_module: pl.LightningModule) -> int:
        """Remove the results of images that are not finished, and tell how many drawings stay."""
        remove_tables(self.folder)
        _, num_drawn = remove_files(self.folder, {*finished, OF_ALL_IMAGES} if finished else ())
        hidden(self.folder, 0, "part").touch()
        if any(name in self.formats for name in TABLES):
            names, ids = _classes_of(pl_module)
            with open(hidden(self.folder, "finished", "part"), "w") as file:
                found = [(*key, detection) for part in parts for detection, key in read_part(part, ids)]
                for image_id, file_name, detection in sorted(found, key=lambda entry: entry[0]):
                    write_line(file, image_id, coco_results(detection, image_id, file_name, names, ids))
        return num_drawn

    def _clear(self) -> bool:
        """Remove the results of an earlier prediction; tell whether there were any."""
        _, num_parts = clear_parts(self.folder / FOLDER, None)
        num_files, _ = remove_files(self.folder)
        return bool(remove_tables(self.folder) + num_files + num_parts)

    def _options(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, object]:
        """What the files of the images depend on, beside the weights and settings of the module."""
        data = getattr(trainer, "datamodule", None)
        names, ids = _classes_of(pl_module)
        return {
            "classes": [names, ids, self._thresholds(pl_module, len(names))],
            "pixels": [str(getattr(data, name, None)) for name in ("value_range", "in_chans")],
            "formats": sorted(set(self.formats) - set(TABLES)),
            "drawings": [self.draw, self.draw_limit, self.font],
            "precision": str(trainer.precision),
        }


def _check_formats(formats: str | list[str]) -> list[Format]:
    known: tuple[Format, ...] = get_args(Format)
    names = [name.strip() for name in formats.split(",")] if isinstance(formats, str) else list(formats)
    for name in names:
        if name not in known:
            raise ArgumentError(f"formats: there is no '{name}'; {suggest(name, list(known))}")
    if "parquet" in names:
        check_pyarrow()
    return [name for name in known if name in names]


def _classes_of(pl_module: pl.LightningModule) -> tuple[list[str], list[int]]:
    names, ids = (getattr(pl_module, name, None) for name in ("class_names", "category_ids"))
    if names is None or ids is None:
        raise TypeError(
            f"{type(pl_module).__name__} has no class_names and category_ids; PredictionWriter names boxes by them"
        )
    return list(names), list(ids)


def _network(pl_module: pl.LightningModule) -> nn.Module:
    """The network that predicts, with the windows, views and further detectors around it."""
    network = getattr(pl_module, "inference_detector", pl_module)
    assert isinstance(network, nn.Module)
    return network


def _fingerprint(pl_module: pl.LightningModule, options: Mapping[str, object]) -> str:
    """A digest of the weights and the settings that predictions depend on."""
    networks = [pl_module, _network(pl_module)]
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, part in network.named_modules():
            facts = dict(part.hparams) if isinstance(part, pl.LightningModule) else vars(part)
            settings = {k: v for k, v in facts.items() if k != "training" and k[:1] != "_" and _is_plain(v)}
            digest.update(f"{name} {type(part).__name__} {sorted(settings.items())}".encode())
    return digest.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str)


def _share(number: int, rank: int, world_size: int) -> int:
    return number // world_size + (rank < number % world_size)
