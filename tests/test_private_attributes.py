"""Every private attribute of another package that src/ uses is listed here, and there in the installed release.

Upstream changes such names without notice: this test says which one is gone, and where it is used, before a training
does. Upper bounds in pyproject.toml keep out the releases that nobody has run it on.
"""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.distributed_c10d
import torchvision.models.detection
from fsspec import AbstractFileSystem
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torchvision.transforms import v2

import lightning_convnext_det

SOURCE = Path(lightning_convnext_det.__file__).parent
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # documented; the underscore keeps them apart from fields


class Private(NamedTuple):
    file: str
    owner: Callable[[], object]
    name: str


@cache
def _trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def _schedule() -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), lambda _: 1.0)


PRIVATE = [
    *(
        Private("callbacks/best_checkpoint.py", ModelCheckpoint, name)
        for name in (
            "_every_n_epochs",
            "_monitor_candidates",
            "_save_last_checkpoint",
            "_should_save_on_train_epoch_end",
            "_should_skip_saving_checkpoint",
        )
    ),
    Private("callbacks/exact_resume.py", lambda: _trainer().fit_loop, "_load_combined_loader_states"),
    Private("callbacks/exact_resume.py", _schedule, "_last_lr"),
    Private("callbacks/progress_bar.py", RichProgressBar, "_get_train_description"),
    Private("inference/export/export.py", lambda: torch.compile(torch.nn.Linear(1, 1)), "_orig_mod"),
    Private("callbacks/run_guard.py", lambda: torch.distributed.distributed_c10d, "_get_default_store"),
    Private("callbacks/progress_bar.py", RichProgressBar, "_get_train_description"),
    Private("callbacks/run_guard.py", lambda: _trainer().fit_loop, "_data_fetcher"),
    Private("callbacks/progress_bar.py", RichProgressBar, "_get_train_description"),
    Private("callbacks/run_guard.py", lambda: _trainer().fit_loop.epoch_loop, "_should_check_val_fx"),
    Private("callbacks/slurm.py", _trainer, "_accelerator_connector"),
    *(Private("callbacks/weight_averaging.py", lambda: torch, name) for name in ("_foreach_copy_", "_foreach_lerp_")),
    Private("checkpoints/remote.py", lambda: AbstractFileSystem, "_parent"),
    Private("cli/arguments.py", LightningArgumentParser, "_actions"),
    Private("cli/trainer.py", lambda: LightningCLI, "_instantiate_trainer"),
    Private("cli/trainer.py", lambda: LightningCLI, "_parse_ckpt_path"),
    Private("cli/trainer.py", lambda: LightningCLI, "_prepare_subcommand_kwargs"),
    Private("cli/trainer.py", lambda: torch.cpu, "_is_avx512_bf16_supported"),
    Private("data/transforms.py", lambda: v2.Transform, "_call_kernel"),
    Private("inference/export/export.py", lambda: torch.compile(torch.nn.Identity()), "_orig_mod"),
    Private("inference/export/graph.py", lambda: torch, "_check"),
    Private("inference/export/graph.py", lambda: torch, "_dynamo"),
    Private("inference/export/runtimes.py", lambda: torch, "_inductor"),
    Private("inference/export/torch_file.py", lambda: torch, "_inductor"),
    Private("models/rcnn/box_coder.py", lambda: torchvision.models.detection, "_utils"),
    Private("models/rcnn/box_losses.py", lambda: torchvision.models.detection, "_utils"),
    Private("models/rcnn/matcher.py", lambda: torchvision.models.detection, "_utils"),
    Private("ops/dropout.py", lambda: torch, "_C"),
    Private("ops/dropout.py", lambda: torch._C, "_are_functorch_transforms_active"),
    Private("ops/token_blocks.py", lambda: torch, "_C"),
    Private("ops/token_blocks.py", lambda: torch._C, "_are_functorch_transforms_active"),
    Private("ops/token_blocks.py", lambda: torch.nn.Identity(), "_forward_hooks"),
    Private("ops/token_blocks.py", lambda: torch.nn.Identity(), "_forward_pre_hooks"),
    Private("planning/machine.py", lambda: torch.cpu, "_is_avx512_bf16_supported"),
    Private("planning/memory.py", lambda: torch.zeros(1).untyped_storage(), "_cdata"),
]


@pytest.mark.parametrize("private", PRIVATE, ids=lambda p: f"{p.file}-{p.name}")
def test_private_attribute__is_in_this_release(private: Private) -> None:
    owner = private.owner()
    assert hasattr(owner, private.name), f"{owner} has lost {private.name}, which {private.file} uses"


def test_private_attributes__all_are_listed() -> None:
    listed = {(p.file, p.name) for p in PRIVATE}
    found = {(str(p.relative_to(SOURCE)), name) for p in SOURCE.rglob("*.py") for name in private_uses(p.read_text())}
    found |= set(overridden())
    assert found - listed == set(), "new uses of private attributes: find a public way, or list them above"
    assert listed - found == set(), "no longer used: remove them above"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("trainer._loop", {"_loop"}),
        ("trainer._loop = 1", {"_loop"}),
        ("torch._C._is_tracing()", {"_C", "_is_tracing"}),
        ("super()._step()", {"_step"}),
        ("self._step()", {"_step"}),
        ("def _step(self): self._step()", set()),
        ("self._step = 1; self._step", set()),
        ("self.__dict__, row._replace(a=1)", set()),
        ("from torch.x import _store as store", {"_store"}),
        ("from torch._x import store", {"_x"}),
        ("import torch._x.y", {"_x"}),
        ("from lightning_convnext_det.x import _own", set()),
        ("getattr(trainer, '_loop', None)", {"_loop"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_private_uses__by_form(code: str, names: set[str]) -> None:
    assert private_uses(code) == names


def private_uses(code: str) -> set[str]:
    """Names with one leading underscore that a file takes from other packages' modules, classes and objects."""
    nodes = list(ast.walk(ast.parse(code)))
    own: set[str] = set()
    for node in nodes:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                own.add(name)
            case ast.Assign(targets=targets):
                own |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                own.add(name)
    used: set[str] = set()
    for node in nodes:
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                used |= {name} - own
            case ast.Attribute(attr=name):
                used.add(name)
            case ast.ImportFrom(module=module, names=names) if not _is_own(module):
                used |= {*str(module).split("."), *(alias.name for alias in names)}
            case ast.Import(names=names):
                used |= {part for alias in names for part in alias.name.split(".") if not _is_own(alias.name)}
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                used.add(name)
    return {name for name in used if name.startswith("_") and not name.startswith("__")} - NAMED_TUPLE


def _is_own(module: str | None) -> bool:
    return module is None or module.split(".")[0] == "lightning_convnext_det"


def overridden() -> Iterator[tuple[str, str]]:
    """Private methods of other packages' classes that classes of ours replace, knowingly or not."""
    for info in pkgutil.walk_packages(lightning_convnext_det.__path__, "lightning_convnext_det."):
        if info.name.endswith(("__main__", "_triton")):
            continue
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if not inspect.isclass(value) or value.__module__ != info.name:
                continue
            bases = [base for base in value.__mro__[1:] if not _is_own(base.__module__)]
            for name, member in vars(value).items():
                private = name.startswith("_") and not name.startswith("__") and inspect.isfunction(member)
                if private and any(name in vars(base) for base in bases):
                    yield str(Path(inspect.getfile(module)).relative_to(SOURCE)), name
