"""Networks of birder and Hugging Face, built live from random weights, against ours after import."""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from lightning_convnext_det.convert.deformable_detr import convert_deformable_detr
from lightning_convnext_det.convert.importer import import_weights, read_source
from lightning_convnext_det.convert.report import Converted, Slot
from lightning_convnext_det.errors import CheckpointError
from lightning_convnext_det.models.deformable_detr.model import DeformableDETR
from lightning_convnext_det.models.tensor_detections import split_detections
from lightning_convnext_det.types import Target

SIZES = {"min_size": 96, "max_size": 160}


def perturb(module: nn.Module) -> None:
    """Move what starts at zero or constant, so that every tensor shows in the outputs."""
    generator = torch.Generator().manual_seed(1)
    moved = ("bbox_embed", "class_embed", "sampling_offsets", "attention_weights", "reference_points", "norm", "grn")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in (*moved, "gamma", "beta", ".5.", "bias", "enc_output", "pos_trans")):
                scale = 0.8 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def build(converted: Converted, **options: Any) -> DeformableDETR:
    detector = DeformableDETR(
        **{**converted.arguments, "independent_images": False, "dropout": 0.0, **SIZES, **options}
    )
    detector.load_state_dict(converted.state_dict)
    return detector


def padding_of(batch: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    """True outside of the images, bool [B, H, W]."""
    masks = torch.ones(len(batch), *batch.shape[-2:], dtype=torch.bool)
    for mask, (height, width) in zip(masks, sizes, strict=True):
        mask[:height, :width] = False
    return masks


@pytest.fixture(scope="module")
def birder_net() -> Iterator[Callable[..., nn.Module]]:
    pytest.importorskip("birder")
    patch = pytest.MonkeyPatch()
    patch.setenv("DISABLE_CUSTOM_KERNELS", "1")  # birder would compile its kernels at import
    from birder.model_registry import registry

    def create(network: str, backbone: str, num_classes: int, **config: Any) -> nn.Module:
        torch.manual_seed(0)
        net = registry.detection_net_factory(
            network, num_classes, registry.net_factory(backbone, 0), config=config or None, size=(160, 160)
        )
        perturb(net)
        return net

    yield create
    patch.undo()


@pytest.fixture(scope="module")
def birder_tiny(birder_net: Callable[..., nn.Module]) -> nn.Module:
    return birder_net("deformable_detr_boxref", "convnext_v2_tiny", 91, dropout=0.0)


@pytest.fixture
def mixed_photos(photos: list[Tensor]) -> list[Tensor]:
    """Landscape, portrait and nearly square."""
    return [photos[0], photos[1].transpose(1, 2), photos[2][:, :, :450]]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # what birder and its imports say is not ours to mend
def test_convert_deformable_detr__birder_logits_and_boxes_of_all_layers(
    birder_tiny: nn.Module, mixed_photos: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = convert_deformable_detr(birder_tiny.state_dict())
    assert converted.report.parameters == sum(p.numel() for p in birder_tiny.parameters()) == 39_992_252
    assert converted.arguments["position_offset"] == 0.0
    detector = build(converted).eval()
    for images in [*([x] for x in mixed_photos), mixed_photos]:
        batch, sizes, _ = detector.transform(images)
        masks = padding_of(batch, sizes)
        with torch.no_grad():
            logits, boxes = birder_tiny.eval().forward_net(batch, masks if masks.any() else None)
        for disabled in ("0", "1") if images is mixed_photos else ("0",):  # both paths of the attention
            monkeypatch.setenv("DISABLE_CUSTOM_KERNELS", disabled)
            with torch.no_grad():
                ours = detector.predict(batch, sizes).decoder
            assert ours.logits.shape == (6, len(images), 300, 91)
            torch.testing.assert_close(ours.logits, logits, atol=1e-4, rtol=0)
            torch.testing.assert_close(ours.boxes, boxes, atol=1e-4, rtol=0)
        assert logits.std() > 0.5
        assert boxes.std() > 0.1


@pytest.fixture
def real_targets(shared_data: Path, photos: list[Tensor]) -> list[Target]:
    """Objects of the photos, labels as COCO's ids less one, boxes in pixels of ``mixed_photos``."""
    folder = shared_data / "coco_mini"
    content = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    ids = [int(f.stem) for f in sorted((folder / "val2017").glob("*.jpg"))[:3]]
    found: list[Target] = []
    for i, image_id in enumerate(ids):
        rows = [a for a in content["annotations"] if a["image_id"] == image_id and not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        if i == 1:
            boxes = boxes[:, [1, 0, 3, 2]]
        if i == 2:
            boxes[:, [0, 2]] = boxes[:, [0, 2]].clamp(max=450)
        labels = torch.tensor([a["category_id"] - 1 for a in rows])
        good = (boxes[:, 2:] > boxes[:, :2] + 1).all(1)
        found.append({"boxes": boxes[good], "labels": labels[good]})
    assert sum(len(t["boxes"]) for t in found) >= 5
    return found


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_convert_deformable_detr__birder_training_losses(
    birder_tiny: nn.Module, mixed_photos: list[Tensor], real_targets: list[Target]
) -> None:
    detector = build(convert_deformable_detr(birder_tiny.state_dict())).train()
    detector.backbone.eval()
    batch, sizes, moved = detector.transform(mixed_photos, real_targets)
    assert moved is not None
    theirs = birder_tiny.train()
    theirs.backbone.eval()  # stochastic depth
    labelled = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in moved]
    with torch.no_grad():
        _, expected = theirs(batch, labelled, masks=padding_of(batch, sizes), image_sizes=sizes)
        losses = detector(mixed_photos, real_targets)
    for ours, name in [("loss_classification", "labels"), ("loss_box", "boxes"), ("loss_giou", "giou")]:
        total = sum(v for k, v in losses.items() if k.startswith(ours))
        torch.testing.assert_close(total, expected[name], rtol=1e-4, atol=0)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nms", ["none", "soft"])
def test_convert_deformable_detr__birder_detections(
    birder_net: Callable[..., nn.Module], mixed_photos: list[Tensor], nms: str
) -> None:
    net = birder_net(
        "deformable_detr_boxref",
        "convnext_v2_atto",
        20,
        num_encoder_layers=1,
        num_decoder_layers=2,
        soft_nms=nms == "soft",
    ).eval()
    detector = build(convert_deformable_detr(net.state_dict()), nms=nms).eval()
    batch, sizes, _ = detector.transform(mixed_photos)
    with torch.no_grad():
        expected, _ = net(batch, masks=padding_of(batch, sizes), image_sizes=sizes)
        found = split_detections(detector.forward_tensors(batch, *detector.levels.place(batch, sizes)))
    for ours, theirs in zip(found, expected, strict=True):
        order = theirs["scores"].sort(descending=True, stable=True).indices
        torch.testing.assert_close(ours["scores"], theirs["scores"][order], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours["boxes"], theirs["boxes"][order], atol=0.05, rtol=0)
        assert torch.equal(ours["labels"], theirs["labels"][order] - 1)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("network", "backbone"), [("deformable_detr", "convnext_v2_atto"), ("deformable_detr_boxref", "convnext_v1_atto")]
)
def test_convert_deformable_detr__birder_other_networks(
    birder_net: Callable[..., nn.Module], mixed_photos: list[Tensor], network: str, backbone: str
) -> None:
    net = birder_net(network, backbone, 7, num_encoder_layers=1, num_decoder_layers=2, num_queries=30).eval()
    converted = convert_deformable_detr(net.state_dict())
    assert converted.arguments["backbone"] == backbone.replace("_v1", "").replace("_v2", "v2")
    assert converted.arguments["box_refinement"] == network.endswith("boxref")
    detector = build(converted).eval()
    batch, sizes, _ = detector.transform(mixed_photos)
    with torch.no_grad():
        logits, boxes = net.forward_net(batch, padding_of(batch, sizes))
        ours = detector.predict(batch, sizes).decoder
    torch.testing.assert_close(ours.logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.boxes, boxes, atol=1e-4, rtol=0)


HF_VARIANTS: dict[str, dict[str, Any]] = {
    "refined": {"with_box_refine": True, "num_feature_levels": 4, "out_indices": [0, 1, 2, 3]},
    "plain": {"num_feature_levels": 4, "out_indices": [1, 2, 3]},
    "two_stage": {"with_box_refine": True, "two_stage": True, "num_feature_levels": 4, "out_indices": [1, 2, 3]},
    "resnet": {"backbone": "resnet50", "num_feature_levels": 4, "out_indices": [2, 3, 4]},
}


def huggingface_net(
    backbone: str = "convnextv2_atto", out_indices: list[int] | None = None, **options: Any
) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    body = transformers.TimmBackboneConfig(
        backbone=backbone, use_pretrained_backbone=False, out_indices=out_indices, features_only=True
    )
    settings = {
        "backbone_config": body,
        "d_model": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "num_queries": 25,
        "two_stage_num_proposals": 25,
        "num_labels": 91,
        "dropout": 0.0,
        "class_cost": 2,
        "auxiliary_loss": True,
    }
    config = transformers.DeformableDetrConfig(**{**settings, **options})
    net = transformers.DeformableDetrForObjectDetection(config).eval()
    perturb(net)
    if config.two_stage:
        # ours never chooses proposals on padding or at the border: score theirs too low to be chosen
        with torch.no_grad():
            unusable = net.model.enc_output_norm(net.model.enc_output.bias)
            head = net.class_embed[-1].weight
            head[0] -= unusable * (head[0] @ unusable + 20) / unusable.square().sum()
    return net


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", HF_VARIANTS.values(), ids=HF_VARIANTS.keys())
def test_convert_deformable_detr__huggingface_logits_boxes_and_losses(
    options: dict[str, Any], mixed_photos: list[Tensor], real_targets: list[Target]
) -> None:
    net = huggingface_net(**options)
    two_stage = bool(options.get("two_stage"))
    converted = convert_deformable_detr(net.state_dict(), num_heads=4, **({"num_queries": 25} if two_stage else {}))
    detector = build(converted).eval()
    for images in [*([x] for x in mixed_photos), mixed_photos]:
        batch, sizes, _ = detector.transform(images)
        with torch.no_grad():
            theirs = net(batch, pixel_mask=(~padding_of(batch, sizes)).long())
            ours = detector.predict(batch, sizes).decoder
        torch.testing.assert_close(ours.logits[-1], theirs.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.boxes[-1], theirs.pred_boxes, atol=1e-4, rtol=0)
        assert theirs.pred_boxes.std() > 0.05
    compare_huggingface_losses(net, detector, mixed_photos, real_targets)


def compare_huggingface_losses(
    net: nn.Module, detector: DeformableDETR, images: list[Tensor], targets: list[Target]
) -> None:
    detector.train()
    detector.backbone.eval()
    batch, sizes, moved = detector.transform(images, targets)
    labels = []
    for target, (height, width) in zip(moved or [], sizes, strict=True):
        x1, y1, x2, y2 = (target["boxes"] / torch.tensor([width, height, width, height])).unbind(1)
        boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1)
        labels.append({"boxes": boxes, "class_labels": target["labels"]})
    with torch.no_grad():
        expected = net(batch, pixel_mask=(~padding_of(batch, sizes)).long(), labels=labels).loss_dict
        losses = detector(images, targets)
    weights = {"loss_ce": ("loss_classification", 2), "loss_bbox": ("loss_box", 5), "loss_giou": ("loss_giou", 2)}
    for theirs, (name, weight) in weights.items():
        for theirs_suffix, suffix in [("", ""), ("_0", "_aux0"), ("_1", "_aux1")]:
            actual = losses[name + suffix]
            torch.testing.assert_close(actual, weight * expected[theirs + theirs_suffix], rtol=1e-4, atol=0)


