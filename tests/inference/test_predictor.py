import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_iou
from torchvision.tv_tensors import Image as ImageTensor

from lightning_convnext_det.data.io.decode import read_image
from lightning_convnext_det.errors import CheckpointError, DataError, DivergenceError
from lightning_convnext_det.inference.predictor import Predictor, _borrowed
from lightning_convnext_det.models.rcnn.faster_rcnn import FasterRCNN
from lightning_convnext_det.modules import FasterRCNNModule
from lightning_convnext_det.types import Detection

NAMES, IDS = ["cat", "dog", "emu"], [7, 2, 90]
TINY = {"backbone": "test_convnext", "min_size": 64, "max_size": 96, "fpn_channels": 32, "box_head_features": 32}


class Foretold(nn.Module):
    """Finds in each image its whole area, as class 0, 1 and 2; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.num_classes = 3
        self.seen: list[list[Tensor]] = []

    def forward(self, images: list[Tensor]) -> list[Detection]:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.seen.append(images)
        scores = torch.tensor([0.9, 0.5, 0.1])
        sizes = [(x.shape[2], x.shape[1]) for x in images]
        return [
            Detection(boxes=torch.tensor([[0.0, 0.0, *size]]).repeat(3, 1), labels=torch.arange(3), scores=scores)
            for size in sizes
        ]


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(Foretold(), NAMES, IDS)


@pytest.fixture(scope="module")
def detector() -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(3, score_threshold=0.0, detections_per_image=20, **TINY).eval()


def assert_same(one: Detection, other: Detection, tolerance: float = 1e-4) -> None:
    assert torch.equal(one["labels"], other["labels"])
    assert torch.allclose(one["boxes"], other["boxes"], atol=tolerance, rtol=0)
    assert torch.allclose(one["scores"], other["scores"], atol=1e-5, rtol=0)


# ---- what comes out


def test_predictor__one_image_gives_one_prediction(predictor: Predictor) -> None:
    found = predictor(torch.zeros(3, 40, 50))
    assert set(dict(found)) == {"boxes", "labels", "scores", "names", "category_ids"}
    assert found["boxes"].tolist() == [[0, 0, 50, 40]] * 3
    assert found["labels"].tolist() == [0, 1, 2]
    assert found["names"] == NAMES
    assert found["category_ids"].tolist() == IDS
    assert [found[k].dtype for k in ("boxes", "scores", "labels", "category_ids")] == [torch.float32] * 2 + [
        torch.int64
    ] * 2


def test_predictor__a_list_gives_a_list_in_batches(predictor: Predictor) -> None:
    predictor.batch_size = 2
    images = [torch.zeros(3, 40, 50 + i) for i in range(5)]
    assert [round(p["boxes"][0, 2].item()) for p in predictor(images)] == [50, 51, 52, 53, 54]
    assert [len(batch) for batch in predictor.detector.seen] == [2, 2, 1]
    assert predictor([]) == []
    assert len(predictor((images[0],))) == 1


def test_predictor__equals_the_detector(detector: FasterRCNN, photos: list[Tensor]) -> None:
    with torch.no_grad():
        expected = [detector([photo])[0] for photo in photos]
    found = Predictor(detector, NAMES, batch_size=1)(photos)
    for one, other in zip(found, expected, strict=True):
        assert len(one["boxes"]) == 20
        assert_same(one, other, tolerance=0)


def test_predictor__tensors_that_come_out_may_be_changed_and_learned_from(detector: FasterRCNN) -> None:
    found = Predictor(detector, NAMES)(torch.rand(3, 64, 64))
    found["boxes"][:, 0] += 1
    found["scores"].requires_grad_().sum().backward()
    assert not found["boxes"].is_inference()


def test_predictor__no_objects(detector: FasterRCNN) -> None:
    found = Predictor(detector, NAMES, score_threshold=1.0)(torch.rand(3, 64, 64))
    assert found["boxes"].shape == (0, 4)
    assert found["labels"].shape == found["scores"].shape == found["category_ids"].shape == (0,)
    assert found["names"] == []
    assert found["labels"].dtype == found["category_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        pytest.param({}, ["cat", "dog", "emu"], id="all"),
        pytest.param({"score_threshold": 0.5}, ["cat", "dog"], id="score, the threshold itself included"),
        pytest.param({"classes": ["emu", "cat"]}, ["cat", "emu"], id="classes"),
        pytest.param({"classes": ["emu"], "score_threshold": 0.5}, [], id="both"),
        pytest.param({"classes": []}, [], id="no class"),
    ],
)
def test_predictor__keeps_scores_and_classes_asked_for(arguments: dict, names: list[str]) -> None:
    assert Predictor(Foretold(), NAMES, IDS, **arguments)(torch.zeros(3, 40, 50))["names"] == names


def test_predictor__bfloat16_computes_in_it_and_returns_float32(detector: FasterRCNN, photos: list[Tensor]) -> None:
    kinds = []
    handle = detector.backbone.register_forward_hook(
        lambda module, given, out: kinds.append(next(iter(out.values())).dtype)
    )
    found = Predictor(detector, NAMES, precision="bf16-mixed")(photos[0])
    handle.remove()
    assert kinds == [torch.bfloat16]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert (found["boxes"] % 1 != 0).any()


def test_predictor__gives_modes_and_nms_back(detector: FasterRCNN) -> None:
    before = detector.nms
    detector.train()
    detector.backbone.eval()  # as frozen layers are
    modes = {name: module.training for name, module in detector.named_modules()}
    seen = []
    handle = detector.register_forward_pre_hook(lambda module, given: seen.append((module.training, module.nms)))
    predictor = Predictor(detector, NAMES, nms="soft")
    assert {name: module.training for name, module in detector.named_modules()} == modes
    predictor(torch.rand(3, 64, 64))
    handle.remove()
    assert seen == [(False, "soft")]
    assert {name: module.training for name, module in detector.named_modules()} == modes
    assert detector.nms == before
    detector.eval()


@pytest.mark.heavy
def test_predictor__threads_find_the_same(detector: FasterRCNN, photos: list[Tensor]) -> None:
    detector.train()
    predictor = Predictor(detector, NAMES, IDS, tta="scales=0.5:1.5")
    alone = [predictor(photo) for photo in photos]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(predictor, photos * 3))
    for found, expected in zip(together, alone * 3, strict=True):
        assert torch.equal(found.boxes, expected.boxes)
    assert detector.training


def test_predictor__gives_them_back_after_an_error(detector: FasterRCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(images: list[Tensor]) -> list[Detection]:
        raise RuntimeError("out of memory")

    detector.train()
    monkeypatch.setattr(detector, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        Predictor(detector, NAMES, nms="none")(torch.rand(3, 64, 64))
    assert detector.training
    assert detector.nms == "hard"
    detector.eval()


def test_predictor__moves_a_detector_for_the_call_only() -> None:
    class Far(Foretold):
        """Notes where it is moved; computes on the CPU."""

        def to(self, device: torch.device) -> "Far":
            moves.append(str(device))
            return self

    moves: list[str] = []
    detector = Far()
    Predictor(detector, NAMES)(torch.zeros(3, 40, 50))
    assert moves == []
    with _borrowed(detector, torch.device("meta"), None):
        assert moves == ["meta"]
    assert moves == ["meta", "cpu"]


# ---- what goes in


def test_predictor__kinds_of_one_photo_give_the_same(detector: FasterRCNN, shared_data: Path) -> None:
    path = sorted((shared_data / "coco_mini" / "val2017").glob("*.jpg"))[0]
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    array, tensor = np.array(rgb), read_image(path)
    kinds = {
        "str": str(path),
        "Path": path,
        "PIL": rgb,
        "array": array,
        "array that runs backwards": np.ascontiguousarray(array[..., ::-1])[..., ::-1],
        "array that cannot be written to": np.asarray(rgb),
        "array in columns": np.asfortranarray(array),
        "floats": (array / 255).astype(np.float32),
        "doubles": array / 255,
        "big-endian floats": (array / 255).astype(">f4"),
        "tensor": tensor,
        "float tensor": tensor.float() / 255,
        "double tensor": tensor.double() / 255,
        "tensor that is a view": torch.from_numpy(array).permute(2, 0, 1),
        "tensor with gradient": (tensor.float() / 255).requires_grad_(),
        "torchvision's": ImageTensor(tensor),
    }
    predictor = Predictor(detector, NAMES, batch_size=1)
    expected = predictor(tensor)
    assert len(expected["boxes"]) == 20
    for found in predictor(list(kinds.values())):
        assert_same(found, expected)


def test_predictor__half_precision_pixels(predictor: Predictor) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        predictor(torch.rand(3, 40, 50).to(dtype))
        assert predictor.detector.seen[-1][0].dtype == torch.float32
    predictor(np.zeros((40, 50, 3), np.float16))


def test_predictor__boxes_are_those_of_the_upright_image(predictor: Predictor, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 40)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        for given in (tmp_path / "a.jpg", image):
            assert predictor(given)["boxes"][0].tolist() == [0, 0, 40, 50]
            assert predictor.draw(given).size[0] < predictor.draw(given).size[1]


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
@pytest.mark.filterwarnings("ignore:.*LCD-I010")
def test_predictor__images_of_any_mode(mode: str, predictor: Predictor) -> None:
    assert len(predictor(Image.new(mode, (50, 40)))["boxes"]) == 3


def test_predictor__leaves_what_it_is_given_alone(predictor: Predictor) -> None:
    array, tensor = np.full((40, 50, 3), 7, np.uint8), torch.full((3, 40, 50), 0.5)
    predictor([array, tensor])
    for image in predictor.detector.seen[0]:
        assert image.shape == (3, 40, 50)
    assert (array == 7).all()
    assert (tensor == 0.5).all()


GREY, ALPHA, LIST = "repeat the grey channel three times", "drop the alpha channel", r"as a list: list\(x\)"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param(np.zeros((40, 50), np.uint8), rf"\[LCD-I032\] .* \[40, 50\].*{GREY}", id="grey array"),
        pytest.param(np.zeros((40, 50, 1), np.uint8), GREY, id="array of one channel"),
        pytest.param(np.zeros((40, 50, 4), np.uint8), rf"{ALPHA}: x\[..., :3\]", id="RGBA array"),
        pytest.param(np.zeros((3, 40, 50), np.uint8), r"channels come last: x.transpose\(1, 2, 0\)", id="array turned"),
        pytest.param(np.zeros((2, 40, 50, 3), np.uint8), LIST, id="arrays in a batch"),
        pytest.param(np.zeros((40, 50, 2), np.uint8), r"expected \[height, width, 3\]", id="two channels"),
        pytest.param(np.zeros((), np.uint8), r"shape \[\]", id="a number"),
        pytest.param(torch.zeros(40, 50), GREY, id="grey tensor"),
        pytest.param(torch.zeros(1, 40, 50), GREY, id="tensor of one channel"),
        pytest.param(torch.zeros(4, 40, 50), rf"{ALPHA}: x\[:3\]", id="RGBA tensor"),
        pytest.param(torch.zeros(40, 50, 3), r"channels come first: x.permute\(2, 0, 1\)", id="tensor turned"),
        pytest.param(torch.zeros(2, 3, 40, 50), LIST, id="tensors in a batch"),
        pytest.param(np.full((40, 50, 3), 200.0), r"\[LCD-I030\] .* 200 to 200; give uint8, or floats", id="0..255"),
        pytest.param(torch.full((3, 40, 50), 200.0), r"\[LCD-I030\]", id="0..255 tensor"),
        pytest.param(torch.full((3, 40, 50), -2.1), "not normalised", id="normalised tensor"),
        pytest.param(torch.full((3, 40, 50), torch.nan), r"\[LCD-I031\] .* not finite", id="nan"),
        pytest.param(np.full((40, 50, 3), np.inf), r"\[LCD-I031\]", id="inf"),
        pytest.param(np.zeros((40, 50, 3), np.int64), r"\[LCD-I032\] the image holds int64 pixels", id="int64"),
        pytest.param(np.zeros((40, 50, 3), np.uint16), "holds uint16 pixels", id="uint16"),
        pytest.param(np.zeros((40, 50, 3), bool), "holds bool pixels", id="bool"),
        pytest.param(np.zeros((40, 50, 3), object), "holds object pixels", id="objects"),
        pytest.param(torch.zeros(3, 40, 50, dtype=torch.int32), "holds torch.int32 pixels", id="int32 tensor"),
        pytest.param(torch.zeros(3, 0, 50), r"\[LCD-I022\] .* 50x0; each side", id="no pixels"),
        pytest.param(np.zeros((0, 0, 3)), r"\[LCD-I022\]", id="no pixels in an array"),
        pytest.param(torch.zeros(3, 1, 50), r"\[LCD-I022\]", id="one line"),
        pytest.param(Image.new("RGB", (1000, 4)), r"\[LCD-I021\] .* 1000x4; one side is over 200 x", id="strip"),
        pytest.param(Image.new("F", (50, 40)), r"\[LCD-I011\] the image: the pixels are floats", id="PIL of floats"),
    ],
)
def test_predictor__what_is_no_rgb_image_is_refused(image: object, message: str, predictor: Predictor) -> None:
    with pytest.raises(DataError, match=message):
        predictor(image)
    with pytest.raises(DataError, match=r"images\[1\]"):
        predictor([torch.zeros(3, 40, 50), image])
    assert predictor.detector.seen == []


def test_predictor__overshoot_of_interpolation_is_not_refused(predictor: Predictor) -> None:
    edge = torch.zeros(3, 20, 20)
    edge[:, :, 10:] = 1
    larger = nn.functional.interpolate(edge[None], scale_factor=2, mode="bicubic")[0]
    assert larger.max() > 1
    assert larger.min() < 0
    predictor(larger)


@pytest.mark.parametrize("image", [None, b"bytes", 3, {"a": 1}, io.BytesIO(), iter([]), [["a.jpg"]]])
def test_predictor__what_is_no_image_at_all_is_refused(image: object, predictor: Predictor) -> None:
    with pytest.raises(TypeError, match=r"(the image|images\[0\]) is of type \w+; give a path, a Pillow image"):
        predictor(image)


def test_predictor__files_that_cannot_be_read_are_named(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>")
    for name, code in (("gone.jpg", "LCD-I003"), ("page.jpg", "LCD-I001")):
        with pytest.raises(DataError, match=rf"\[{code}\] .*{name}"):
            predictor([torch.zeros(3, 40, 50), str(tmp_path / name)])


# ---- its making


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"class_names": ["cat"]}, "class_names has 1 entries, but the detector has 3 classes", id="names"),
        pytest.param({"category_ids": [1]}, "category_ids has 1 entries, but class_names has 3", id="ids"),
        pytest.param({"score_threshold": 50}, "a number at least 0 and at most 1", id="percent"),
        pytest.param({"batch_size": 0}, "batch_size is 0", id="batch size"),
        pytest.param({"precision": "bf16"}, "precision is 'bf16'; choose 32-true or bf16-mixed", id="precision"),
        pytest.param({"classes": ["dgo"]}, "no class 'dgo'; did you mean 'dog'", id="class"),
        pytest.param({"classes": "dgo"}, "no class 'dgo'; did you mean 'dog'", id="one class"),
        pytest.param({"value_range": (5, 5)}, r"value_range is \[5, 5\]; give the lower", id="value range"),
        pytest.param({"nms": "sfot"}, "nms is 'sfot'; choose hard, soft or none", id="nms"),
        pytest.param({"device": "gpu"}, "device 'gpu' cannot be used .*'auto' takes what there is", id="device"),
    ],
)
def test_predictor__wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(Foretold(), **{"class_names": NAMES, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_predictor__missing_device_is_named() -> None:
    with pytest.raises(ValueError, match="device 'cuda' cannot be used"):
        Predictor(Foretold(), NAMES, device="cuda")


def test_predictor__weights_that_are_not_finite_are_refused() -> None:
    detector = Foretold()
    detector.weight.data[1] = torch.nan
    with pytest.raises(DivergenceError, match=r"\[LCD-N002\] weight 'weight' is not finite"):
        Predictor(detector, NAMES)


def test_predictor__ids_are_labels_where_none_are_given() -> None:
    assert Predictor(Foretold(), NAMES)(torch.zeros(3, 40, 50))["category_ids"].tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    module = FasterRCNNModule(3, NAMES, IDS, score_threshold=0.0, **TINY)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=0)
    trainer.strategy.connect(module)
    path = tmp_path_factory.mktemp("checkpoint") / "best.ckpt"
    trainer.save_checkpoint(path)
    return path


def test_from_checkpoint__finds_what_the_module_finds(checkpoint: Path) -> None:
    torch.manual_seed(0)
    module = FasterRCNNModule(3, NAMES, IDS, score_threshold=0.0, **TINY).eval()
    image = torch.rand(3, 64, 64)
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu")
    found = predictor(image)
    with torch.no_grad():
        assert_same(found, module([image])[0], tolerance=0)
    assert len(found["boxes"]) > 0
    assert found["names"] == [NAMES[label] for label in found["labels"]]
    assert found["category_ids"].tolist() == [IDS[label] for label in found["labels"]]


def test_from_checkpoint__passes_options_on(checkpoint: Path) -> None:
    predictor = Predictor.from_checkpoint(
        str(checkpoint), score_threshold=0.4, classes=["dog"], batch_size=3, precision="bf16-mixed"
    )
    found = predictor(torch.rand(3, 64, 64))
    assert set(found["names"]) <= {"dog"}
    assert (found["scores"] >= 0.4).all()
    assert (predictor.batch_size, predictor.precision) == (3, "bf16-mixed")


def test_from_checkpoint__nms_is_the_checkpoints_unless_chosen(checkpoint: Path) -> None:
    image = torch.rand(3, 64, 64)
    hard, chosen, none = (
        Predictor.from_checkpoint(checkpoint, device="cpu", nms=nms) for nms in (None, "hard", "none")
    )
    assert_same(hard(image), chosen(image), tolerance=0)
    assert none.nms == "none"
    assert box_iou(none(image)["boxes"], none(image)["boxes"]).fill_diagonal_(0).max() > 0.5


def test_from_checkpoint__missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\[LCD-K001\] .*none.ckpt: no such checkpoint file"):
        Predictor.from_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="there is no path"):
        Predictor.from_checkpoint([])


# ---- drawing


def test_predictor__predictions_are_drawn_on_images_as_the_detector_reads_them(tmp_path: Path) -> None:
    detector = FasterRCNN(1, "test_convnext", min_size=64, max_size=96, in_chans=1, score_threshold=1.0)
    grey = np.random.default_rng(0).integers(0, 1000, (64, 80)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "16.png")
    predictor = Predictor(detector, ["cat"], value_range=(0, 1000))
    for image in (torch.zeros(1, 64, 80, dtype=torch.uint8), np.zeros((64, 80, 1), np.uint8), tmp_path / "16.png"):
        drawn = predictor(image).plot()
        assert drawn.mode == "RGB"
        assert drawn.tobytes() == predictor.draw(image).tobytes()
    assert np.asarray(drawn).mean() == pytest.approx(127, abs=5)  # of values of 0 ... 1000, not of 65535


def test_draw__finds_or_takes_what_was_found(predictor: Predictor) -> None:
    image = Image.new("RGB", (300, 260), (128, 128, 128))
    drawn = predictor.draw(image)
    assert np.array_equal(drawn, predictor.draw(image, predictor(image)))
    assert drawn.size == image.size


@pytest.mark.parametrize(
    ("own", "asked", "drawn"),
    [(None, None, 2), (None, 0.0, 3), (None, 0.6, 1), (0.05, None, 3), (0.6, None, 1), (0.05, 0.6, 1), (0.0, None, 3)],
)
def test_draw__leaves_out_low_scores(
    predictor: Predictor, own: float | None, asked: float | None, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Foretold finds scores of 0.9, 0.5 and 0.1; results hold them all
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        "lightning_convnext_det.inference.prediction.draw_detections",
        lambda _, boxes, names, scores, *__: seen.append((len(boxes), len(names), len(scores))),
    )
    image = Image.new("RGB", (300, 260))
    found = predictor(image)
    assert len(found["scores"]) == 3
    predictor.score_threshold = own
    predictor.draw(image, score_threshold=asked)
    predictor.draw(image, found, score_threshold=asked)
    assert seen == [(drawn,) * 3] * 2


def test_draw__classes_have_colours_of_their_own() -> None:
    image, frames = Image.new("RGB", (300, 260), (128, 128, 128)), set()
    for name in NAMES:
        drawn = Predictor(Foretold(), NAMES, classes=[name]).draw(image, score_threshold=0)
        frames.add(drawn.getpixel((0, 130)))
    assert len(frames) == 3
    assert (128, 128, 128) not in frames
