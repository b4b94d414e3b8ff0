"""What a training says of itself, and the report at its end."""

import re
from pathlib import Path

import pytest
from PIL import Image

from lightning_convnext_det.callbacks.run_overview import duration
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from tests.cli.test_main import SMALL

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def test_duration__by_hand() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3599.4, 86400)] == ["0 s", "1 min 0 s", "59 min 59 s", "24 h 0 min"]


@pytest.mark.heavy
def test_fit__shows_itself_and_reports(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_synthetic_coco(tmp_path / "shapes", num_train=24, num_val=4)
    places = [f"--data.root={root}", f"--trainer.default_root_dir={tmp_path}", "--data.batch_size=2"]
    with caplog.at_level("INFO"):
        assert main(["fit", *places, "--trainer.max_epochs=1", "--report=true", *SMALL]) == 0
    said = caplog.text
    assert re.search(r"data: 24 training images, \d+ objects of 5 classes", said)
    assert "backbone test_convnext, " in said
    assert re.search(r"steps: 12; learning rate [\d.e-]+ at the start, [\d.e-]+ at its peak", said)
    assert re.search(r"forecast: [\d.]+ s a step, \d+ s to go, without validation", said)
    folder = tmp_path / "version_0"
    with Image.open(folder / "training_images.jpg") as sheet:
        assert sheet.width > 1000
    page = (folder / "report.html").read_text()
    assert '<section id="training">' in page  # the curves of metrics.csv
    assert (folder / "report.json").is_file()