def as_original(net: nn.Module) -> dict[str, Tensor]:
    """Call Hugging Face's tensors what the authors' repository calls them."""
    state = {}
    for key, tensor in net.state_dict().items():
        for new, old in [
            ("model.backbone.model.", "backbone.0.body."),
            ("model.query_position_embeddings.", "query_embed."),
            ("model.input_proj.", "input_proj."),
            ("model.", "transformer."),
            (".mlp.fc1.", ".linear1."),
            (".mlp.fc2.", ".linear2."),
            (".encoder_attn.", ".cross_attn."),
            (".encoder_attn_layer_norm.", ".norm1."),
            (".self_attn.o_proj.", ".self_attn.out_proj."),
        ]:
            inner = new.startswith(".") and "backbone" not in key
            key = key.replace(new, old, 1) if inner or key.startswith(new) else key
        place = "2" if "decoder" in key else "1"
        key = key.replace(".self_attn_layer_norm.", f".norm{place}.")
        key = key.replace(".final_layer_norm.", ".norm3." if "decoder" in key else ".norm2.")
        state[key] = tensor
    for key in [k for k in state if ".self_attn.q_proj." in k]:
        parts = [state.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        state[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return state


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["plain", "two_stage", "resnet"])
def test_convert_deformable_detr__original_names(variant: str, mixed_photos: list[Tensor]) -> None:
    net = huggingface_net(**HF_VARIANTS[variant])
    state = as_original(net)
    assert {"transformer.decoder.layers.0.norm1.weight", "transformer.encoder.layers.1.norm2.bias"} <= set(state)
    converted = convert_deformable_detr(state, num_heads=4, **({"num_queries": 25} if variant == "two_stage" else {}))
    assert converted.report.origin == "original"
    detector = build(converted).eval()
    batch, sizes, _ = detector.transform(mixed_photos)
    with torch.no_grad():
        theirs = net(batch, pixel_mask=(~padding_of(batch, sizes)).long())
        ours = detector.predict(batch, sizes).decoder
    torch.testing.assert_close(ours.logits[-1], theirs.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.boxes[-1], theirs.pred_boxes, atol=1e-4, rtol=0)


SMALL = {
    "backbone": "convnext_atto",
    "num_queries": 5,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "hidden_dim": 32,
    "num_heads": 8,
    "feedforward_dim": 32,
}


def original_state(num_classes: int = 91, **options: Any) -> dict[str, Tensor]:
    """A state dict with the names of the authors' repository out of a network of ours."""
    detector = DeformableDETR(num_classes, **{**SMALL, **options})
    perturb(detector)
    renames = [
        ("backbone.net.", "backbone.0.body."),
        ("levels.projections.", "input_proj."),
        ("levels.embedding", "transformer.level_embed"),
        ("query_embedding.", "query_embed."),
        ("reference_points.", "transformer.reference_points."),
        ("encoder.", "transformer.encoder."),
        ("decoder.", "transformer.decoder."),
        ("class_heads.", "class_embed."),
        ("box_heads.", "bbox_embed."),
        ("proposer.memory_projection.", "transformer.enc_output."),
        ("proposer.memory_norm.", "transformer.enc_output_norm."),
        ("proposer.query_projection.", "transformer.pos_trans."),
        ("proposer.query_norm.", "transformer.pos_trans_norm."),
    ]
    inner = [
        (".attention.", ".self_attn."),
        (".self_attention.", ".self_attn."),
        (".cross_attention.", ".cross_attn."),
        ("value_projection", "value_proj"),
        ("output_projection", "output_proj"),
        (".self_norm.", ".norm2."),
        (".cross_norm.", ".norm1."),
        (".feedforward.linear", ".linear"),
    ]
    state = {}
    for key, tensor in detector.state_dict().items():
        for ours, theirs in renames:
            if key.startswith(ours):
                key = theirs + key[len(ours) :]
                break
        if key.startswith("transformer."):
            key = key.replace(".feedforward.norm.", ".norm3." if "decoder" in key else ".norm2.")
            key = key.replace(".norm.", ".norm1.") if "encoder.layers" in key else key
            for ours, theirs in inner:
                key = key.replace(ours, theirs)
        for place, number in [("0", "0"), ("3", "1"), ("6", "2")]:
            for layer in range(4):
                key = key.replace(f"bbox_embed.{layer}.{place}.", f"bbox_embed.{layer}.layers.{number}.")
        state[key] = tensor
    return state


def test_convert_deformable_detr__round_trip() -> None:
    state = original_state()
    converted = convert_deformable_detr(state)
    assert {k: v for k, v in converted.arguments.items() if k in SMALL} == SMALL
    assert len(converted.report.matched) == len(state) == len(converted.state_dict)
    assert converted.report.parameters == sum(v.numel() for v in state.values())
    assert str(converted.report).startswith(f"original: {len(state)} tensors (")


def test_convert_deformable_detr__does_not_share_memory_with_the_source() -> None:
    state = original_state()
    converted = convert_deformable_detr(state)
    before = converted.state_dict["class_heads.0.bias"].clone()
    state["class_embed.0.bias"].fill_(7)
    assert torch.equal(converted.state_dict["class_heads.0.bias"], before)


def test_convert_deformable_detr__drops_rows_without_a_class() -> None:
    state = original_state(num_classes=6)
    slots = [Slot(1, "cat", 17), Slot(4, "dog", 18)]
    converted = convert_deformable_detr(state, slots=slots)
    assert converted.arguments["num_classes"] == 2
    assert [s.name for s in converted.report.slots] == ["cat", "dog"]
    assert torch.equal(converted.state_dict["class_heads.1.weight"], state["class_embed.1.weight"][[1, 4]])
    kept = convert_deformable_detr(state, slots=slots, keep_unused=True)
    assert kept.arguments["num_classes"] == 6


def test_convert_deformable_detr__keeps_the_objectness_of_proposals() -> None:
    state = original_state(num_classes=6, two_stage=True)
    converted = convert_deformable_detr(state, slots=[Slot(2, "a", 2), Slot(5, "b", 5)], num_queries=5)
    assert torch.equal(converted.state_dict["class_heads.2.bias"], state["class_embed.2.bias"][[0, 5]])
    assert torch.equal(converted.state_dict["class_heads.1.bias"], state["class_embed.1.bias"][[2, 5]])


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("class_embed.1.bias"), r"1 missing \(class_heads.1.bias\)"),
        (lambda s: s.pop("transformer.level_embed"), "'levels.embedding' is missing"),
        (lambda s: s.update(extra=torch.zeros(3)), r"1 left over \(extra\)"),
        (
            lambda s: s.update({"class_embed.1.bias": torch.zeros(4)}),
            r"1 mismatched \(class_heads.1.bias \[4\], expected \[91\]\)",
        ),
        (
            lambda s: s.update({"transformer.decoder.class_embed.0.bias": torch.zeros(91)}),
            r"1 left over \(transformer.decoder.class_embed.0.bias\)",
        ),
        (
            lambda s: s.update({"backbone.0.body.stem_0.weight": torch.zeros(41, 3, 4, 4)}),
            "the backbone is not recognised; give its timm name",
        ),
    ],
    ids=["missing", "essential_missing", "left_over", "shape", "contradiction", "backbone"],
)
def test_convert_deformable_detr__mismatch_is_an_error(
    change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    state = original_state()
    change(state)
    with pytest.raises(CheckpointError, match=rf"LCD-K011\] .*{message}"):
        convert_deformable_detr(state)


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        (["levels.embedding"], "a Deformable DETR of this package already"),
        (["backbone.body.conv1.weight", "rpn.head.cls_logits.weight"], "another R-CNN of torchvision"),
        (["backbone.conv1.weight", "rpn_head.rpn_conv.weight"], "another R-CNN of MMDetection"),
        (["backbone.conv1.weight", "bbox_head.cls_branches.0.weight"], "a detector of MMDetection"),
        (["transformer.encoder.layers.0.self_attn.in_proj_weight"], "a DETR without deformable attention"),
        (["model.enc_score_head.weight"], "an RT-DETR of Hugging Face"),
        (["stem.0.weight", "head.fc.weight"], "a classifier; use it as backbone weights"),
        (["a.b"], "of no known family; its first tensor is 'a.b'"),
        ([], "of no known family; its first tensor is 'none'"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) and x else None,
)
def test_convert_deformable_detr__names_the_wrong_family(keys: list[str], family: str) -> None:
    with pytest.raises(CheckpointError, match=rf"LCD-K010\] expected a Deformable DETR .*, got {family}"):
        convert_deformable_detr({k: torch.zeros(1) for k in keys})


