"""Files that try to run code, to import modules or to reach the network when they are read. None may."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lightning_convnext_det as package
from lightning_convnext_det.checkpoints.build_module import read_checkpoint
from lightning_convnext_det.cli.main import main
from lightning_convnext_det.convert.importer import import_weights
from lightning_convnext_det.data.check import check_dataset
from lightning_convnext_det.data.synthetic import write_synthetic_coco
from lightning_convnext_det.errors import CheckpointError, DataError, WeightsError
from lightning_convnext_det.inference.predictor import Predictor
from lightning_convnext_det.models.backbone import TimmPyramid
from lightning_convnext_det.models.backbone_weights import read_state_dict
from lightning_convnext_det.modules import DetectionModule, FasterRCNNModule, load_module
from lightning_convnext_det.modules.registry import MODULES, save_module

SMALL = {"backbone": "test_convnext", "fpn_channels": 8, "box_head_features": 8, "min_size": 64, "max_size": 96}
REFUSED = (CheckpointError, WeightsError)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that comes into being when a command runs or the module ``trap_module`` is imported."""
    marker = tmp_path / "executed"
    (tmp_path / "trap_module.py").write_text(f"open({str(marker)!r}, 'w')\nclass Trap:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return marker


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (self.command,)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save_module(FasterRCNNModule(2, ["cat", "dog"], **SMALL), tmp_path / "good.ckpt")
    return tmp_path / "good.ckpt"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def ways(image: Path, data: Path) -> dict[str, Callable[[str], object]]:
    """All that reads a checkpoint or weights, given its path; statuses of the command other than 0 are refusals."""
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.num_workers=0"]

    def command(*arguments: str) -> None:
        status = main([*arguments])
        if status:
            raise CheckpointError(f"status {status}")

    return {
        "load_module": load_module,
        "load_from_checkpoint": FasterRCNNModule.load_from_checkpoint,
        "load_from_checkpoint of the base": DetectionModule.load_from_checkpoint,
        "predictor": Predictor.from_checkpoint,
        "predict": lambda path: command("predict", f"--data.predict={image}", f"--ckpt_path={path}", *quiet),
        "test": lambda path: command("test", f"--data.root={data}", f"--ckpt_path={path}", *quiet),
        "fit": lambda path: command("fit", f"--data.root={data}", f"--ckpt_path={path}", *quiet),
        "import-weights": lambda path: command("import-weights", path, str(image.with_name("out.ckpt"))),
        "import_weights": import_weights,
        "backbone_weights": lambda path: TimmPyramid("test_convnext", weights=path),
        "read_state_dict": read_state_dict,
    }


WAYS = list(ways(Path(), Path()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_coco(tmp_path_factory.mktemp("data"), 2, 1, 1)


@pytest.mark.heavy
@pytest.mark.parametrize("way", WAYS)
def test_checkpoint__pickled_code_is_not_run(good: Path, trap: Path, image: Path, data: Path, way: str) -> None:
    content = torch.load(good, weights_only=True)
    content["state_dict"]["evil"] = content["evil"] = Evil(f"touch {trap}")
    evil = good.with_name("evil.ckpt")
    torch.save(content, evil)
    with pytest.raises(REFUSED):
        ways(image, data)[way](str(evil))
    assert not trap.exists()
    torch.load(evil, weights_only=False)  # the trap works
    assert trap.exists()


STRINGS = {
    "unknown argument": {"anything": {"class_path": "trap_module.Trap", "init_args": {}}},
    "known argument": {"backbone": {"class_path": "trap_module.Trap"}},
    "known list": {"anchor_sizes": [{"class_path": "trap_module.Trap"}]},
    "class path of the module": {"_class_path": "trap_module.Trap"},
    "instantiator": {"_instantiator": "trap_module.Trap"},
    "network on a hub": {"backbone": "hf-hub:trap/module"},
    "network in a folder": {"backbone": "local-dir:/tmp"},
}


@pytest.mark.heavy
@pytest.mark.parametrize("hyper_parameters", STRINGS.values(), ids=STRINGS)
@pytest.mark.parametrize("way", ["load_module", "load_from_checkpoint", "predictor", "predict", "fit"])
def test_checkpoint__strings_import_nothing(
    good: Path, trap: Path, image: Path, data: Path, way: str, hyper_parameters: dict[str, object]
) -> None:
    content = torch.load(good, weights_only=True)
    content["hyper_parameters"] |= hyper_parameters
    content["hyper_parameters"]["_class_path"] = content["class_path"] = "trap_module.Trap"
    evil = good.with_name("evil.ckpt")
    torch.save(content, evil)
    with pytest.raises((*REFUSED, SystemExit, ValueError, TypeError)):
        ways(image, data)[way](str(evil))
    assert not trap.exists()


def test_checkpoint__names_a_module_of_ours_or_none(good: Path, trap: Path) -> None:
    content = torch.load(good, weights_only=True)
    content["lightning_convnext_det"]["module"] = "trap_module.Trap"
    torch.save(content, good)
    with pytest.raises(CheckpointError, match=r"\[LCD-K001\]"):
        read_checkpoint(good, MODULES)
    assert not trap.exists()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[str]]]:
    """An address, and the requests that came there."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    found = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}/evil.ckpt", requests
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.mark.parametrize("way", WAYS)
def test_checkpoint__an_address_is_not_asked(server: tuple[str, list[str]], image: Path, data: Path, way: str) -> None:
    address, requests = server
    with pytest.raises(REFUSED):
        ways(image, data)[way](address)
    assert requests == []


@pytest.mark.parametrize(
    "options",
    [{"weights_only": False}, {"hparams_file": "hparams.yaml"}],
    ids=lambda o: next(iter(o)),
)
def test_load_from_checkpoint__no_way_around(good: Path, options: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"\[LCD-S011\]"):
        FasterRCNNModule.load_from_checkpoint(good, **options)


def test_load_from_checkpoint__options_of_the_network(good: Path) -> None:
    module = FasterRCNNModule.load_from_checkpoint(good, map_location="cpu", score_threshold=0.5)
    assert module.detector.score_threshold == 0.5
    assert module.class_names == ["cat", "dog"]
    assert not module.training
    with pytest.raises(CheckpointError, match="holds a FasterRCNNModule"):
        package.DeformableDETRModule.load_from_checkpoint(good)


YAMLS = {
    "call": "!!python/object/apply:os.system ['touch {trap}']",
    "object": "!!python/object/new:trap_module.Trap []",
    "name": "!!python/name:trap_module.Trap",
    "module": "!!python/module:trap_module",
}


@pytest.mark.heavy
@pytest.mark.parametrize("content", YAMLS.values(), ids=YAMLS)
def test_yaml__tags_run_and_import_nothing(
    trap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    content = content.format(trap=trap)
    root = tmp_path / "set"
    root.mkdir()
    Image.new("RGB", (40, 30)).save(root / "a.png")
    (root / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    for text in (f"names: {content}\ntrain: .\n", f"names: [a]\ntrain: {content}\n", content):
        (root / "data.yaml").write_text(text)
        with pytest.raises(DataError, match=r"\[LCD-D008\] .*data.yaml"):
            check_dataset(root)
    config = tmp_path / "config.yaml"
    for text in (f"seed_everything: {content}\n", f"ckpt_path: {content}\n", content):
        config.write_text(text)
        with pytest.raises(SystemExit) as left:
            raise SystemExit(main(["fit", f"--config={config}", f"--data.root={root}"]))
        assert left.value.code == 2
        assert "Traceback" not in capsys.readouterr().err
    assert not trap.exists()


def test_yaml__aliases_that_multiply(tmp_path: Path) -> None:
    """Nine lists of nine: 3.5 billion names if they were written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("\n".join([*lines, "names: *a9", "train: ."]))
    (problem,) = check_dataset(tmp_path).problems
    assert (problem.code, problem.action) == ("LCD-D008", "refused")
    assert len(problem.reason) < 500


EXTRAS: dict[str, dict[str, object]] = {
    "classes are no table": {"class_to_idx": 3},
    "classes are not numbered": {"class_to_idx": {"cat": "one"}},
    "no mean": {"class_to_idx": {}, "rgb_stats": {}},
    "no inputs": {"class_to_idx": {}, "signature": {"inputs": []}},
    "text": {"class_to_idx": {}, "signature": "text"},
}


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_read_source__malformed_notes_beside_the_tensors(tmp_path: Path, extras: dict[str, object]) -> None:
    torch.save({"state": {"a": torch.zeros(1)}, **extras}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"\[LCD-K012\] .*a.pt: what it says beside its tensors is malformed"):
        import_weights(tmp_path / "a.pt")
