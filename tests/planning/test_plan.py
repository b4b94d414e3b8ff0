"""Plans of made datasets and machines: the decisions that an experienced trainer would check."""

import inspect
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer
from rich.console import Console

from lightning_convnext_det import DeformableDETR, DetectionDataModule, DetectionModule, FasterRCNN
from lightning_convnext_det.planning.draft import Plan, show
from lightning_convnext_det.planning.machine import Machine
from lightning_convnext_det.planning.plan import plan
from lightning_convnext_det.planning.precision import Rates
from tests.planning.sets import SETS, make_fingerprint

LAPTOP = Machine(cores=8, memory=16 * 2**30)
GPU = Machine(cores=16, memory=24 * 2**30, accelerator="cuda", bfloat16=True, rates=Rates(100.0, 210.0))
EIGHT = Machine(cores=64, memory=80 * 2**30, accelerator="cuda", devices=8, bfloat16=True)


def make(name: str, machine: Machine = GPU, given: dict[str, Any] | None = None, validate: int = 50) -> Plan:
    return plan(SETS[name], machine, given, images_to_validate=validate)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("machine", [LAPTOP, GPU, EIGHT], ids=["cpu", "gpu", "eight"])
def test_plan__has_values_and_reasons_for_every_set(name: str, machine: Machine) -> None:
    made = make(name, machine)
    assert all(setting.reason for setting in made.settings)
    assert 32 <= made["model.min_size"] <= made["model.max_size"]
    assert 1e-5 < made["model.lr"] <= 2e-3
    assert made["trainer.max_steps"] >= 3000
    assert made.refusal is None
    same = {s.name for s in made.settings if s.name.startswith("model.anchor")}
    assert same == (set() if name == "no objects" else {"model.anchor_sizes"})


def test_plan__is_the_same_each_time() -> None:
    assert make("one class").settings == make("one class").settings


def test_plan__tiny_objects_are_enlarged_as_far_as_it_goes_and_tiles_are_named() -> None:
    made = make("tiny objects")
    assert made["model.min_size"] == 1336  # of 2000: the pixels of the largest image that a step takes
    assert made["model.anchor_sizes"][0][0] < 10
    assert any("tiles" in warning for warning in made.warnings)


def test_plan__one_huge_object_needs_no_large_images() -> None:
    made = make("one huge object")
    assert made["model.min_size"] == 480
    assert made["model.anchor_sizes"][-1][0] >= 200
    assert make("one huge object", LAPTOP)["model.min_size"] == 240


def test_plan__400_objects_raise_all_limits() -> None:
    made = make("400 objects")
    assert made["model.detections_per_image"] == made["model.max_detections"] == 500
    assert "model.rpn_post_nms_top_n" not in made  # 1000 of the default are two for each detection
    assert made["model.box_batch_size_per_image"] == 1024


def test_plan__extreme_aspect_ratios_get_their_anchors() -> None:
    ratios = make("extreme aspect ratios")["model.aspect_ratios"]
    assert min(ratios) < 0.25
    assert max(ratios) > 4
    assert len(ratios) == 5


def test_plan__two_images_still_get_steps_and_small_batches() -> None:
    made = make("two images", validate=1)
    assert made["data.batch_size"] == 2
    assert made["trainer.max_steps"] >= 3000
    assert made["trainer.check_val_every_n_epoch"] >= 100