BIRDER_EXTRAS = {
    "class_to_idx": {"dog": 2, "cat": 1, "yak": 4},
    "rgb_stats": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]},
    "signature": {"dynamic": True, "inputs": [{"data_shape": [0, 3, 224, 224]}], "num_labels": 4},
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("network", ["deformable_detr", "deformable_detr_boxref"])
def test_import_weights__birder_files(
    birder_net: Callable[..., nn.Module], tmp_path: Path, suffix: str, network: str
) -> None:
    net = birder_net(network, "convnext_v2_atto", 4, num_encoder_layers=1, num_decoder_layers=2, num_queries=9)
    path = tmp_path / f"net.{suffix}"
    if suffix == "pt":
        torch.save({"state": net.state_dict(), "task": "object_detection", **BIRDER_EXTRAS}, path)
    else:
        save_model(net, str(path), {"task": "x", **{k: json.dumps(v) for k, v in BIRDER_EXTRAS.items()}})
    converted = import_weights(path)
    assert converted.arguments["box_refinement"] == network.endswith("boxref")
    assert converted.report.slots == (Slot(0, "cat", 1), Slot(1, "dog", 2), Slot(3, "yak", 4))
    assert converted.arguments["num_classes"] == 3
    assert converted.arguments["min_size"] == 224
    assert converted.arguments["image_std"] == [0.2, 0.2, 0.1]
    head = net.class_embed[1].weight[[0, 1, 3]]
    ours = converted.state_dict["class_heads.1.weight" if network.endswith("boxref") else "class_heads.0.weight"]
    assert torch.equal(ours, head)
    DeformableDETR(**converted.arguments).load_state_dict(converted.state_dict)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["refined", "plain", "two_stage"])
