import json
from pathlib import Path

import pytest
import yaml

from lightning_convnext_det.cli import main
from lightning_convnext_det.data.synthetic import write_synthetic_coco

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_synthetic_coco(tmp_path_factory.mktemp("data"), 6, 3)
    # a configuration may ask for any of the usual splits
    annotations = folder / "annotations"
    content = json.loads((annotations / "instances_train.json").read_text())
    (annotations / "instances_trainval.json").write_text(json.dumps(content))
    (folder / "trainval").symlink_to(folder / "train")
    return folder


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config__trains_one_step(config: Path, dataset: Path, tmp_path: Path) -> None:
    arguments = [
        f"--config={config}",
        f"--data.root={dataset}",
        "--data.batch_size=1",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32",
        "--trainer.fast_dev_run=true",
        "--trainer.enable_progress_bar=false",
        "--model.pretrained_backbone=false",
        "--data.sizes=[64,96]",
        "--data.max_size=128",
        "--data.crop_size=96",
        "--model.min_size=64",
        "--model.max_size=96",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    assert main(["fit", *arguments]) == 0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config__says_how_it_is_used(config: Path) -> None:
    text = config.read_text()
    assert text.startswith("# ")
    assert f"--config configs/{config.relative_to(config.parents[0]).name}" in text
    assert set(yaml.safe_load(text)) <= {"seed_everything", "model", "data", "trainer", "checkpoint", "output"}
