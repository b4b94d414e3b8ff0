import inspect
import json
from pathlib import Path

import pytest
import timm
import yaml

from lightning_convnext_det.cli.main import main
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.models.deformable_detr.dino import DINO
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN

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


@pytest.mark.heavy
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config__trains_one_step(
    config: Path, dataset: Path, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    if not config.stem.startswith("bccd"):  # of real images, with a smaller network of the same kind
        dataset = request.getfixturevalue("shared_data") / "coco_mini"
    model = yaml.safe_load(config.read_text())["model"]["init_args"]
    small = {"fpn_channels": 16, "box_head_features": 32, "hidden_dim": 32, "feedforward_dim": 32}
    kinds = {"DeformableDETR": DeformableDETR, "DINO": DINO}
    kind = yaml.safe_load(config.read_text())["model"].get("class_path", "").split(".")[-1].removesuffix("Module")
    known = inspect.signature(kinds.get(kind, FasterRCNN)).parameters
    backbone = "resnet18" if model["backbone"].startswith("resnet") else "convnext_atto"
    arguments = [
        f"--model.backbone={backbone}",
        *(f"--model.{name}={value}" for name, value in small.items() if name in known),
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
    caplog.set_level("INFO")
    assert main(["fit", *arguments]) == 0
    said = caplog.text
    assert ("layer 0, lr x" in said) == ("layer_decay" in model)
    if size := model.get("base_batch_size"):
        assert f"learning rate {model['lr']:g} x 1 / {size} = {model['lr'] / size:g}: total batch 1" in said


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config__backbone_and_weights_are_known(config: Path) -> None:
    model = yaml.safe_load(config.read_text())["model"]["init_args"]
    name = model["backbone"]
    assert timm.is_model(name.split(".")[0])
    if model.get("pretrained_backbone"):
        assert name in timm.list_pretrained(name.split(".")[0] + ".*")


@pytest.mark.heavy
def test_config__printed_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", f"--config={CONFIGS[0].parent / 'convnext_3x.yaml'}", "--data.root=COCO", "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    model = printed["model"]["init_args"]
    assert (model["lr"], model["layer_decay"], model["weight_decay"], model["drop_path_rate"]) == (
        1e-4,
        0.95,
        0.05,
        0.4,
    )
    assert (model["milestones"], printed["trainer"]["max_epochs"]) == ([27, 33], 36)
    assert printed["data"]["init_args"]["sizes"] == list(range(480, 801, 32))
    assert printed["data"]["init_args"]["train_transforms"] == "multiscale"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config__says_how_it_is_used(config: Path) -> None:
    text = config.read_text()
    assert text.startswith("# ")
    assert f"--config configs/{config.relative_to(config.parents[0]).name}" in text
    assert set(yaml.safe_load(text)) <= {"seed_everything", "plan", "model", "data", "trainer", "checkpoint", "output"}