def test_import_weights__huggingface_folder(tmp_path: Path, variant: str) -> None:
    names = {0: "N/A", 1: "person", 2: "bicycle", 3: "LABEL_3"}
    net = huggingface_net(
        **HF_VARIANTS[variant], id2label=names, label2id={v: k for k, v in names.items()}, num_labels=4
    )
    net.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        converted = import_weights(path, keep_unused=True)
        assert converted.report.slots == (Slot(1, "person", 1), Slot(2, "bicycle", 2))
        assert converted.arguments["num_heads"] == 4
        assert converted.arguments["num_queries"] == 25
        assert converted.arguments["backbone"] == "convnextv2_atto"
        DeformableDETR(**converted.arguments).load_state_dict(converted.state_dict)
    assert torch.equal(converted.state_dict["class_heads.0.weight"], net.class_embed[0].weight)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dilation": True}, "dilation True"),
        ({"activation_function": "gelu"}, "activation_function gelu"),
        ({"decoder_attention_heads": 4}, "decoder_attention_heads 4"),
    ],
)
def test_read_source__huggingface_options_without_a_trace_in_the_weights(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    names = ("model.encoder.layers.0.self_attn.sampling_offsets.weight", "model.level_embed")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"encoder_attention_heads": 8, **config}))
    with pytest.raises(CheckpointError, match=rf"LCD-K011\] .*{message}, which is not supported"):
        read_source(tmp_path)


