"""F1 of the test split at fixed score thresholds and at those chosen on the validation split, IoU 0.5.

    python benchmarks/thresholds.py BCCD seed1.ckpt seed2.ckpt seed3.ckpt

``single`` is the one threshold of each class with the highest F1 on the validation split, ``chosen`` the one that
checkpoints store, and ``oracle`` what is chosen on the test split itself.
"""

import argparse
import os
from collections.abc import Sequence

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det import DetectionDataModule, load_module
from lightning_convnext_det.metrics.matching import Matches
from lightning_convnext_det.metrics.thresholds import ClassThreshold, choose_thresholds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("checkpoints", nargs="+")
    options = parser.parse_args()
    means: dict[str, list[float]] = {}
    for path in options.checkpoints:
        names, val, test = match_splits(path, options.root)
        ways = {
            "0.5": [0.5] * len(names),
            "0.3": [0.3] * len(names),
            "single": [single_best(val, label) for label in range(len(names))],
            "chosen": thresholds_of(choose_thresholds(val)),
            "oracle": thresholds_of(choose_thresholds(test)),
        }
        print(f"{os.path.basename(path)}: test F1 of {', '.join(names)}; mean; at the thresholds", flush=True)
        for way, thresholds in ways.items():
            values = [f1_at(test, label, threshold) for label, threshold in enumerate(thresholds)]
            means.setdefault(way, []).append(float(np.mean(values)))
            shown = "  ".join(f"{value:.3f}" for value in values)
            print(f"  {way:<7} {shown}  {means[way][-1]:.4f}  {'  '.join(f'{t:.3f}' for t in thresholds)}", flush=True)
    print(f"mean over classes and {len(options.checkpoints)} detectors")
    for way, values in means.items():
        print(f"  {way:<7} {np.mean(values):.4f}")


def match_splits(checkpoint: str, root: str) -> tuple[list[str], Matches, Matches]:
    """The classes of a detector, and its matches on the validation and the test split."""
    module, found = load_module(checkpoint), []

    def keep(matches: Matches) -> list[ClassThreshold]:
        found.append(matches)
        return choose_thresholds(matches)

    module.evaluator.choose = keep
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, devices=1)
    data = DetectionDataModule(root)
    trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    return module.class_names, found[0], found[1]


def f1_at(matches: Matches, label: int, threshold: float) -> float:
    kept = (matches.label == label) & ~matches.is_ignored[0] & (matches.score >= threshold)
    return float(2 * matches.is_true_positive[0, kept].sum() / (kept.sum() + matches.num_objects[label]))


def single_best(matches: Matches, label: int) -> float:
    scores: NDArray[np.float32] = np.unique(matches.score[matches.label == label])
    return float(max(scores, key=lambda score: f1_at(matches, label, float(score))))


def thresholds_of(chosen: Sequence[ClassThreshold]) -> list[float]:
    return [0.3 if one.threshold is None else one.threshold for one in chosen]


if __name__ == "__main__":
    main()
