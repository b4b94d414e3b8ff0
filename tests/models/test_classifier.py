import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from lightning_convnext_det import classify, create_classifier, create_detector, extract_features, list_classifiers
from lightning_convnext_det.errors import WeightsError
from lightning_convnext_det.models.backbone import backbone_state_dict
from lightning_convnext_det.models.classifier import Classifier


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 140, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((300, 260))


def timm_input(net: torch.nn.Module, image: Image.Image) -> Tensor:
    config = resolve_data_config({}, model=net, use_test_size=True)
    return create_transform(**config)(image)[None]


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "resnet18"])
def test_classify_and_extract_features__equal_timm(name: str, image: Image.Image) -> None:
    model = create_classifier(name)
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    plain.load_state_dict(model.net.state_dict())
    pyramid = timm.create_model(name, features_only=True).eval()
    own = {key.replace(".", "_"): value for key, value in plain.state_dict().items()}
    pyramid.load_state_dict({key: own[key.replace(".", "_")] for key in pyramid.state_dict()})
    batch = timm_input(plain, image)
    with torch.no_grad():
        scores = plain(batch).softmax(-1)[0]
        maps, pooled = pyramid(batch), plain.forward_head(plain.forward_features(batch), pre_logits=True)[0]
    found = classify(model, image, top=3)
    assert [f.label for f in found] == scores.topk(3).indices.tolist()
    assert [f.score for f in found] == pytest.approx(scores.topk(3).values.tolist(), abs=1e-6)
    features = extract_features(model, image)
    assert features.pooled.shape == (plain.num_features,)
    torch.testing.assert_close(features.pooled, pooled, atol=1e-6, rtol=1e-5)
    for own_map, its_map in zip(features.maps[-4:], maps[-4:], strict=True):
        torch.testing.assert_close(own_map, its_map[0], atol=1e-6, rtol=1e-5)


def test_classify__names_files_and_tensors(image: Image.Image, tmp_path: Path) -> None:
    assert create_classifier("test_convnext").class_names[:2] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    model = create_classifier("test_convnext", num_classes=3, class_names=["cat", "dog", "owl"])
    image.save(tmp_path / "a.png")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    found = [classify(model, x)[0] for x in (image, str(tmp_path / "a.png"), pixels, pixels.double() / 255)]
    assert len(set(found)) == 1
    assert found[0].name == ["cat", "dog", "owl"][found[0].label]
    assert len(classify(model, image, top=9)) == 3
    with pytest.raises(ValueError, match="2 class_names, but 'test_convnext' has 3 classes"):
        create_classifier("test_convnext", num_classes=3, class_names=["cat", "dog"])
    with pytest.raises(ValueError, match="did you mean 'convnext_tiny'"):
        create_classifier("convnext_tinny")


def test_classify__files_are_turned_upright(image: Image.Image, tmp_path: Path) -> None:
    model = create_classifier("convnext_atto", num_classes=5).eval()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    upright = classify(model, image.transpose(Image.Transpose.ROTATE_270))
    assert classify(model, tmp_path / "a.png") == upright
    assert classify(model, image) != upright


