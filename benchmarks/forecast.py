"""What a fit forecasts after ten steps against what came, in four configurations.

Time is that of the processor, since other programs share the machine; `RunOverview` then reads the same clock:

    python benchmarks/forecast.py [faster deformable sizes validation]
"""

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

from lightning_convnext_det.callbacks import pace
from lightning_convnext_det.callbacks.run_overview import RunOverview
from lightning_convnext_det.cli import trainer
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.synthetic import write_synthetic_coco

SMALL = [
    "--model.backbone=test_convnext", "--model.fpn_channels=64", "--model.box_head_features=128",
    "--model.anchor_sizes=[[16],[32],[64],[96],[128]]", "--model.min_size=128", "--model.max_size=176",
]  # fmt: skip
DETR = [
    "--model=DeformableDETRModule", "--model.backbone=test_convnext", "--model.hidden_dim=64", "--model.num_queries=50",
    "--model.feedforward_dim=128", "--model.min_size=128", "--model.max_size=176",
]  # fmt: skip
# arguments of the fit; images to train on and to validate on, and their sides in pixels
RUNS = {
    "faster": ([*SMALL, "--trainer.max_epochs=3"], (160, 24), (192, 256)),
    "deformable": ([*DETR, "--trainer.max_epochs=3"], (120, 24), (192, 256)),
    "sizes": (
        ["--model.backbone=convnext_atto", "--model.fpn_channels=64", "--model.min_size=240", "--model.max_size=360",
         "--data.train_transforms=multiscale", "--data.sizes=[160,200,240]", "--trainer.max_epochs=2"],
        (80, 12), (240, 480),
    ),
    "validation": ([*SMALL, "--trainer.max_epochs=4", "--trainer.val_check_interval=10"], (80, 40), (192, 256)),
}  # fmt: skip
ALWAYS = [
    "--plan=false", "--data.batch_size=4", "--data.num_workers=0", "--trainer.accelerator=cpu", "--model.warmup_steps=30",
    "--trainer.enable_progress_bar=false", "--trainer.gradient_clip_val=5", "--model.lr=1e-3",
]  # fmt: skip


class Recorded(RunOverview):
    """Keeps the last one, and what it foresees after the first validation."""

    last: "Recorded"
    second: float = float("nan")

    def __init__(self) -> None:
        super().__init__()
        type(self).last = self

    def on_validation_end(self, *arguments: object) -> None:
        due = self._forecasts_due
        super().on_validation_end(*arguments)
        if due == 1 and self._forecasts_due == 0:
            self.second = self._pace.elapsed + self._pace.seconds_to_go(arguments[0])


def run(name: str) -> tuple[float, float, float]:
    """Seconds foreseen after ten steps, foreseen after the first validation, and taken."""
    options, (num_train, num_val), (low, high) = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        root = write_synthetic_coco(Path(folder) / "data", num_train, num_val, min_side=low, max_side=high)
        places = [f"--data.root={root}", f"--trainer.default_root_dir={folder}"]
        assert main(["fit", *places, *ALWAYS, *options]) == 0
    overview = Recorded.last
    assert overview.forecast is not None
    return overview.forecast, overview.second, overview.seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(RUNS))
    names = parser.parse_args().names
    warnings.filterwarnings("ignore")
    pace.monotonic = time.process_time
    trainer.RunOverview = Recorded
    for name in names:
        first, second, taken = run(name)
        sys.stdout.write(
            f"| {name} | {first:.1f} | {taken:.1f} | {100 * (first / taken - 1):+.1f} % | "
            f"{second:.1f} | {100 * (second / taken - 1):+.1f} % |\n"
        )
        sys.stdout.flush()
