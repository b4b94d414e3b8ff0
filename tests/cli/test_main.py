import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from pycocotools.coco import COCO

from lightning_convnext_det import __version__
from lightning_convnext_det.cli.commands import TOOLS, TRAINER
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.cli.messages import find_user_error, is_raised_in, one_line
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import DataError
from lightning_convnext_det.models import image_transform
from lightning_convnext_det.modules import load_module
from tests.convert.test_importer import original_state

SMALL = [
    "--model.backbone=test_convnext",
    "--model.min_size=64",
    "--model.max_size=96",
    "--model.fpn_channels=16",
    "--model.box_head_features=32",
    "--model.rpn_post_nms_top_n=[100, 100]",
    "--model.box_batch_size_per_image=32",
    "--model.score_threshold=0",
    "--plan=false",  # what a plan chooses depends on the processor
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.num_workers=0",
]
QUIET = SMALL[-4:]

# Lightning's advice, and what it says of a loader without workers
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_coco(tmp_path_factory.mktemp("data"), 12, 6, 6)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training of one epoch."""
    folder = tmp_path_factory.mktemp("runs")
    root = ["--data.root", str(dataset), "--trainer.default_root_dir", str(folder)]
    assert main(["fit", *root, "--trainer.max_epochs=1", *SMALL]) == 0
    return folder


@pytest.mark.heavy
def test_fit__writes_checkpoints_metrics_and_configuration(run: Path) -> None:
    version = run / "version_0"
    assert {p.name for p in (version / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    header = (version / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/map", "val/map_50"} <= set(header)
    assert "star" in (version / "val_per_class.csv").read_text()
    assert list(version.glob("events.out.tfevents*"))
    config = yaml.safe_load((version / "config.yaml").read_text())
    assert config["model"]["init_args"]["fpn_channels"] == 16
    module = load_module(version / "checkpoints" / "best.ckpt")
    assert module.class_names == ["disc", "ring", "square", "triangle", "star"]


@pytest.mark.heavy
def test_fit__continues_from_a_checkpoint(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / "version_0" / "checkpoints" / "last.ckpt"
    root = ["--data.root", str(dataset), "--trainer.default_root_dir", str(tmp_path)]
    # the network is the checkpoint's; what the command line says wins and is announced
    status = main(["fit", *root, *QUIET, f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2", "--model.lr=0.5"])
    assert status == 0
    assert "model.lr: 0.5 replaces the checkpoint's 0.0001" in capsys.readouterr().err
    rows = (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()
    epoch = rows[0].split(",").index("epoch")
    assert {row.split(",")[epoch] for row in rows[1:]} == {"1"}
    assert load_module(tmp_path / "version_0" / "checkpoints" / "last.ckpt").detector.backbone.out_channels == 16


@pytest.mark.heavy
@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_fit__emulated_bfloat16_is_replaced_and_said(
    native: bool,
    precision: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    seen = []
    original = Trainer.fit

    @functools.wraps(original)  # the command reads its arguments off the signature
    def fit(self: Trainer, *arguments: object, **options: object) -> None:
        seen.append(self.precision)

    monkeypatch.setattr(Trainer, "fit", fit)
    options = ["--trainer.precision=bf16-mixed", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", "--data.root", str(dataset), *options, *SMALL]) == 0
    assert seen == [precision]
    assert ("32-true replaces bf16-mixed" in capsys.readouterr().err) is not native


def test_test__logs_the_figures(run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "version_0" / "checkpoints" / "best.ckpt"
    root = ["--data.root", str(dataset), "--trainer.default_root_dir", str(tmp_path)]
    assert main(["test", *root, *QUIET, f"--ckpt_path={checkpoint}"]) == 0
    assert "test/map_50" in capsys.readouterr().out


def test_predict__needs_only_a_checkpoint_and_images(run: Path, dataset: Path, tmp_path: Path) -> None:
    checkpoint = run / "version_0" / "checkpoints" / "best.ckpt"
    output = tmp_path / "found"
    arguments = [f"--data.predict={dataset / 'test'}", f"--output.folder={output}", f"--ckpt_path={checkpoint}"]
    assert main(["predict", *arguments, *QUIET, "--trainer.default_root_dir", str(tmp_path)]) == 0
    results = json.loads((output / "predictions.json").read_text())
    assert {r["category_id"] for r in results} <= {1, 2, 3, 4, 5}
    assert {r["file_name"] for r in results} == {str(p) for p in (dataset / "test").iterdir()}
    assert len(list(output.glob("*.jpg"))) == 6
    # with the dataset's ids of the images, pycocotools reads it
    truth = COCO(str(dataset / "annotations" / "instances_test.json"))
    id_of = {image["file_name"]: image["id"] for image in truth.imgs.values()}
    own = [{**r, "image_id": id_of[Path(r["file_name"]).name]} for r in results]
    assert len(truth.loadRes(own).anns) == len(results)


def test_test__weights_of_another_network_end_in_one_line(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / "version_0" / "checkpoints" / "best.ckpt"
    root = ["--data.root", str(dataset), "--trainer.default_root_dir", str(tmp_path)]
    assert main(["test", *root, *QUIET, f"--ckpt_path={checkpoint}", "--model.fpn_channels=32"]) == 6
    assert "error: [LCD-K014] the checkpoint does not fit the network" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_fit__without_validation_the_last_checkpoint_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_synthetic_coco(tmp_path / "data", 3, 2)
    (tmp_path / "data" / "annotations" / "instances_val.json").unlink()
    root = ["--data.root", str(tmp_path / "data"), "--trainer.default_root_dir", str(tmp_path)]
    assert main(["fit", *root, "--data.val_fraction=0", "--trainer.max_epochs=1", *SMALL]) == 0
    assert (tmp_path / "version_0" / "checkpoints" / "best.ckpt").is_file()
    assert re.search(r"best checkpoint +version_0/checkpoints/best.ckpt", caplog.text)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["fit", "--data.root", "DATA", "--data.rot", "x"], 2, "did you mean --data.root"),
        (["fit", "--data.root", "DATA", "--model.score_treshold=1"], 2, "did you mean --model.score_threshold"),
        (["fit", "--data.root", "DATA", "--model.backbone=convnext_tinny"], 2, "did you mean 'convnext_tiny'"),
        (["fit", "--data.root", "DATA", "--data.train_transforms=flipp"], 2, "flipp"),
        (["fit", "--data.root", "DATA/nowhere"], 3, "nowhere: there is no such folder"),
        (["fit", "--data.root", "EMPTY"], 3, "LCD-L"),
        (["fit"], 3, "LCD-"),
        (["test", "--data.root", "DATA"], 6, "test needs trained weights: add --ckpt_path FILE"),
        (["predict", "--data.predict", "DATA", "--ckpt_path", "none.ckpt"], 6, "none.ckpt: no such checkpoint file"),
        (["predict", "--data.predict", "DATA", "--ckpt_path", "http://host/x.ckpt"], 6, "LCD-S010"),
        (["check", "EMPTY"], 3, "LCD-L"),
        (["fit", "--data.root", "DATA", "--trainer.precision=bf16-true"], 2, "trainer.precision is 'bf16-true'"),
        (["fit", "--data.root", "DATA", "--trainer.strategy=nope"], 2, "invalid strategy name"),
        (["fit", "--data.root", "DATA", "--trainer.max_epochs=-5"], 2, "must be a non-negative integer"),
        (["fit", "--data.root", "DATA", "--trainer.devices=0"], 2, "not a valid input"),
        (
            ["fit", "--data.root", "DATA", "--trainer.gradient_clip_val=abc"],
            2,
            "gradient_clip_val is abc: expected int; expected float",
        ),
        (["fit", "--data.root", "DATA", "--trainer.logger=CometLogger"], 2, "comet"),
        (["fit", "--data.root", "DATA", "--model=nowhere.Mine"], 2, "No module named 'nowhere'"),
        (["fit", "--data.root", "DATA", "--checkpoint.monitor=val/none"], 2, "LCD-C020"),
        (["boxes"], 2, "invalid command 'boxes'"),
        (["validat"], 2, "invalid command 'validat'; did you mean 'validate'?"),
        ([], 2, "give one of fit, validate, test, predict, check"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_main__a_mistake_ends_in_one_line(
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"DATA": str(dataset), "EMPTY": str(tmp_path / "empty")}
    for word, place in places.items():
        arguments = [a.replace(word, place) for a in arguments]
    arguments += ["--plan=false"] * (arguments[:1] == ["fit"])  # which would need a network for its weights
    capsys.readouterr()
    try:
        found = main(arguments)
    except SystemExit as error:
        found = error.code
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (found, len(lines)) == (status, 1), err
    assert message in lines[0]
    assert "Traceback" not in err


def test_fit__early_stopping_on_an_unknown_metric_ends_in_one_line(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
    root = ["--data.root", str(dataset), "--trainer.default_root_dir", str(tmp_path)]
    assert main(["fit", *root, *SMALL, *stop, "--trainer.max_epochs=1"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "metric `val_loss` which is not available" in lines[0]


@pytest.mark.parametrize("code", ["int('oops')", "{}['x']", "(1, 2)[3]", "None.shape"])
def test_fit__a_defect_of_this_package_keeps_its_traceback(
    code: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def new_size(self: object, height: int, width: int) -> tuple[int, int]:
        return eval(code, {"__name__": image_transform.__name__})

    monkeypatch.setattr(image_transform.ImageTransform, "new_size", new_size)
    root = ["--data.root", str(dataset), "--trainer.default_root_dir", str(tmp_path)]
    with pytest.raises((ValueError, LookupError, AttributeError)):
        main(["fit", *root, *SMALL, "--trainer.fast_dev_run=true"])


def test_main__check_says_clean_or_not(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(dataset)]) == 0
    assert "clean" in capsys.readouterr().out
    write_synthetic_coco(tmp_path / "bad", 3, 2)
    file = tmp_path / "bad" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] = 0
    file.write_text(json.dumps(content))
    assert main(["check", str(tmp_path / "bad")]) == 3
    assert f"{content['annotations'][0]['id']}" in capsys.readouterr().out


def test_main__check_takes_what_its_messages_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_synthetic_coco(tmp_path, 3, 2)
    file = tmp_path / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 99
    file.write_text(json.dumps(content))
    assert main(["check", str(tmp_path), "--invalid_annotations", "drop"]) == 3
    assert "(dropped)" in capsys.readouterr().out
    names = [category["name"] for category in content["categories"]]
    assert main(["check", str(tmp_path), "--exif", "raw", "--class_names", *names[:-1], "cow"]) == 3
    assert "class 'cow' is not among the categories" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path), "--exif", "left"])


@pytest.mark.heavy
def test_main__import_weights_writes_a_checkpoint_that_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = original_state(num_classes=3)
    torch.save({"model": state}, tmp_path / "theirs.pth")
    source, written = str(tmp_path / "theirs.pth"), tmp_path / "new" / "ours.ckpt"
    assert main(["import-weights", source, str(written)]) == 0
    assert "0 missing" in capsys.readouterr().out
    assert load_module(written).num_classes == 3
    (tmp_path / "theirs.pth").write_bytes(b"not weights")
    assert main(["import-weights", source, str(written)]) == 6
    assert "[LCD-K012]" in capsys.readouterr().err


def test_main__help_names_tools_and_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, line in {**TRAINER, **TOOLS}.items():
        assert f"{name} {line}" in text
    assert "4 divergence" in text


def test_main__version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"convnext-det {__version__}\n"


def test_find_user_error__looks_into_causes_and_leaves_defects_alone() -> None:
    mistake = DataError("bad box")
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("a page of a library's") from mistake
    assert find_user_error(caught.value) is mistake
    assert find_user_error(ValueError("a defect")) is None


def test_one_line__of_a_worker_leaves_its_traceback_out() -> None:
    text = "Caught DataError in worker 0.\nOriginal Traceback (most recent call last):\n  x\npkg.DataError: a.jpg"
    assert one_line(DataError(text)) == "a.jpg"
    assert one_line(DataError("two\n  lines")) == "two lines"


def test_is_raised_in__by_a_statement_not_by_an_expression_nor_elsewhere() -> None:
    for code, expected in (("raise ValueError('lr is -1')", True), ("int('x')", False), ("{}['x']", False)):
        for module, is_ours in (("lightning_convnext_det.data.dataset", True), ("torch", False)):
            with pytest.raises((ValueError, KeyError)) as caught:
                exec(compile(code, "x", "exec"), {"__name__": module})
            assert is_raised_in(caught.value, "lightning_convnext_det.") is (expected and is_ours)


def test_main__interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_convnext_det.cli.trainer.DetectionCLI", interrupt)
    assert main(["fit"]) == 130


def test_main__module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lightning_convnext_det", "--version"], capture_output=True, text=True, check=True
    )
    assert __version__ in result.stdout


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("arguments", "left_out"),
    [
        (["--version"], ["torch", "numpy"]),
        (["--help"], ["torch", "numpy"]),
        (["check", "DATA"], ["torch", "scipy", "matplotlib"]),
        (["models", "resnet18"], ["lightning", "torchmetrics"]),
        (["import-weights", "--help"], ["torch"]),
        (["fit", "--help"], ["torch", "numpy", "jsonargparse"]),
        (["predict", "-h"], ["torch", "numpy", "jsonargparse"]),
        (["report", "--help"], ["torch", "numpy", "jsonargparse"]),
        (["compare", "--help"], ["torch", "numpy", "jsonargparse"]),
        (["plan", "--help"], ["torch", "numpy", "jsonargparse"]),
        (["demo", "--help"], ["torch", "numpy", "jsonargparse"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_main__imports_only_what_a_command_needs(arguments: list[str], left_out: list[str], dataset: Path) -> None:
    arguments = [argument.replace("DATA", str(dataset)) for argument in arguments]
    script = (
        "import sys; from lightning_convnext_det.cli.main import main\n"
        f"try: main({arguments})\n"
        f"finally: print('imported:', [name for name in {left_out} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "imported: []"