def test_list_classifiers__names_and_tags() -> None:
    assert {"convnext_tiny", "convnext_xlarge"} <= set(list_classifiers("convnext_*"))
    assert "convnext_tiny.in12k_ft_in1k" in list_classifiers("convnext_tiny*", pretrained=True)


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["safetensors", "state dict", "timm checkpoint", "ema checkpoint"])
def test_backbone_weights__from_a_classifier_in_any_file(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = timm.create_model("test_convnext", num_classes=7)
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    state = net.state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        other = {key: value + 1 for key, value in state.items()}
        content = {"state dict": state, "timm checkpoint": {"state_dict": state, "epoch": 3}}
        content["ema checkpoint"] = {"state_dict": other, "state_dict_ema": state}
        torch.save(content[form], path)
    caplog.set_level("INFO")
    detector = create_detector(
        "fasterrcnn_fpn", num_classes=2, backbone="test_convnext", backbone_weights=str(path), fpn_channels=8
    )
    own = {key.replace(".", "_"): value for key, value in state.items()}
    loaded = detector.backbone.body.net.state_dict()
    assert all(torch.equal(value, own[key.replace(".", "_")]) for key, value in loaded.items())
    assert f"{len(loaded)} tensors of 'test_convnext' matched, {len(state) - len(loaded)} left over" in caplog.text


def test_backbone_weights__another_architecture_is_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("convnext_atto", num_classes=2).state_dict(), tmp_path / "a.safetensors")
    for name, first in (
        ("convnext_femto", r"'stem_0.weight' is \[40, 3, 4, 4\], expected \[48, 3, 4, 4\]"),
        ("resnet18", "it has no 'conv1.weight'"),
        ("convnextv2_atto", r"it has no 'stages_0.blocks.0.mlp.grn.weight'"),
    ):
        with pytest.raises(WeightsError, match=f"LCD-W004.*does not fit '{name}': {first}"):
            create_detector(
                "fasterrcnn_fpn", 2, backbone=name, backbone_weights=str(tmp_path / "a.safetensors"), fpn_channels=8
            )


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_backbone_state_dict__timm_loads_it_and_so_do_we(name: str, tmp_path: Path) -> None:
    detector = create_detector("fasterrcnn_fpn", 2, backbone=name, fpn_channels=8, box_head_features=8).eval()
    for parameter in detector.backbone.body.net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path / "a.safetensors"
    save_file(backbone_state_dict(detector.backbone.body), path)
    overlay = {"file": str(path)}
    net = timm.create_model(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay).eval()
    pyramid = timm.create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = detector.backbone.body(images)
        torch.testing.assert_close(pyramid(images)[-1], expected[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net.forward_intermediates(images)[1][-1], expected[-1], atol=1e-5, rtol=1e-5)
    again = create_detector(
        "fasterrcnn_fpn", 2, backbone=name, backbone_weights=str(path), fpn_channels=8, box_head_features=8
    )
    pairs = zip(again.backbone.body.parameters(), detector.backbone.body.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("channels", [1, 4])
def test_classifier__other_numbers_of_channels(channels: int) -> None:
    classifier = Classifier("test_convnext", 3, in_chans=channels)
    assert classifier(torch.rand(2, channels, 64, 64)).shape == (2, 3)


def test_classifier__a_network_without_stochastic_depth() -> None:
    with pytest.raises(ValueError, match="'vgg11' has no drop_path_rate; leave it at its default"):
        create_classifier("vgg11", num_classes=2, drop_path_rate=0.1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_classify__grey_and_rgba_files(channels: int, mode: str, image: Image.Image, tmp_path: Path) -> None:
    model = create_classifier("test_convnext", num_classes=3, in_chans=channels)
    image.convert(mode).save(tmp_path / "a.png")
    pixels = torch.from_numpy(np.array(image.convert(mode))).reshape(260, 300, channels).permute(2, 0, 1)
    expected = classify(model, pixels, top=3)
    assert classify(model, tmp_path / "a.png", top=3) == classify(model, image, top=3) == expected
    assert len(expected) == 3
    assert extract_features(model, pixels).pooled.shape == (64,)


def test_prepare__a_fourth_channel_is_no_alpha() -> None:
    model = create_classifier("test_convnext", in_chans=4, num_classes=2)
    pixels = torch.full((4, 200, 200), 180, dtype=torch.uint8)
    pixels[3] = 0  # Pillow would make the other channels black
    assert (model.prepare(pixels)[:3] == 180).all()
    assert (model.prepare(Image.fromarray(pixels.permute(1, 2, 0).numpy(), "RGBA"))[:3] == 180).all()


def test_prepare__other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the image has shape \[1, 9, 9\]; expected \[3, height, width\]"):
        create_classifier("test_convnext").prepare(torch.zeros(1, 9, 9))
    with pytest.raises(ValueError, match="takes 5 channels, images have 1, 3 or 4; give a tensor"):
        create_classifier("test_convnext", in_chans=5).prepare(Image.new("RGB", (9, 9)))
    assert create_classifier("test_convnext", in_chans=5).prepare(torch.zeros(5, 99, 70)).shape == (5, 160, 160)


@pytest.mark.filterwarnings("ignore:.LCD-I010.")  # 16-bit grey is scaled
def test_classify__16_bit_grey_files_are_not_cut_off(tmp_path: Path) -> None:
    pixels = np.linspace(0, 65535, 200 * 200).astype(np.uint16).reshape(200, 200)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    Image.fromarray((pixels >> 8).astype(np.uint8)).save(tmp_path / "flat.png")
    model = create_classifier("test_convnext", num_classes=4)
    deep, flat = (classify(model, tmp_path / f"{name}.png", top=4) for name in ("deep", "flat"))
    assert [c.score for c in deep] == pytest.approx([c.score for c in flat], abs=1e-3)


def test_classifier__repeated_class_names() -> None:
    with pytest.raises(ValueError, match="class_names has 'cat' for labels 0 and 2; give each class its own name"):
        create_classifier("test_convnext", num_classes=3, class_names=["cat", "dog", "cat"])


def test_classifier__is_copied_and_saved_whole(tmp_path: Path) -> None:
    model, images = create_classifier("test_convnext", num_classes=3), torch.rand(2, 3, 96, 96)
    torch.save(model, tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=False)
    for other in (saved, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), model(images))
        assert other.prepare(torch.zeros(3, 50, 70)).shape == (3, 160, 160)


def test_classifier__takes_images_of_another_device() -> None:
    assert create_classifier("test_convnext").to("meta")(torch.zeros(1, 3, 64, 64)).is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_classifier__weights_of_another_precision(dtype: torch.dtype) -> None:
    classifier = create_classifier("test_convnext", num_classes=3).to(dtype).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, reference = classifier(images), copy.deepcopy(classifier).float()(images)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), reference, atol=2e-2, rtol=2e-2)