def test_plan__portrait_and_landscape_have_one_shorter_side() -> None:
    made = make("portrait and landscape")
    assert made["model.max_size"] == 8 * -(-made["model.min_size"] * 4 // (3 * 8))


def test_plan__many_images_get_large_batches_and_random_sizes() -> None:
    made = make("COCO's size", EIGHT)
    assert (made["data.batch_size"], made["data.train_transforms"]) == (2, "multiscale")
    assert made["model.lr"] == 2e-4  # ConvNeXt's authors, for 16 images
    assert made["data.sizes"][-1] == made["model.min_size"]


GIVEN = [
    ({"model.lr": 0.5}, {"model.lr": 0.5}),
    # twice the batch, root of two times the rate
    ({"data.batch_size": 8}, {"data.batch_size": 8, "model.lr": 1.4e-4}),
    ({"data.batch_size": 1}, {"data.batch_size": 1, "model.lr": 5e-5}),
    ({"start_from": "a.ckpt", "model.pretrained_backbone": False}, {"model.lr": 1e-4}),
    ({"model.pretrained_backbone": False}, {"model.lr": 1.4e-3, "trainer.max_steps": 18000}),
    ({"model.min_size": 320}, {"model.max_size": 432}),
    ({"model.min_size": [320, 640]}, {"model.max_size": 856}),
    ({"trainer.max_epochs": 7}, {"trainer.max_epochs": 7}),
    ({"trainer.max_steps": 70}, {"trainer.max_steps": 70, "trainer.max_epochs": -1}),
    ({"time": 1800.0}, {"trainer.max_epochs": -1}),
    ({"trainer.precision": "32-true"}, {"trainer.precision": "32-true"}),
    ({"model.detections_per_image": 300}, {"model.max_detections": 300}),
    ({"model.backbone_weights": "a.pth"}, {"model.pretrained_backbone": False, "model.lr": 1e-4}),
    ({"model.aspect_ratios": [1.0]}, {"model.aspect_ratios": [1.0]}),
]


@pytest.mark.parametrize(("given", "expected"), GIVEN, ids=[str(row[0]) for row in GIVEN])
def test_plan__what_is_given_wins_and_the_rest_adapts(given: dict[str, Any], expected: dict[str, Any]) -> None:
    made = make("one class", given=given)
    assert {name: made[name] for name in expected} == expected
    for group in ("model", "data", "trainer"):
        assert not {f"{group}.{name}" for name in made.chosen(group)} & set(given)


BY_GIVEN = [
    ("tiny objects", {"model.max_size": 640}, {"model.min_size": 640}),
    ("COCO's size", {"model.max_size": 400}, {"model.min_size": 264}),  # 400 / 1.5
    # what a random transform makes of an image must fit the detector's own size
    ("one class", {"data.train_transforms": "multiscale", "model.min_size": 400}, {"data.max_size": 536}),
    ("one class", {"data.train_transforms": "lsj", "model.min_size": 400}, {"data.crop_size": 536}),
    # 450 steps, a twentieth of all, from one validation to the next; 6000 images in batches of 16 are 375 batches
    ("COCO's size", {"trainer.limit_train_batches": 10}, {"trainer.check_val_every_n_epoch": 45}),
    ("COCO's size", {"trainer.limit_train_batches": 0.1}, {"trainer.check_val_every_n_epoch": 13}),
    ("COCO's size", {"trainer.overfit_batches": 2}, {"trainer.check_val_every_n_epoch": 225}),
    ("COCO's size", {"trainer.max_steps": 100}, {"trainer.val_check_interval": 13}),
    # which Lightning counts in batches, of which a step takes four
    ("COCO's size", {"trainer.max_steps": 100, "data.batch_size": 4, "trainer.accumulate_grad_batches": 4},
     {"trainer.val_check_interval": 52}),
    ("one class", {"time": 60.0, "trainer.max_steps": 50}, {"trainer.max_steps": 50}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "expected"), BY_GIVEN, ids=[str(row[1]) for row in BY_GIVEN])
def test_plan__of_a_set_adapts_to_what_is_given(name: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    made = make(name, given=given)
    assert {setting: made[setting] for setting in expected} == expected


def test_plan__of_windows_is_for_their_pixels() -> None:
    """A window of 640 pixels is resized as a whole image is: its objects grow where those of the image would shrink."""
    given = {"data.train_transforms": "tiles", "tiles": 640}
    made = make("tiny objects", given=given)
    assert made["model.min_size"] == made["model.max_size"] == 960  # 1.5 times the window
    assert 9 <= made["model.anchor_sizes"][0][0] <= 13  # of objects of 8 pixels
    assert not made.warnings
    by_crop = make("tiny objects", given={"data.train_transforms": "tiles", "data.crop_size": 640})
    assert by_crop["model.min_size"] == 960


def test_plan__long_strips_keep_their_pixels() -> None:
    strip = make_fingerprint([(2000, 100)], 3, (20, 60))
    made = plan(strip, GPU)
    assert made["model.min_size"] == 152  # 1.5 times their own
    assert made["model.max_size"] >= 20 * 150
    on_cpu = plan(strip, LAPTOP)
    assert on_cpu["model.min_size"] * on_cpu["model.max_size"] <= 1.1 * 480 * 640


def test_plan__small_boxes_are_those_of_their_own_image() -> None:
    """Objects of a twentieth of the image in images of 4000 and of 400 pixels: large and small ones are alike."""
    large, small = (make_fingerprint([(side, side)] * 60, 5, (side / 20, side / 20), (1, 1)) for side in (4000, 400))
    boxes = np.concatenate([large.boxes, small.boxes])
    both = replace(large, boxes=boxes, images=120, box_side=small.box_side, objects=600)
    assert plan(both, GPU)["model.min_size"] == plan(large, GPU)["model.min_size"] == 480


def test_plan__queries_are_twice_the_objects_of_the_fullest_image() -> None:
    crowded = plan(SETS["400 objects"], GPU, kind="detr")
    assert (crowded["model.num_queries"], crowded["model.detections_per_image"]) == (800, 500)
    dino = plan(SETS["400 objects"], GPU, kind="dino")
    assert "model.num_queries" not in dino  # 900 of its own
    assert "model.detections_per_image" not in plan(SETS["one class"], GPU, kind="dino")  # 300 of its own
    few = plan(SETS["400 objects"], GPU, {"model.num_queries": 100}, kind="dino")
    assert any("more than the 100 queries" in warning for warning in few.warnings)


def test_plan__workers_are_those_of_a_node() -> None:
    machine = Machine(cores=64, memory=80 * 2**30, accelerator="cuda", devices=32, bfloat16=True, nodes=4)
    assert make("COCO's size", machine)["data.num_workers"] == 4  # of 8 cores for each device, twice the batch at most


def test_plan__says_where_not_even_one_image_fits() -> None:
    made = make("one class", Machine(8, 2**28, "cuda", bfloat16=True))
    assert made["data.batch_size"] == 1
    assert any("takes more than the 0.2 GiB of memory" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    "given", [{"model.anchor_sizes": [[8], [16]]}, {"model.anchor_sizes": []}, {"model.aspect_ratios": []}]
)
def test_plan__leaves_anchors_that_cannot_be_to_the_detector(given: dict[str, Any]) -> None:
    assert not set(make("one class", given=given).chosen("model")) & {"anchor_sizes", "aspect_ratios"}


def test_plan__a_time_leaves_the_steps_open() -> None:
    assert "trainer.max_steps" not in make("one class", given={"time": 60.0})


@pytest.mark.parametrize(
    ("machine", "precision"),
    [
        (Machine(2, 2**34), "32-true"),
        (Machine(2, 2**34, bfloat16=True, rates=Rates(157.0, 84.0)), "32-true"),
        (Machine(2, 2**34, bfloat16=True, rates=Rates(100.0, 200.0)), "bf16-mixed"),
        (Machine(2, 2**34, devices=2, bfloat16=True), "32-true"),
        (EIGHT, "bf16-mixed"),
    ],
    ids=["none", "slower", "faster", "two ranks on a CPU", "eight GPUs"],
)
def test_plan__precision_is_the_faster_one(machine: Machine, precision: str) -> None:
    assert make("one class", machine)["trainer.precision"] == precision


def test_plan__weights_that_cannot_be_had_are_refused_with_the_remedy() -> None:
    made = plan(SETS["one class"], GPU, missing_weights=lambda name: "no answer")
    assert made.refusal is not None
    assert "add --model.pretrained_backbone false" in made.refusal
    given = {"model.pretrained_backbone": False}
    assert plan(SETS["one class"], GPU, given, missing_weights=lambda name: "no answer").refusal is None


def test_plan__licences_that_forbid_commercial_use_are_named() -> None:
    made = make("one class", given={"model.backbone": "convnextv2_tiny.fcmae_ft_in22k_in1k"})
    assert "cc-by-nc-4.0" in made.warnings[0]
    assert not make("one class").warnings


def test_plan__of_a_detector_with_queries_has_no_anchors() -> None:
    made = plan(SETS["one class"], GPU, kind="detr")
    assert not [setting.name for setting in made.settings if "anchor" in setting.name or "rpn" in setting.name]
    on_cpu = plan(SETS["one class"], LAPTOP, kind="detr")
    known = set(inspect.signature(DeformableDETR).parameters) | set(inspect.signature(DetectionModule).parameters)
    assert set(on_cpu.chosen("model")) <= known


@pytest.mark.parametrize("machine", [LAPTOP, GPU])
def test_plan__sets_only_what_there_is(machine: Machine) -> None:
    modules = set(inspect.signature(FasterRCNN).parameters) | set(inspect.signature(DetectionModule).parameters)
    for name in SETS:
        made = make(name, machine)
        assert set(made.chosen("model")) <= modules
        assert set(made.chosen("data")) <= set(inspect.signature(DetectionDataModule).parameters)
        assert set(made.chosen("trainer")) <= set(inspect.signature(Trainer).parameters)


def test_plan__print_shows_settings_and_reasons() -> None:
    file = StringIO()
    make("one class", given={"model.lr": 0.5}).print(Console(file=file, width=160))
    text = file.getvalue()
    assert "model.min_size" in text
    assert "given" in text


def test_show__is_as_on_the_command_line() -> None:
    assert show([[8], [16]]) == "[[8],[16]]"
    assert (show(None), show(True), show(1e-4), show("flip")) == ("null", "true", "0.0001", "flip")