def test_import_weights__original_file_with_its_command_line(tmp_path: Path) -> None:
    state = original_state()
    args = argparse.Namespace(nheads=8, num_queries=5, lr=2e-4, dataset_file="coco")
    torch.save({"model": state, "args": args, "epoch": 49}, tmp_path / "r50.pth")
    converted = import_weights(tmp_path / "r50.pth")
    assert converted.arguments["num_classes"] == 80
    assert converted.report.slots[0] == Slot(1, "person", 1)
    assert converted.report.slots[-1] == Slot(90, "toothbrush", 90)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    "kind", ["missing", "empty_folder", "empty", "text", "truncated", "safetensors", "no_tensors", "evil"]
)
def test_read_source__unreadable_files(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    if kind == "empty_folder":
        path = tmp_path
    elif kind in ("empty", "text", "safetensors"):
        path.write_bytes(b"" if kind == "empty" else b"not weights at all")
    elif kind == "truncated":
        torch.save({"a": torch.rand(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "no_tensors":
        torch.save({"a": 1}, path)
    elif kind == "evil":
        torch.save({"a": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"LCD-K012\] .*" + path.name) as info:
        read_source(path)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "executed").exists()


def test_import_weights__names_the_file(tmp_path: Path) -> None:
    save_file({"head.fc.weight": torch.zeros(2)}, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"^\[LCD-K010\] .*net.safetensors: expected a Deformable DETR"):
        import_weights(tmp_path / "net.safetensors")


def test_read_source__notes_in_the_metadata_may_be_anything(tmp_path: Path) -> None:
    notes = {"format": "pt", "author": "", "remark": "[draft] of {today}", "class_to_idx": '{"cat": 1}'}
    save_file({"x": torch.zeros(1)}, tmp_path / "net.safetensors", metadata=notes)
    assert [slot.name for slot in read_source(tmp_path / "net.safetensors").slots] == ["cat"]


def test_read_source__damaged_configuration(tmp_path: Path) -> None:
    names = "model.encoder.layers.0.self_attn.sampling_offsets.weight", "model.level_embed"
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"encoder_attention_heads": 8,')
    with pytest.raises(CheckpointError, match=r"LCD-K012\] .*config.json cannot be read: Expecting"):
        read_source(tmp_path)
