import argparse
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_convnext_det.errors import WeightsError
from lightning_convnext_det.models.backbone import TimmPyramid, pad_to_multiple
from lightning_convnext_det.models.backbone_weights import read_state_dict
from lightning_convnext_det.models.fpn import PyramidFPN

FAMILIES = [
    ("test_convnext", [24, 32, 48, 64]),
    ("convnextv2_atto", [40, 80, 160, 320]),
    ("resnet18", [64, 128, 256, 512]),
    ("resnext50_32x4d", [256, 512, 1024, 2048]),
    ("swin_tiny_patch4_window7_224", [96, 192, 384, 768]),
    ("mambaout_femto", [48, 96, 192, 288]),
    ("efficientnet_b0", [24, 40, 112, 320]),
    ("regnety_002", [24, 56, 152, 368]),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "channels"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_timm_pyramid__strides_channels_and_odd_size(name: str, channels: list[int]) -> None:
    pyramid = TimmPyramid(name).eval()
    with torch.no_grad():
        maps = pyramid(torch.rand(2, 3, 70, 90))
    assert pyramid.channels == channels
    assert [tuple(x.shape) for x in maps] == [
        (2, c, 96 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    assert all(x.isfinite().all() for x in maps)


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "channels"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_timm_pyramid__every_parameter_has_a_gradient(name: str, channels: list[int]) -> None:
    fpn = PyramidFPN(TimmPyramid(name), 32)
    # a level feeds the head through the FPN, so a loss over all of its maps reaches everything
    sum(x.square().sum() for x in fpn(torch.rand(2, 3, 64, 64)).values()).backward()
    assert [n for n, p in fpn.named_parameters() if p.grad is None] == []


@pytest.mark.heavy
def test_timm_pyramid__equals_timms_own_features(photos: list[torch.Tensor]) -> None:
    torch.manual_seed(3)
    reference = timm.create_model("convnextv2_atto", features_only=True).eval()
    pyramid = TimmPyramid("convnextv2_atto").eval()
    pyramid.net.load_state_dict(reference.state_dict())
    image = pad_to_multiple(photos[0][None] / 255, 32)
    with torch.no_grad():
        for ours, theirs in zip(pyramid(image), reference(image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_timm_pyramid__output_norm_standardises_each_position() -> None:
    maps = TimmPyramid("test_convnext", out_norm=True).eval()(torch.rand(1, 3, 64, 64))
    for x in maps:
        torch.testing.assert_close(x.mean(1), torch.zeros_like(x.mean(1)), atol=1e-4, rtol=0)
        torch.testing.assert_close(x.var(1, unbiased=False), torch.ones_like(x.mean(1)), atol=1e-2, rtol=0)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["test_convnext", "resnet18", "swin_tiny_patch4_window7_224"])
def test_timm_pyramid__frozen_stages_freeze_what_the_level_depends_on(name: str) -> None:
    pyramid = TimmPyramid(name, frozen_stages=2)
    frozen = {n for n, p in pyramid.net.named_parameters() if not p.requires_grad}
    assert frozen
    maps = pyramid(torch.rand(2, 3, 64, 64))
    assert not maps[1].requires_grad
    assert maps[2].requires_grad


def test_timm_pyramid__batch_norm_is_frozen_by_default() -> None:
    frozen, trained = TimmPyramid("resnet18"), TimmPyramid("resnet18", batch_norm="train")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    before = {k: v.clone() for k, v in frozen.net.state_dict().items()}
    frozen.train()(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in frozen.net.state_dict().items())
    mean = trained.net.bn1.running_mean.clone()
    trained.train()(torch.rand(2, 3, 64, 64))
    assert not torch.equal(trained.net.bn1.running_mean, mean)


def test_timm_pyramid__gradient_checkpointing_gives_the_same_gradients() -> None:
    plain = TimmPyramid("test_convnext")
    checkpointed = TimmPyramid("test_convnext", gradient_checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict())
    image = torch.rand(1, 3, 64, 64)
    for pyramid in (plain, checkpointed):
        sum(x.square().mean() for x in pyramid(image)).backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_timm_pyramid__channels_last_changes_nothing_but_the_layout() -> None:
    fast, plain = TimmPyramid("test_convnext"), TimmPyramid("test_convnext", channels_last=False)
    plain.load_state_dict(fast.state_dict())
    image = torch.rand(1, 3, 64, 64)
    for a, b in zip(fast.eval()(image), plain.eval()(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert fast(image)[0].is_contiguous(memory_format=torch.channels_last)


def test_timm_pyramid__in_chans_and_drop_path() -> None:
    pyramid = TimmPyramid("test_convnext", in_chans=4, drop_path_rate=0.5)
    assert pyramid(torch.rand(1, 4, 64, 64))[0].shape == (1, 24, 16, 16)
    assert any(getattr(m, "drop_prob", 0.0) > 0 for m in pyramid.modules())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", "has strides 16, 16, 16; a pyramid needs 4, 8, 16, 32"),
        ("convnext_tinny", "is not a timm model; did you mean 'convnext_tiny'"),
        ("qqqqqqqq", "is not a timm model; timm.list_models() lists them"),
    ],
)
def test_timm_pyramid__name_without_a_pyramid(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TimmPyramid(name)


def test_timm_pyramid__frozen_stages_keep_their_statistics() -> None:
    pyramid = TimmPyramid("resnet18", frozen_stages=2, batch_norm="train")
    pyramid.eval().train()  # as a trainer does, around validation
    before = {k: v.clone() for k, v in pyramid.net.state_dict().items()}
    images = torch.rand(2, 3, 64, 64) * 3 + 2
    first = pyramid(images)
    after = pyramid.net.state_dict()
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"layer3", "layer4"}
    expected = pyramid.eval()(images)
    torch.testing.assert_close(first[:2], expected[:2])  # frozen stages compute the same in training and evaluation
    assert not torch.allclose(first[2], expected[2])


def test_timm_pyramid__frozen_stages_drop_no_path() -> None:
    pyramid = TimmPyramid("test_convnext", frozen_stages=4, drop_path_rate=0.5).train()
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(pyramid(images), pyramid(images), rtol=0, atol=0)


def test_timm_pyramid__frozen_stages_out_of_range() -> None:
    with pytest.raises(ValueError, match="frozen_stages is 5"):
        TimmPyramid("test_convnext", frozen_stages=5)


@pytest.mark.heavy
@pytest.mark.parametrize("suffix", ["safetensors", "pth", "wrapped.pth", "module.pth"])
def test_timm_pyramid__local_weights_of_a_classifier(tmp_path: Path, suffix: str) -> None:
    classifier = timm.create_model("test_convnext", num_classes=3)  # not ImageNet's head
    path, state = tmp_path / f"weights.{suffix}", classifier.state_dict()
    if suffix == "safetensors":
        save_file(state, path)
    elif suffix == "wrapped.pth":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        torch.save({f"module.{k}": v for k, v in state.items()} if suffix == "module.pth" else state, path)
    pyramid = TimmPyramid("test_convnext", weights=str(path))
    assert torch.equal(pyramid.net.stem_0.weight, classifier.stem[0].weight)
    last = classifier.stages[3].blocks[-1].mlp.fc2.weight
    assert any(torch.equal(p, last) for p in pyramid.parameters())


@pytest.mark.heavy
def test_timm_pyramid__weights_of_another_network_name_the_first_mismatch(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(
        WeightsError, match=r"LCD-W004.*resnet18.pth does not fit 'test_convnext': it has no 'stem_0.weight'"
    ):
        TimmPyramid("test_convnext", weights=str(tmp_path / "resnet18.pth"))
    torch.save(timm.create_model("convnext_atto").state_dict(), tmp_path / "atto.pth")
    with pytest.raises(WeightsError, match=r"'stem_0.weight' is \[40, 3, 4, 4\], expected \[24, 3, 4, 4\]"):
        TimmPyramid("test_convnext", weights=str(tmp_path / "atto.pth"))


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.path}",)


def test_read_state_dict__refuses_code_damage_and_absence(tmp_path: Path) -> None:
    torch.save({"a": _Evil(tmp_path / "pwned")}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"evil.pth holds more than tensors"):
        read_state_dict(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()
    torch.save({"a": torch.rand(999)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:500])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    for name in ("cut.pth", "cut.safetensors", "absent.pth"):
        with pytest.raises(WeightsError, match=f"LCD-W003.*{name}"):
            read_state_dict(tmp_path / name)
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match="holds no tensors"):
        read_state_dict(tmp_path / "empty.pth")


def test_timm_pyramid__pretrained_from_the_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the file is put where the hub's client would put it, then fetched from there by timm itself
    from huggingface_hub import constants

    config = timm.get_pretrained_cfg("test_convnext")
    snapshot = tmp_path / f"models--{config.hf_hub_id.replace('/', '--')}" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    classifier = timm.create_model("test_convnext", num_classes=config.num_classes)
    save_file(classifier.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    pyramid = TimmPyramid("test_convnext", pretrained=True)
    assert torch.equal(pyramid.net.stem_0.weight, classifier.stem[0].weight)


def test_timm_pyramid__pretrained_offline_names_the_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"LCD-W001.*'convnext_tiny'.*offline mode is on.*give a local file"):
        TimmPyramid("convnext_tiny", pretrained=True)


def test_timm_pyramid__no_pretrained_weights_exist() -> None:
    with pytest.raises(WeightsError, match=r"LCD-W002.*'convnext_zepto_rms_ols'|LCD-W002.*'convnextv2_small'"):
        TimmPyramid("convnextv2_small", pretrained=True)


def test_pyramid_fpn__levels_and_parameters() -> None:
    fpn = PyramidFPN(TimmPyramid("test_convnext"), 256).eval()
    maps = fpn(torch.rand(1, 3, 96, 64))
    assert [(k, tuple(v.shape)) for k, v in maps.items()] == [
        ("0", (1, 256, 24, 16)),
        ("1", (1, 256, 12, 8)),
        ("2", (1, 256, 6, 4)),
        ("3", (1, 256, 3, 2)),
        ("pool", (1, 256, 2, 1)),
    ]
    # 1x1 laterals and 3x3 outputs with biases
    assert sum(p.numel() for p in fpn.fpn.parameters()) == 256 * (24 + 32 + 48 + 64) + 4 * 256 + 4 * (
        256 * 256 * 9 + 256
    )


def test_timm_pyramid__more_stages_are_frozen_on_any_device_and_dtype() -> None:
    pyramid = TimmPyramid("test_convnext", frozen_stages=1).double()
    pyramid.freeze(3)
    assert {n.split(".")[0] for n, p in pyramid.net.named_parameters() if p.requires_grad} == {"stages_3"}
    pyramid.freeze(1)  # what is frozen stays so
    assert {n.split(".")[0] for n, p in pyramid.net.named_parameters() if p.requires_grad} == {"stages_3"}
    with torch.device("meta"):
        elsewhere = TimmPyramid("test_convnext")
    elsewhere.freeze(3)  # once it has weights, whose gradients say what a level depends on
    elsewhere.load_state_dict(TimmPyramid("test_convnext").state_dict(), assign=True)
    assert {n.split(".")[0] for n, p in elsewhere.net.named_parameters() if p.requires_grad} == {"stages_3"}


def test_timm_pyramid__unknown_tag_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"has a tag that timm does not know; known are test_convnext\.r160_in1k"):
        TimmPyramid("test_convnext.r160")


@pytest.mark.heavy
def test_timm_pyramid__a_deeper_network_of_the_family_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(WeightsError, match=r"does not fit 'resnet18': 'layer1_2_conv1_weight' has no place in it"):
        TimmPyramid("resnet18", weights=str(tmp_path / "deeper.pth"))


def test_timm_pyramid__weights_of_timms_training_script(tmp_path: Path) -> None:
    network = timm.create_model("test_convnext")
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": tensors, "args": argparse.Namespace(lr=0.1)}, tmp_path / "last.pth.tar")
    pyramid = TimmPyramid("test_convnext", weights=str(tmp_path / "last.pth.tar"))
    assert torch.equal(pyramid.net.stem_0.weight, network.stem[0].weight)
