import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from lightning_convnext_det import ClassifierModule, ImageFolderDataModule, classify, load_classifier, load_module
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.errors import CheckpointError, DataError
from tests.training import create_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
COLORS = {"blue": (20, 30, 220), "green": (20, 220, 30), "red": (220, 30, 20)}
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.num_workers=0"]


def write_folder(root: Path, per_class: int, names: dict[str, tuple[int, int, int]] = COLORS) -> Path:
    generator = np.random.default_rng(per_class)
    for name, color in names.items():
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            noise = generator.integers(-20, 20, (40, 36 + 4 * i, 3))
            Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    write_folder(root / "train", 7)
    write_folder(root / "val", 3)
    return root


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training from the command line."""
    runs = tmp_path_factory.mktemp("runs")
    model = ["--model=ClassifierModule", "--model.backbone=test_convnext", "--model.lr=3e-3", "--model.mixup=0.2"]
    model += ["--model.cutmix=1.0", "--model.mix_probability=0.5", "--model.random_erasing=0.25"]
    data = [f"--data.root={folder}", "--data.image_size=32", "--data.batch_size=6", "--data.color_jitter=0.1"]
    ema = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.8"]
    trainer = ["--trainer.max_epochs=8", f"--trainer.default_root_dir={runs}"]
    assert main(["fit", *model, *data, *ema, *trainer, *QUIET]) == 0
    return runs / "version_0" / "checkpoints" / "best.ckpt"


@pytest.mark.heavy
def test_fit__learns_and_logs(trained: Path, folder: Path) -> None:
    with open(trained.parents[1] / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "val/loss", "val/top1", "val/top5"} <= set(rows[0])
    top1 = [float(row["val/top1"]) for row in rows if row["val/top1"]]
    assert max(top1) > 0.85
    module = load_classifier(trained)
    assert module.class_names == ["blue", "green", "red"]
    assert classify(module.classifier, folder / "val" / "red" / "0.png")[0].name == "red"


@pytest.mark.heavy
def test_commands__test_and_predict_a_checkpoint(
    trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = [f"--trainer.default_root_dir={tmp_path}", "--data.image_size=32"]
    assert main(["test", f"--ckpt_path={trained}", f"--data.root={folder}", *root, *QUIET]) == 0
    output = [f"--data.predict={folder}/val/**/*.png", f"--output.folder={tmp_path / 'found'}"]
    assert main(["predict", f"--ckpt_path={trained}", *output, *root, *QUIET]) == 0
    results = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert len(results) == 9
    right = [Path(r["file_name"]).parent.name == r["class_name"] for r in results]
    assert sum(right) >= 8
    assert all(1 / 3 <= r["score"] <= 1 for r in results)
    capsys.readouterr()
    assert main(["predict", f"--ckpt_path={trained}", *output, *root, *QUIET, "--output.formats=csv"]) == 2
    assert "output.formats is csv, which are of detectors" in capsys.readouterr().err


@pytest.mark.heavy
def test_commands__a_classifier_becomes_a_detectors_backbone(trained: Path) -> None:
    from lightning_convnext_det import create_detector

    detector = create_detector(
        "fasterrcnn_fpn", 2, backbone="test_convnext", backbone_weights=str(trained), fpn_channels=8
    )
    own = load_classifier(trained).classifier.net.state_dict()
    assert torch.equal(detector.backbone.body.net.stem_0.weight, own["stem.0.weight"])


@pytest.mark.heavy
def test_load__a_classifier_is_no_detector(trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"LCD-K013.*holds a classifier; load_classifier reads it"):
        load_module(trained)


@pytest.mark.heavy
def test_commands__released_weights_on_a_folder_of_some_imagenet_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # folders are found by ImageNet's numbers among the network's 1000 classes; the accuracy is computed by hand
    names = {"n01443537": (220, 120, 20), "n02123045": (120, 120, 120)}  # goldfish (1), tabby (281)
    root = write_folder(tmp_path / "val", 4, names)
    torch.manual_seed(3)
    net = timm.create_model("test_convnext").eval()
    save_file(net.state_dict(), tmp_path / "released.safetensors")
    arguments = ["--model=ClassifierModule", "--model.backbone=test_convnext", f"--data.val={root}"]
    arguments += [f"--model.backbone_weights={tmp_path / 'released.safetensors'}", "--data.image_size=160"]
    assert main(["validate", *arguments, f"--trainer.default_root_dir={tmp_path}", *QUIET]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "val/loss" in line)
    data = ImageFolderDataModule(val=str(root), image_size=160, num_workers=0, batch_size=8)
    batch = next(iter(data.val_dataloader()))
    config = timm.data.resolve_data_config({}, model=net)
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        logits = net((batch["images"] / 255 - mean) / std)
    loss = F.cross_entropy(logits, torch.tensor([1] * 4 + [281] * 4))
    assert float("".join(c for c in row.split("val/loss")[1] if c in "0123456789.e-")) == pytest.approx(
        float(loss), rel=1e-4
    )


def test_setup__unknown_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    module = ClassifierModule(3, ["blue", "green", "yellow"], backbone="test_convnext")
    data = ImageFolderDataModule(str(folder), image_size=32, num_workers=0)
    with pytest.raises(DataError, match="class 2 is 'yellow', the dataset's is 'red'"):
        create_trainer(tmp_path).validate(module, data, verbose=False)


@pytest.mark.parametrize(("mixup", "count"), [(0.0, 4), (0.8, 4), (0.8, 3)])
def test_training_step__targets(mixup: float, count: int) -> None:
    module = ClassifierModule(3, backbone="test_convnext", mixup=mixup, label_smoothing=0.1)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    seen: list[torch.Tensor] = []
    forward = module.classifier.net.forward
    module.classifier.net.forward = lambda x: seen.append(x) or forward(x)  # type: ignore[method-assign]
    images = torch.randint(0, 255, (count, 3, 32, 32), dtype=torch.uint8)
    module.eval()
    loss = module.training_step({"images": images, "labels": torch.tensor([0, 1, 2, 1][:count]), "file_names": []}, 0)
    plain = module.classifier.normalize(images)
    assert torch.equal(seen[0], plain) == (mixup == 0 or count == 3)
    if mixup == 0 or count == 3:
        logits = forward(plain).log_softmax(-1)
        target = F.one_hot(torch.tensor([0, 1, 2, 1][:count]), 3) * 0.9 + 0.1 / 3
        assert loss.item() == pytest.approx(-(target * logits).sum(-1).mean().item(), rel=1e-5)


def test_parameter_groups__of_a_classifier() -> None:
    module = ClassifierModule(3, backbone="convnext_atto", lr=1.0, layer_decay=0.5, backbone_lr_factor=0.1)
    assert module.learning_rate_factor("stem.0.weight") == pytest.approx(0.1 * 0.5**7)
    assert module.learning_rate_factor("head.fc.weight") == 1.0
    names = {id(p): n for n, p in module.classifier.net.named_parameters()}
    free = {names[id(p)] for g in module.parameter_groups() if g["weight_decay"] == 0 for p in g["params"]}
    assert "stages.0.blocks.0.gamma" in free
    assert "head.fc.weight" not in free
